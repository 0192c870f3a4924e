"""Scoring a data set: the same result on any devices, in any batches, and after any interruption."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from toy import as_target, random_params, toy_config

from jsfdd.base.mesh import make_mesh, replicate, shard_rows, to_host
from jsfdd.base.records import Sample, TokenScores
from jsfdd.data.batches import Shape, pad_batch
from jsfdd.hidden.best_k import StillPossible
from jsfdd.hidden.capture import keep_hidden
from jsfdd.hidden.store import HiddenStore
from jsfdd.models.target import head_logits, hidden_states
from jsfdd.scoring import parts as parts_module
from jsfdd.scoring import score as score_module
from jsfdd.scoring.flatness import score_hidden, token_scores
from jsfdd.scoring.metrics import METRICS, Metric, column_names
from jsfdd.scoring.prompt_state import directions
from jsfdd.scoring.score import make_score_step, score_samples
from jsfdd.scoring.table import read_scores, read_token_scores, write_scores, write_token_scores
from jsfdd.selection.sfdd import select

CONFIG = toy_config(vocab_size=97)
PARAMS = random_params(CONFIG)
TARGET = as_target(CONFIG, PARAMS)


def make_samples(number=23, seed=0, longest=150):
    random = np.random.default_rng(seed)
    samples = []
    for i in range(number):
        length = int(random.integers(4, longest))
        mask = np.zeros(length, bool)
        if i % 7 != 3:  # every seventh has an answer of one token, of which none counts
            mask[length // 3 :] = True
        else:
            mask[-1] = True
        tokens = random.integers(0, CONFIG.vocab_size, length).astype(np.int32)
        samples.append(Sample(f"s{i}", f"source{i % 2}", tokens, mask))
    return samples


SAMPLES = make_samples()


def pad_tokens(sample):
    """One shape for all, as every shape would compile anew."""
    return np.pad(sample.tokens, (0, 160 - len(sample.tokens)))[None, :]


@jax.jit
def hidden_alone(tokens):
    return hidden_states(CONFIG, PARAMS, tokens)


@jax.jit
def scores_of_all(tokens):
    logits = head_logits(CONFIG, PARAMS, hidden_states(CONFIG, PARAMS, tokens))[0]
    return token_scores(logits, jnp.roll(tokens[0], -1))


def scores_alone(sample):
    """float32[160] each; the last of the sample's own tokens is followed by padding."""
    return scores_of_all(pad_tokens(sample))


def score(samples=SAMPLES, params=PARAMS, devices=1, batch_tokens=512, identity=None, **options):
    mesh = make_mesh(data=devices)
    return score_samples(
        as_target(CONFIG, params), samples, mesh, batch_tokens=batch_tokens, identity=identity or {"target": "toy"},
        progress=False, **options,
    )  # fmt: skip


def assert_equal_tables(a, b):
    assert (a.ids, a.sources) == (b.ids, b.sources)
    np.testing.assert_array_equal(a.num_tokens, b.num_tokens)
    np.testing.assert_array_equal(a.prompt_states, b.prompt_states)
    for name in column_names():
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def table():
    return score(per_token=True)


