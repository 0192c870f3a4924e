"""The store of hidden states: what was closed survives anything, and nothing damaged is taken for whole."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from jsfdd.base.files import read_json
from jsfdd.hidden import writer as store_writer
from jsfdd.hidden.rows import decode, encode
from jsfdd.hidden.store import HiddenStore
from jsfdd.hidden.writer import HiddenWriter

WIDTH = 16
IDENTITY = {"target": {"fingerprint": "aa"}, "lengths": (1, 2)}


def rows(seed, length):
    return np.random.default_rng(seed).normal(size=(length, WIDTH)).astype(np.float32)


HIDDEN = {f"s{i}": rows(i, 3 + 5 * i) for i in range(6)}
SHARD_BYTES = 2000  # two or so samples


def fill(directory, names=HIDDEN, dtype="float32"):
    with HiddenWriter(directory, WIDTH, dtype, IDENTITY, SHARD_BYTES) as writer:
        for name in names:
            if name not in writer.ids:
                writer.add(name, HIDDEN[name])


def assert_whole(directory, names=HIDDEN, dtype=np.float32):
    store = HiddenStore.open(directory, IDENTITY, verify=True)
    assert set(store) == set(names) and len(store) == len(names)
    for name in names:
        assert store[name].dtype == dtype
        np.testing.assert_array_equal(store[name], HIDDEN[name].astype(dtype))


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("dtype, kind", [("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)])
def test_what_goes_in_comes_out(tmp_path, dtype, kind):
    fill(tmp_path, dtype=dtype)
    assert_whole(tmp_path, dtype=kind)
    shards = sorted(path.name for path in tmp_path.glob("*.bin"))
    assert shards == ["shard-00000.bin", "shard-00001.bin"]
    size = sum(path.stat().st_size for path in tmp_path.glob("*.bin"))
    assert size == sum(hidden.size for hidden in HIDDEN.values()) * np.dtype(kind).itemsize
    store = HiddenStore.open(tmp_path, IDENTITY)
    with pytest.raises(KeyError):
        store["none"]
    with pytest.raises(ValueError, match="read-only"):
        store["s0"][0] = 1


def test_a_kill_loses_the_open_shard_at_most_and_the_next_writer_goes_on(tmp_path):
    fill(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        with HiddenWriter(tmp_path / "cut", WIDTH, "float32", IDENTITY, SHARD_BYTES) as writer:
            for name in list(HIDDEN)[:5]:
                writer.add(name, HIDDEN[name])
            raise RuntimeError
    closed = set(HiddenStore.open(tmp_path / "cut", IDENTITY, verify=True))
    assert closed == {"s0", "s1", "s2", "s3"}  # s4 alone does not fill a shard
    assert not list((tmp_path / "cut").glob("*.tmp"))
    (tmp_path / "cut" / "open-shard-0.tmp").write_bytes(b"what SIGKILL left")
    fill(tmp_path / "cut")
    assert_whole(tmp_path / "cut")
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_kill_between_shard_and_manifest_is_harmless(tmp_path, monkeypatch):
    def killed(*_):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, SHARD_BYTES) as writer:
            writer.add("s1", HIDDEN["s1"])
            writer.add("s0", HIDDEN["s0"])
            monkeypatch.setattr(store_writer, "write_manifest", killed)
            writer.close()
    monkeypatch.undo()
    assert (tmp_path / "shard-00000.bin").exists()
    assert_whole(tmp_path, names=[])
    fill(tmp_path)
    assert_whole(tmp_path)


def test_a_truncated_shard_is_named_and_its_samples_can_be_stored_anew(tmp_path):
    fill(tmp_path)
    shard = tmp_path / "shard-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    for open_it in (lambda: HiddenStore.open(tmp_path, IDENTITY), lambda: fill(tmp_path)):
        with pytest.raises(ValueError, match=r"shard-00001\.bin: \d+ bytes instead of \d+; delete this shard and store"):
            open_it()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.bin: missing; store again"):
        HiddenStore.open(tmp_path, IDENTITY)
    fill(tmp_path)
    assert_whole(tmp_path)


def test_a_corrupt_byte_is_found(tmp_path):
    fill(tmp_path)
    shard = tmp_path / "shard-00000.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    store = HiddenStore.open(tmp_path, IDENTITY)
    with pytest.raises(ValueError, match=r"shard-00000\.bin: its checksum is wrong; delete this shard"):
        store["s0"]  # the byte is of another sample
    with pytest.raises(ValueError, match=r"shard-00000\.bin: its checksum is wrong; delete this shard"):
        HiddenStore.open(tmp_path, IDENTITY, verify=True)


def test_a_store_of_another_run_is_refused(tmp_path):
    fill(tmp_path)
    other = {**IDENTITY, "target": {"fingerprint": "bb"}}
    with pytest.raises(ValueError, match="identity.target.fingerprint: found 'aa', expected 'bb'.*delete the directory"):
        HiddenStore.open(tmp_path, other)
    with pytest.raises(ValueError, match="another run"):
        HiddenWriter(tmp_path, WIDTH, "float32", other)
    with pytest.raises(ValueError, match="dtype: found 'float32', expected 'bfloat16'"):
        HiddenWriter(tmp_path, WIDTH, "bfloat16", IDENTITY)
    with pytest.raises(ValueError, match="hidden_size: found 16, expected 8"):
        HiddenWriter(tmp_path, 8, "float32", IDENTITY)
    with pytest.raises(FileNotFoundError, match="is not a store"):
        HiddenStore.open(tmp_path / "none", IDENTITY)


@pytest.mark.parametrize("change", [
    lambda m: m["shards"][0].update(file="../../etc/passwd"),
    lambda m: m["shards"][0].update(file=m["shards"][1]["file"]),
    lambda m: m["shards"][0].update(samples=[["s0"]]),
    lambda m: m["shards"][0].pop("samples"),
    lambda m: m["shards"][0]["samples"].append([["a", "b"], 3]),
    lambda m: m["shards"][0]["samples"].append(["s0", -3]),
    lambda m: m["shards"][0].pop("sha256"),
    lambda m: m.update(dtype="float8"),
    lambda m: m.update(hidden_size=-1),
    lambda m: m.update(identity="aa"),
    lambda m: m.update(shards=None),
])  # fmt: skip
def test_a_hostile_manifest_is_refused(tmp_path, change):
    fill(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = read_json(path)
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json.*not a manifest.*delete the directory"):
        HiddenStore.open(tmp_path, IDENTITY)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: damaged.*delete the directory"):
        HiddenStore.open(tmp_path, IDENTITY)


def test_bad_hidden_states_are_refused(tmp_path):
    with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY) as writer:
        writer.add("s0", HIDDEN["s0"])
        with pytest.raises(ValueError, match="already in"):
            writer.add("s0", HIDDEN["s0"])
        with pytest.raises(ValueError, match=r"sample x: hidden states of shape \(3, 8\) in a store of \[T, 16\]"):
            writer.add("x", np.zeros((3, 8), np.float32))
        with pytest.raises(ValueError, match="sample x: .*not finite"):
            writer.add("x", np.full((3, WIDTH), np.inf, np.float32))
    assert_whole(tmp_path, names=["s0"])


def test_int8_takes_half_of_bfloat16s_disk_and_gives_float32_back(tmp_path):
    for dtype in ("int8", "bfloat16"):
        fill(tmp_path / dtype, dtype=dtype)
    sizes = {dtype: sum(path.stat().st_size for path in (tmp_path / dtype).glob("*.bin")) for dtype in ("int8", "bfloat16")}
    assert sizes["int8"] / sizes["bfloat16"] == (WIDTH + 4) / (2 * WIDTH)
    store = HiddenStore.open(tmp_path / "int8", IDENTITY, verify=True)
    for name, hidden in HIDDEN.items():
        assert store[name].dtype == np.float32
        np.testing.assert_array_equal(store[name], decode(encode(hidden, "int8"), "int8"))


# --- Dropping samples ------------------------------------------------------------------------------------------------

MANY = {f"m{i:02}": rows(i, 1 + i % 7) for i in range(60)}


def disk(directory):
    return sum(path.stat().st_size for path in directory.iterdir() if path.suffix in (".bin", ".tmp"))


def live(names):
    return sum(MANY[name].nbytes for name in names)


def assert_holds(directory, names):
    store = HiddenStore.open(directory, IDENTITY, verify=True)
    assert set(store) == set(names)
    for name in names:
        np.testing.assert_array_equal(store[name], MANY[name])


def test_dropped_samples_give_their_disk_back(tmp_path):
    """After each drop at most a tenth is dead, and what stays is what it was, through shards that are rewritten."""
    random, kept = np.random.default_rng(0), []
    with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, 600) as writer:
        for name, hidden in MANY.items():
            writer.add(name, hidden)
            kept.append(name)
            if len(kept) > 20:
                kept.remove(dropped := str(random.choice(kept)))
                writer.drop([dropped])
                assert set(writer.ids) == set(kept)
                writer._stream is None or writer._stream.flush()
                assert disk(tmp_path) <= 1.1 * live(kept)
        with pytest.raises(KeyError):
            writer.drop([dropped])
    assert_holds(tmp_path, kept)
    assert disk(tmp_path) <= 1.1 * live(kept)
    with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, 600) as writer:
        writer.add(dropped, MANY[dropped])
        writer.drop(kept)
    assert_holds(tmp_path, [dropped])
    with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, 600) as writer:
        writer.drop([dropped])
    assert_holds(tmp_path, [])
    assert disk(tmp_path) == 0


def test_a_drop_without_rewriting_is_remembered(tmp_path):
    names = list(MANY)[:40]
    with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, 600) as writer:
        for name in names:
            writer.add(name, MANY[name])
    before = disk(tmp_path)
    with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, 600) as writer:
        writer.drop(names[3:4])
    assert disk(tmp_path) == before  # a tenth is not reached
    assert_holds(tmp_path, [name for name in names if name != names[3]])


@pytest.mark.parametrize("moment", ["the shard renamed", "the manifest written", "before the old shard is deleted"])
def test_a_kill_while_a_shard_is_rewritten_loses_nothing_that_stays(tmp_path, monkeypatch, moment):
    names = list(MANY)[:24]

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, 600) as writer:
        for name in names:
            writer.add(name, MANY[name])
    writer = HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, 600)
    with monkeypatch.context() as patch:
        if moment == "the shard renamed":
            patch.setattr(store_writer, "write_manifest", killed)
        elif moment == "the manifest written":
            original = store_writer.write_manifest
            patch.setattr(store_writer, "write_manifest", lambda *a: (original(*a), killed()))
        else:
            patch.setattr(type(tmp_path), "unlink", killed)
        with pytest.raises(Killed):
            writer.drop(names[:4])
    stored = set(HiddenStore.open(tmp_path, IDENTITY, verify=True))
    assert set(names[4:]) <= stored <= set(names)
    with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, 600) as writer:
        writer.drop([name for name in names[:4] if name in writer.ids])
        assert disk(tmp_path) <= 1.1 * live(names[4:])  # nor does anything else stay
    assert_holds(tmp_path, names[4:])


def test_a_damaged_shard_is_not_rewritten_with_a_checksum_of_its_own(tmp_path):
    fill(tmp_path)
    shard = tmp_path / "shard-00000.bin"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00000\.bin: its checksum is wrong; delete this shard"):
        with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, SHARD_BYTES) as writer:
            writer.drop(["s0", "s1"])


def test_a_store_kept_for_something_else_is_refused(tmp_path):
    rule = {"keep_features": ("flatness",), "retain_ratio": 0.5}
    with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, kept_for=rule) as writer:
        writer.add("s0", HIDDEN["s0"])
    assert HiddenStore.open(tmp_path, IDENTITY).kept_for == {"keep_features": ["flatness"], "retain_ratio": 0.5}
    with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, kept_for=rule) as writer:
        assert "s0" in writer.ids
    with pytest.raises(ValueError, match=r"kept_for.retain_ratio: found 0.5, expected 0.25.*delete the directory"):
        HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, kept_for=rule | {"retain_ratio": 0.25})


def test_the_running_totals_are_the_sums_over_all_samples(tmp_path):
    random, kept = np.random.default_rng(2), []
    for _ in range(2):  # a second writer goes on from the manifest
        with HiddenWriter(tmp_path, WIDTH, "float32", IDENTITY, 600) as writer:
            for name in [name for name in MANY if name not in writer.ids][:40]:
                writer.add(name, MANY[name])
                kept.append(name)
                if len(kept) > 15:
                    kept.remove(dropped := str(random.choice(kept)))
                    writer.drop([dropped])
                shards = (*writer._closed, writer._open)
                assert writer._tokens == sum(length for shard in shards for _, length in shard.samples)
                assert writer._dead == sum(length for shard in shards for name, length in shard.samples if name is None)
