"""Where hidden states come from: a pass of its own, the scoring pass that keeps what can be selected, or each training step."""

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
from jsfdd.selection.features import store_hidden

CONFIG = toy_config(vocab_size=97, hidden_size=16, num_layers=1)
PARAMS = init_params(CONFIG, jax.random.key(0))
IDENTITY = {"target": {"fingerprint": "aa"}, "lengths": (1, 2)}


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
