"""scores.parquet and token_scores.parquet: what was written comes back, and no changed byte is taken for another score."""

import dataclasses

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jsfdd.scoring.metrics import column_names
from jsfdd.scoring.table import (
    ScoreTable,
    TokenRow,
    read_scores,
    read_token_scores,
    write_part,
    write_scores,
    write_token_scores,
)


def make_table(lengths=(5, 0, 3)):
    rng = np.random.default_rng(0)
    rows = [TokenRow(rng.random(n) < 0.5, *rng.random((2, n), np.float32)) for n in lengths]
    return ScoreTable(
        ids=tuple(f"é{i}" for i in range(len(lengths))),
        sources=("chat",) * len(lengths),
        num_tokens=np.array([row.counted.sum() for row in rows], np.int32),
        metrics={name: np.where(np.array(lengths) > 0, rng.random(len(lengths)), np.nan) for name in column_names()},
        identity={"target": "t"},
        tokens=tuple(rows),
        prompt_states=rng.normal(size=(len(lengths), 4)).astype(np.float32),
    )


def read_all(path):
    return read_scores(path, prompt_states=True)


def as_plain(table):
    tokens = None if table.tokens is None else [[v.tolist() for v in dataclasses.astuple(row)] for row in table.tokens]
    metrics = {name: values.tobytes() for name, values in table.metrics.items()}
    prompts = None if table.prompt_states is None else table.prompt_states.tobytes()
    return table.ids, table.sources, table.num_tokens.tolist(), metrics, table.identity, tokens, prompts


def test_what_goes_in_comes_out(tmp_path):
    table = make_table()
    write_part(tmp_path / "part", table)
    write_scores(tmp_path / "scores", table)
    write_token_scores(tmp_path / "tokens", table)
    assert as_plain(read_all(tmp_path / "part")) == as_plain(table)
    assert as_plain(read_all(tmp_path / "scores")) == as_plain(dataclasses.replace(table, tokens=None))
    assert as_plain(read_scores(tmp_path / "part")) == as_plain(dataclasses.replace(table, prompt_states=None))
    read = read_token_scores(tmp_path / "tokens")
    for name, row in zip(table.ids, table.tokens):
        for a, b in zip(dataclasses.astuple(read[name]), dataclasses.astuple(row)):
            np.testing.assert_array_equal(a, b)


def flips(path, count):
    """The file with one bit changed, `count` times."""
    data, rng = path.read_bytes(), np.random.default_rng(1)
    for place in rng.choice(len(data), min(count, len(data)), replace=False):
        changed = bytearray(data)
        changed[place] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        yield
    path.write_bytes(data)


@pytest.mark.parametrize("write, read, plain", [
    (write_part, read_all, as_plain),
    (write_token_scores, read_token_scores, lambda rows: {name: repr(row) for name, row in rows.items()}),
])  # fmt: skip
def test_no_flipped_bit_is_taken_for_another_score(tmp_path, write, read, plain):
    path = tmp_path / "scores.parquet"
    write(path, make_table())
    before, refused = plain(read(path)), 0
    for _ in flips(path, 250):
        try:
            assert plain(read(path)) == before  # a bit of what nobody reads
        except ValueError as error:
            assert "scores.parquet" in str(error) and "score again" in str(error)
            refused += 1
    assert refused > 120


def test_a_file_of_another_writer_is_refused(tmp_path):
    path = tmp_path / "scores.parquet"
    write_scores(path, make_table())
    table = pyarrow.parquet.read_table(path)
    changed = {"id": ["é0", "é1", "é3"], "source": ["math", None, "chat"], "num_tokens": np.array([1, 2, 3], np.int32)}
    for number, (name, values) in enumerate(changed.items()):
        pyarrow.parquet.write_table(table.set_column(number, name, pyarrow.array(values)), path)
        with pytest.raises(ValueError, match="checksum is of other scores; .*delete it and score again"):
            read_scores(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata({}), path)
    with pytest.raises(ValueError, match="was not written by this version"):
        read_scores(path)


def test_the_checksum_does_not_depend_on_chunks(tmp_path):
    path, table = tmp_path / "scores.parquet", make_table([3] * 50)
    write_part(path, table)
    whole = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(pyarrow.concat_tables([whole[:7], whole[7:31], whole[31:]]), path, row_group_size=9)
    assert as_plain(read_all(path)) == as_plain(table)


def test_changed_prompts_states_are_refused(tmp_path):
    path, table = tmp_path / "scores.parquet", make_table()
    write_scores(path, table)
    whole = pyarrow.parquet.read_table(path)
    for values in (table.prompt_states[::-1], table.prompt_states[:, ::-1]):
        flat = pyarrow.array(np.ascontiguousarray(values).ravel())
        column = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
        place = whole.column_names.index("prompt_state")
        pyarrow.parquet.write_table(whole.set_column(place, "prompt_state", column), path)
        with pytest.raises(ValueError, match="checksum is of other scores; .*delete it and score again"):
            read_all(path)
        assert as_plain(read_scores(path)) == as_plain(dataclasses.replace(table, tokens=None, prompt_states=None))