def test_a_sample_is_scored_as_if_it_were_alone(table):
    assert table.ids == tuple(sample.id for sample in SAMPLES)
    assert table.sources == tuple(sample.source for sample in SAMPLES)
    for i, sample in enumerate(SAMPLES):
        assert table.num_tokens[i] == sample.counted.sum()
        if not sample.counted.any():
            assert all(np.isnan(table[name][i]) for name in column_names())
            continue
        tokens = scores_alone(sample)
        counted = {name: np.asarray(values)[: len(sample.tokens)][sample.counted] for name, values in tokens._asdict().items()}
        for name in ("flatness", "entropy", "top1", "margin", "energy"):
            np.testing.assert_allclose(table[name][i], counted[name].mean(), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(table["ppl"][i], np.exp(counted["nll"].mean()), rtol=1e-5)
        np.testing.assert_allclose(table["flatness_median"][i], np.median(counted["flatness"]), rtol=1e-5)
        row = table.tokens[i]
        assert row.counted.tolist() == sample.counted.tolist()
        np.testing.assert_allclose(row.flatness[sample.counted], counted["flatness"], rtol=1e-5)
        assert not row.flatness[~sample.counted].any() and not row.entropy[~sample.counted].any()
    assert (table.num_tokens == 0).sum() == 3


@pytest.mark.parametrize("devices, batch_tokens", [(1, 64), (1, 5000), (4, 512), (2, 2000)])
def test_scores_do_not_depend_on_batches_or_devices(table, devices, batch_tokens):
    other = score(devices=devices, batch_tokens=batch_tokens)
    for name in column_names():
        np.testing.assert_allclose(other[name], table[name], rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(other.num_tokens, table.num_tokens)


def test_scores_do_not_depend_on_the_order_of_the_data(table):
    order = np.random.default_rng(1).permutation(len(SAMPLES))
    shuffled = score([SAMPLES[i] for i in order])
    assert shuffled.ids == tuple(SAMPLES[i].id for i in order)
    for name in column_names():
        np.testing.assert_allclose(shuffled[name], table[name][order], rtol=1e-5, err_msg=name)


def test_a_prompts_state_is_the_mean_of_its_own_tokens(table):
    for i, sample in enumerate(SAMPLES):
        first = int(np.argmax(sample.counted))
        mean = np.asarray(hidden_alone(pad_tokens(sample)))[0, :first].mean(axis=0) if first else np.zeros(CONFIG.hidden_size)
        np.testing.assert_allclose(table.prompt_states[i], mean @ directions(CONFIG.hidden_size), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(score(devices=4).prompt_states, table.prompt_states)  # to the bit
    store = {sample.id: np.asarray(hidden_alone(pad_tokens(sample)))[0, : len(sample.tokens)] for sample in SAMPLES}
    np.testing.assert_allclose(score(hidden=store).prompt_states, table.prompt_states, rtol=1e-4, atol=1e-5)


def test_padding_does_not_matter():
    batch = pad_batch(SAMPLES[:3], Shape(4, 160))
    padding = np.arange(160)[None, :] >= batch.lengths[:, None]
    other = batch._replace(tokens=np.where(padding, 55, batch.tokens))
    step = make_score_step(CONFIG, make_mesh(data=1), block=16)
    for name, a, b in zip(TokenScores._fields, step(PARAMS, batch)[0], step(PARAMS, other)[0]):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert not np.asarray(a)[~batch.counted].any()


def test_map_over_devices_equals_pmap_and_one_device():
    batch = pad_batch(SAMPLES[:8], Shape(8, 160))
    step = make_score_step(CONFIG, make_mesh(data=4), block=16, hidden_dtype="float32")
    mesh = make_mesh(data=4)
    scores, _, hidden = to_host(step(replicate(PARAMS, mesh), shard_rows(batch, mesh)))
    one_scores, _, one_hidden = to_host(
        make_score_step(CONFIG, make_mesh(data=1), block=16, hidden_dtype="float32")(PARAMS, batch)
    )

    def of_two_rows(params, tokens, counted):
        hidden = hidden_states(CONFIG, params, tokens)
        return score_hidden(CONFIG, params, hidden, jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))), counted, 16), hidden

    by_pmap = jax.pmap(of_two_rows, in_axes=(None, 0, 0))(
        PARAMS, batch.tokens.reshape(4, 2, 160), batch.counted.reshape(4, 2, 160)
    )
    pmap_scores, pmap_hidden = jax.tree.map(lambda x: np.asarray(x).reshape(8, 160, *x.shape[3:]), by_pmap)
    np.testing.assert_array_equal(hidden, pmap_hidden)
    np.testing.assert_allclose(hidden, one_hidden, rtol=1e-5, atol=1e-5)
    for name in TokenScores._fields:
        np.testing.assert_array_equal(getattr(scores, name), getattr(pmap_scores, name), err_msg=name)
        np.testing.assert_allclose(getattr(scores, name), getattr(one_scores, name), rtol=2e-5, atol=1e-6, err_msg=name)


