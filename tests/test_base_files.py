"""Files: whole or not at all, and records read back strictly."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest

from jsfdd.base.files import decode, read_json, write_json, written_whole


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str
    share: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    kind: Literal["a", "b"]
    inner: Inner | None
    parts: tuple[Inner, ...]
    sizes: tuple[int, ...]
    paths: tuple[Path, ...]
    out: Path | None = None
    shares: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count is {self.count}; take 0 or more")


FULL = Outer(3, "a", Inner("x", 1.0), (Inner("y"), Inner("z")), (1, 2), (Path("a/b"),), Path("c"), {"s": 0.25})


def as_json(record) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(record), default=str))


@pytest.mark.parametrize("record", [FULL, Outer(0, "b", None, (), (), ())])
def test_decode_undoes_asdict(record):
    assert decode(Outer, as_json(record), "f.json") == record


def changed(**values):
    return as_json(FULL) | values


@pytest.mark.parametrize(
    "values, field",
    [
        (changed(count="3"), "count is '3'"),
        (changed(count=True), "count is True"),
        (changed(count=2.5), "count is 2.5"),
        (changed(count=-1), "count is -1"),
        (changed(kind="c"), "kind is 'c'"),
        (changed(sizes=[1, "2"]), "sizes[1] is '2'"),
        (changed(sizes=7), "sizes is 7"),
        (changed(paths=[7]), "paths"),
        (changed(out=["c"]), "out"),
        (changed(inner={"name": "x"}), "missing: inner.share"),
        (changed(inner={"name": "x", "share": None}), "inner.share is None"),
        (changed(inner={"name": "x", "share": 1.0, "more": 1}), "unknown: inner.more"),
        (changed(inner=[]), "inner"),
        (changed(parts=[{"name": "x", "share": 1.0}, {"nome": "x", "share": 1.0}]), "parts.1.nome"),
        (changed(parts=["x"]), "parts.0"),
        (changed(shares={"s": "much"}), "shares"),
        (changed(new=1), "unknown: new"),
        ({k: v for k, v in as_json(FULL).items() if k != "shares"}, "missing: shares"),
        ([1], "Outer is [1]"),
        (None, "Outer is None"),
    ],
)
def test_decode_names_file_and_field(values, field):
    with pytest.raises(ValueError) as error:
        decode(Outer, values, "some/f.json")
    assert "some/f.json: " in str(error.value) and field in str(error.value)


def test_what_people_write_may_leave_defaults_out():
    values = {"count": 1, "kind": "a", "inner": {"name": "x"}, "parts": [], "sizes": [], "paths": []}
    assert decode(Outer, values, "f", partial=True) == Outer(1, "a", Inner("x"), (), (), ())
    with pytest.raises(ValueError, match="missing: kind"):
        decode(Outer, {k: v for k, v in values.items() if k != "kind"}, "f", partial=True)
    with pytest.raises(ValueError, match="unknown: inner.nme"):
        decode(Outer, values | {"inner": {"name": "x", "nme": 1}}, "f", partial=True)


@pytest.mark.parametrize("text", [b'{"a": 1', b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b""])
def test_a_damaged_file_is_named_with_a_remedy(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"x\.json: damaged.*run again"):
        read_json(tmp_path / "x.json")


def test_a_missing_file_and_another_kind_of_value_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.json: no such file"):
        read_json(tmp_path / "x.json")
    write_json(tmp_path / "x.json", [1])
    assert read_json(tmp_path / "x.json") == [1]
    with pytest.raises(ValueError, match=r"x\.json: expected a JSON object, got list; take another"):
        read_json(tmp_path / "x.json", dict, remedy="take another")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), written_whole(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_object_that_was_changed_since_is_refused(tmp_path):
    path, values = tmp_path / "x.json", {"é": [1, 2.5e-300, None, True], "b": {"c": "d"}}
    write_json(path, values)
    data = path.read_bytes()
    assert read_json(path) == values
    for place in range(len(data)):
        for bit in (0, 4):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            try:
                assert {key: value for key, value in read_json(path).items() if "sha256" not in key} == values or (
                    b"sha256_of_the_rest" not in changed
                )
            except ValueError as error:
                assert "x.json" in str(error)
    path.write_text(json.dumps(values))  # as a person writes it
    assert read_json(path) == values
