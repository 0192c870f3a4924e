"""The store of hidden states: what was closed survives anything, and nothing damaged is taken for whole."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from toy import toy_config

from jsfdd.mesh import make_mesh
from jsfdd.models.target import hidden_states, init_params
from jsfdd.records import Sample
from jsfdd.selection import features
from jsfdd.selection.features import HiddenStore, HiddenWriter, store_hidden

WIDTH = 16
CONFIG = toy_config(vocab_size=97, hidden_size=WIDTH, num_layers=1)
PARAMS = init_params(CONFIG, jax.random.key(0))
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
            monkeypatch.setattr(features, "written_whole", killed)
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
    HiddenStore.open(tmp_path, IDENTITY)
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
    lambda m: m.update(dtype="float8"),
    lambda m: m.update(identity="aa"),
    lambda m: m.update(shards=None),
])  # fmt: skip
def test_a_hostile_manifest_is_refused(tmp_path, change):
    fill(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest.*delete the directory"):
        HiddenStore.open(tmp_path, IDENTITY)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest"):
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


def make_samples():
    random = np.random.default_rng(0)
    samples = []
    for i in range(12):
        tokens = random.integers(0, CONFIG.vocab_size, int(random.integers(3, 120))).astype(np.int32)
        samples.append(Sample(f"s{i}", "x", tokens, np.ones(len(tokens), bool)))
    return samples


@jax.jit
def forward(tokens):
    return hidden_states(CONFIG, PARAMS, tokens)


def hidden_alone(tokens):
    return forward(jnp.pad(tokens, (0, 128 - len(tokens)))[None, :])[0, : len(tokens)]


@pytest.mark.parametrize("devices", [1, 4])
def test_store_hidden_stores_the_targets_hidden_states_and_computes_only_what_is_missing(tmp_path, monkeypatch, devices):
    samples, mesh = make_samples(), make_mesh(data=devices)
    options = dict(batch_tokens=256, directory=tmp_path, identity=IDENTITY, shard_bytes=4000, progress=False)
    first = store_hidden(CONFIG, PARAMS, samples, mesh, dtype="float32", **options)
    assert set(first) == {sample.id for sample in samples}
    for sample in samples:
        np.testing.assert_allclose(first[sample.id], hidden_alone(sample.tokens), rtol=1e-4, atol=1e-5)
    before = {name: np.array(first[name]) for name in first}
    lost = json.loads((tmp_path / "manifest.json").read_text())["shards"][1]
    (tmp_path / lost["file"]).unlink()
    batches = []
    original = features.run_batches

    def counting(step, params, samples, plans, mesh, **rest):
        batches.append(len(plans))
        return original(step, params, samples, plans, mesh, **rest)

    monkeypatch.setattr(features, "run_batches", counting)
    again = store_hidden(CONFIG, PARAMS, samples, mesh, dtype="float32", **options)
    for name in before:
        np.testing.assert_array_equal(again[name], before[name])
    store_hidden(CONFIG, PARAMS, samples, mesh, dtype="float32", **options)
    assert batches[0] > 0 and batches[1] == 0


def test_store_hidden_in_bfloat16_rounds_once(tmp_path):
    samples, mesh = make_samples()[:3], make_mesh(data=1)
    options = dict(batch_tokens=256, identity=IDENTITY, progress=False)
    exact = store_hidden(CONFIG, PARAMS, samples, mesh, directory=tmp_path / "a", dtype="float32", **options)
    rounded = store_hidden(CONFIG, PARAMS, samples, mesh, directory=tmp_path / "b", dtype="bfloat16", **options)
    for name in exact:
        np.testing.assert_array_equal(rounded[name], np.asarray(exact[name]).astype(ml_dtypes.bfloat16))