def test_devices_do_not_communicate():
    mesh = make_mesh(data=4)
    step = make_score_step(CONFIG, mesh, block=16)
    batch = shard_rows(pad_batch(SAMPLES[:4], Shape(4, 160)), mesh)
    program = step.lower(replicate(PARAMS, mesh), batch).compile()
    assert program.output_shardings[0].flatness.spec == P("data")
    text = program.as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


def test_a_shape_is_traced_once(monkeypatch):
    traced = []
    original = score_module.score_hidden
    monkeypatch.setattr(score_module, "score_hidden", lambda *a: traced.append(a[3].shape) or original(*a))
    step = make_score_step.__wrapped__(CONFIG, make_mesh(data=1), block=16)
    for first, last, rows in [(0, 2, 2), (4, 5, 2), (0, 4, 4), (2, 4, 2)]:
        step(PARAMS, pad_batch(SAMPLES[first:last], Shape(rows, 160)))
    assert traced == [(2, 160), (4, 160)]


def test_the_same_arguments_give_the_same_program():
    step = make_score_step(CONFIG, make_mesh(data=1), block=16)
    assert make_score_step(CONFIG, make_mesh(data=1), block=16) is step
    assert make_score_step(CONFIG, make_mesh(data=1), block=32) is not step


class Killed(BaseException):
    pass


def kill_after(monkeypatch, parts):
    written = []
    original = parts_module.write_part

    def write(path, table):
        original(path, table)
        written.append(path)
        if len(written) == parts:
            raise Killed

    monkeypatch.setattr(parts_module, "write_part", write)


def test_a_killed_run_continues_to_the_same_bits(monkeypatch, tmp_path, table):
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            score(parts_dir=tmp_path, per_token=True, seconds_per_part=0.0)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "part-00002.parquet.tmp").write_bytes(b"cut sho")
    calls = []
    original = score_module.summarise
    monkeypatch.setattr(score_module, "summarise", lambda batch, *a: calls.extend(s.id for s in batch) or original(batch, *a))
    resumed = score(parts_dir=tmp_path, per_token=True, seconds_per_part=0.0)
    assert_equal_tables(resumed, table)
    for a, b in zip(resumed.tokens, table.tokens):
        np.testing.assert_array_equal(a.flatness, b.flatness)
        np.testing.assert_array_equal(a.entropy, b.entropy)
    assert 0 < len(calls) < len(SAMPLES)
    calls.clear()
    assert_equal_tables(score(parts_dir=tmp_path, per_token=True), table)
    assert not calls


def test_many_batches_share_a_part(tmp_path):
    score(parts_dir=tmp_path, seconds_per_part=3600.0)
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.parquet"]


def test_parts_of_another_run_are_refused(tmp_path):
    score(parts_dir=tmp_path, seconds_per_part=0.0, identity={"target": {"name": "toy", "fingerprint": "aa"}})
    with pytest.raises(ValueError, match=r"part-00000.*target.fingerprint: found 'aa', expected 'bb'.*delete"):
        score(parts_dir=tmp_path, identity={"target": {"name": "toy", "fingerprint": "bb"}})
    changed = [dataclasses.replace(SAMPLES[0], tokens=SAMPLES[0].tokens[::-1].copy()), *SAMPLES[1:]]
    with pytest.raises(ValueError, match="samples: found"):
        score(changed, parts_dir=tmp_path, identity={"target": {"name": "toy", "fingerprint": "aa"}})


def test_a_damaged_part_is_named(tmp_path):
    score(parts_dir=tmp_path, seconds_per_part=0.0)
    path = tmp_path / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"part-00001\.parquet: not a whole Parquet file.*delete it"):
        score(parts_dir=tmp_path)
    path.unlink()
    assert_equal_tables(score(parts_dir=tmp_path, seconds_per_part=0.0), score())


def test_a_broken_target_names_the_sample():
    broken = {**PARAMS, "head": {"kernel": PARAMS["head"]["kernel"].at[0, 5].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"sample s\d+: flatness at token \d+ is not a finite number.*weights"):
        score(params=broken)
    with pytest.raises(ValueError, match="no sample to score"):
        score([])


def score_and_keep(directory, stays, dtype="float32", **options):
    """The table; the store is in directory / "hidden", the parts in directory / "parts"."""
    place = dict(directory=directory / "hidden", identity={"t": 1}, kept_for={"x": 1})
    with keep_hidden(TARGET, stays, **place, dtype=dtype) as keeper:
        return score(keeper=keeper, parts_dir=directory / "parts", **{"seconds_per_part": 0.0, "batch_tokens": 256} | options)


def all_samples():
    return StillPossible(SAMPLES, [], 1.0, 0, always={sample.id for sample in SAMPLES})


def flattest(always=()):
    return StillPossible(SAMPLES, ["flatness"], 0.4, 0, always)


def stored(directory):
    store = HiddenStore.open(directory / "hidden", {"t": 1}, verify=True)
    return {name: np.array(store[name]) for name in store}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """(table, the hidden states of all samples), of one uninterrupted pass."""
    directory = tmp_path_factory.mktemp("everything")
    return score_and_keep(directory, all_samples()), stored(directory)


def test_hidden_states_can_be_stored_in_the_same_pass(everything):
    found, store = everything
    assert_equal_tables(found, score(batch_tokens=256))
    assert set(store) == {sample.id for sample in SAMPLES}
    for sample in SAMPLES[:4]:
        expected = hidden_alone(pad_tokens(sample))[0, : len(sample.tokens)]
        np.testing.assert_allclose(store[sample.id], expected, rtol=1e-4, atol=1e-5)


def test_one_pass_keeps_what_will_be_selected_and_what_is_held_out(everything, tmp_path):
    table, whole = everything
    found = score_and_keep(tmp_path, flattest(always={"s0", "s3"}))
    assert_equal_tables(found, table)
    assert (kept := stored(tmp_path)).keys() == {*select(table, 0.4).ids, "s0", "s3"} and len(kept) < len(SAMPLES)
    for name in kept:
        np.testing.assert_array_equal(kept[name], whole[name])


@pytest.mark.parametrize("parts", [2, 5])
def test_a_killed_pass_continues_to_the_same_store(everything, monkeypatch, tmp_path, parts):
    """Killed after some parts, its last shard lost or its last scores lost: what is missing is computed, and no more."""
    table, whole = everything
    with monkeypatch.context() as patch:
        kill_after(patch, parts)
        with pytest.raises(Killed):
            score_and_keep(tmp_path, flattest())
    if parts == 5:  # as if the store had come further than the scores
        sorted((tmp_path / "parts").iterdir())[-1].unlink()
    calls = []
    original = score_module.summarise
    monkeypatch.setattr(score_module, "summarise", lambda batch, *a: calls.extend(s.id for s in batch) or original(batch, *a))
    assert_equal_tables(score_and_keep(tmp_path, flattest()), table)
    assert 0 < len(calls) < len(SAMPLES)
    calls.clear()
    assert_equal_tables(score_and_keep(tmp_path, flattest()), table)
    assert not calls
    assert (kept := stored(tmp_path)).keys() == set(select(table, 0.4).ids)
    for name in kept:
        np.testing.assert_array_equal(kept[name], whole[name])


def test_finished_scores_and_a_lost_shard_compute_what_is_selected_alone(everything, monkeypatch, tmp_path):
    table, whole = everything
    score(parts_dir=tmp_path / "parts", batch_tokens=256)
    computed = []
    original = score_module.run_batches

    def counting(step, params, samples, plans, mesh, **rest):
        computed.append(len(plans))
        return original(step, params, samples, plans, mesh, **rest)

    monkeypatch.setattr(score_module, "run_batches", counting)
    for _ in range(2):
        score_and_keep(tmp_path, StillPossible(SAMPLES, ["flatness"], 0.1, 0))
    kept = stored(tmp_path)
    assert kept.keys() == set(select(table, 0.1).ids)
    assert 0 < computed[0] <= len(kept) and computed[1] == 0
    for name in kept:
        np.testing.assert_array_equal(kept[name], whole[name])
    (tmp_path / "hidden" / "shard-00000.bin").unlink()
    score_and_keep(tmp_path, StillPossible(SAMPLES, ["flatness"], 0.1, 0))
    assert 0 < computed[2] <= computed[0] and stored(tmp_path).keys() == kept.keys()


def test_features_in_bfloat16_are_rounded_once_wherever_that_happens(everything, tmp_path):
    _, whole = everything
    score_and_keep(tmp_path, all_samples(), dtype="bfloat16")
    for name, hidden in stored(tmp_path).items():
        np.testing.assert_array_equal(hidden, whole[name].astype(ml_dtypes.bfloat16))


def test_tables_come_back_from_their_files(tmp_path, table):
    write_scores(tmp_path / "scores.parquet", table)
    write_token_scores(tmp_path / "token_scores.parquet", table)
    found = read_scores(tmp_path / "scores.parquet", prompt_states=True)
    assert_equal_tables(found, table)
    assert read_scores(tmp_path / "scores.parquet").prompt_states is None
    assert found.identity == table.identity and found.identity["target"] == "toy" and found.tokens is None
    tokens = read_token_scores(tmp_path / "token_scores.parquet")
    assert list(tokens) == list(table.ids)
    for row, expected in zip(tokens.values(), table.tokens):
        np.testing.assert_array_equal(row.counted, expected.counted)
        np.testing.assert_array_equal(row.flatness, expected.flatness)
        np.testing.assert_array_equal(row.entropy, expected.entropy)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.parquet", "token_scores.parquet"]


def test_a_metric_is_added_in_one_place(monkeypatch, tmp_path):
    """The table of metrics is enough: it is then scored, joined, written, read, selected and known while scoring."""
    low = Metric("flattest tenth", "flatness", "small", "for the test", lambda values: np.quantile(values, 0.9))
    monkeypatch.setitem(METRICS, "flattest_tenth", low)
    samples = [sample for sample in SAMPLES if sample.counted.any()]
    possible = StillPossible(samples, ["flattest_tenth"], 0.3, 0)
    table = score_and_keep(tmp_path, possible, samples=samples, per_token=True)
    expected = [np.quantile(row.flatness[row.counted].astype(np.float64), 0.9) for row in table.tokens]
    np.testing.assert_allclose(table["flattest_tenth"], expected)
    write_scores(tmp_path / "scores.parquet", table)
    found = read_scores(tmp_path / "scores.parquet", prompt_states=True)
    np.testing.assert_array_equal(found["flattest_tenth"], table["flattest_tenth"])
    kept = select(found, 0.3, metric="flattest_tenth")
    worst = np.argsort(expected)[: len(kept.ids)]
    assert set(kept.ids) == {samples[i].id for i in worst} == stored(tmp_path).keys()
    monkeypatch.undo()
    found = read_scores(tmp_path / "scores.parquet", prompt_states=True)
    assert_equal_tables(found, dataclasses.replace(table, metrics={n: table[n] for n in column_names()}))


def test_a_bad_scores_file_is_named(tmp_path, table):
    path = tmp_path / "scores.parquet"
    with pytest.raises(FileNotFoundError, match=r"scores\.parquet: no such file; run `jsfdd score`"):
        read_scores(path)
    write_token_scores(path, table)
    with pytest.raises(ValueError, match="has no column source, num_tokens, flatness_median"):
        read_scores(path)
    write_scores(path, dataclasses.replace(table, ids=("s0",) * len(table.ids)))
    with pytest.raises(ValueError, match="an id occurs more than once"):
        read_scores(path)
