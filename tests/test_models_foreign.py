"""A target of another library: our own target behind a function scores, is kept and is selected as itself."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy import loaded_target, toy_config, toy_target

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import Sample
from jsfdd.hidden.best_k import StillPossible
from jsfdd.hidden.capture import keep_hidden, store_hidden
from jsfdd.hidden.store import HiddenStore
from jsfdd.models.foreign import foreign_target
from jsfdd.models.target import hidden_states
from jsfdd.scoring.metrics import column_names
from jsfdd.scoring.score import score_samples
from jsfdd.selection.sfdd import select

TARGET = loaded_target()
EMBEDDING, HEAD = TARGET.params["embed"]["embedding"], TARGET.params["head"]["kernel"].T


@jax.jit
def forward(tokens):
    return hidden_states(TARGET.config, TARGET.params, tokens)


FOREIGN = foreign_target(forward, EMBEDDING, HEAD, TARGET.config, name="ours, wrapped")


def make_samples(number=11):
    random = np.random.default_rng(0)
    samples = []
    for i in range(number):
        length = int(random.integers(6, 90))
        mask = np.arange(length) >= length // 3
        samples.append(Sample(f"s{i}", "x", random.integers(0, 258, length).astype(np.int32), mask))
    return samples


SAMPLES = make_samples()
OPTIONS = dict(batch_tokens=256, progress=False)


@pytest.mark.parametrize("devices", [1, 4])
def test_it_scores_as_our_own(devices):
    mesh = make_mesh(data=devices)
    expected = score_samples(TARGET, SAMPLES, mesh, per_token=True, **OPTIONS)
    table = score_samples(FOREIGN, SAMPLES, mesh, per_token=True, **OPTIONS)
    assert table.ids == expected.ids and table.identity["target"] == FOREIGN.fingerprint
    for name in column_names():
        np.testing.assert_allclose(table[name], expected[name], rtol=1e-5, err_msg=name)
    for row, other in zip(table.tokens, expected.tokens):
        np.testing.assert_allclose(row.flatness, other.flatness, rtol=1e-4, atol=1e-6)


def test_its_hidden_states_are_kept_while_scoring_and_stored_by_themselves(tmp_path):
    mesh = make_mesh(data=2)
    possible = StillPossible(SAMPLES, ["flatness"], 0.5, 0)
    with keep_hidden(FOREIGN, possible, directory=tmp_path / "kept", identity={}, kept_for={}, dtype="float32") as keeper:
        table = score_samples(FOREIGN, SAMPLES, mesh, keeper=keeper, **OPTIONS)
    kept = HiddenStore.open(tmp_path / "kept", {})
    assert set(kept) == set(select(table, 0.5).ids)
    whole = store_hidden(FOREIGN, SAMPLES, mesh, directory=tmp_path / "whole", dtype="float32", **OPTIONS)
    own = store_hidden(TARGET, SAMPLES, mesh, directory=tmp_path / "own", dtype="float32", **OPTIONS)
    for sample in SAMPLES:
        np.testing.assert_allclose(whole[sample.id], own[sample.id], rtol=1e-4, atol=1e-5)
    for name in kept:
        np.testing.assert_allclose(kept[name], whole[name], rtol=1e-5, atol=1e-6)


def test_it_may_have_a_mesh_of_its_own():
    """Parameters and states on other devices than those that score."""
    theirs = jax.make_mesh((2,), ("x",), devices=jax.devices()[2:])
    params = jax.device_put(TARGET.params, NamedSharding(theirs, P()))
    states = jax.jit(
        lambda params, tokens: hidden_states(TARGET.config, params, tokens),
        out_shardings=NamedSharding(theirs, P(None, None, "x")),
    )
    foreign = foreign_target(lambda tokens: states(params, tokens), EMBEDDING, HEAD, TARGET.config)
    mesh = make_mesh(data=2)
    assert not set(mesh.devices.flat) & set(theirs.devices.flat)
    expected = score_samples(TARGET, SAMPLES, mesh, **OPTIONS)
    np.testing.assert_allclose(score_samples(foreign, SAMPLES, mesh, **OPTIONS)["flatness"], expected["flatness"], rtol=1e-5)


def test_hidden_states_that_are_there_are_scored_without_the_target(tmp_path):
    store = store_hidden(TARGET, SAMPLES, make_mesh(data=2), directory=tmp_path, dtype="float32", **OPTIONS)
    only_a_head = foreign_target(None, EMBEDDING, HEAD, TARGET.config, name="head")
    expected = score_samples(TARGET, SAMPLES, make_mesh(data=2), **OPTIONS)
    for target in (TARGET, only_a_head):
        table = score_samples(target, SAMPLES, make_mesh(data=2), hidden=store, **OPTIONS)
        for name in column_names():
            np.testing.assert_allclose(table[name], expected[name], rtol=1e-5, err_msg=name)
    with pytest.raises(ValueError, match="head: has no function for hidden states"):
        score_samples(only_a_head, SAMPLES, make_mesh(data=2), **OPTIONS)
    wrong = {name: store[name] for name in store} | {"s1": store["s1"][:-1]}
    with pytest.raises(ValueError, match=r"sample s1: hidden states \[\d+, 32\] are needed, found \(\d+, 32\)"):
        score_samples(only_a_head, SAMPLES, make_mesh(data=2), hidden=wrong, **OPTIONS)
    del wrong["s1"]
    with pytest.raises(ValueError, match="found nothing"):
        score_samples(only_a_head, SAMPLES, make_mesh(data=2), hidden=wrong, **OPTIONS)


def test_a_tied_head_is_the_embedding():
    config, params = toy_target(tie_embeddings=True)
    states = jax.jit(lambda tokens: hidden_states(config, params, tokens))
    foreign = foreign_target(states, params["embed"]["embedding"], None, config)
    samples = [Sample("a", "x", np.arange(9, dtype=np.int32), np.ones(9, bool))]
    table = score_samples(foreign, samples, make_mesh(data=1), **OPTIONS)
    expected = score_samples(TARGET._replace(config=config, params=params), samples, make_mesh(data=1), **OPTIONS)
    np.testing.assert_allclose(table["flatness"], expected["flatness"], rtol=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"the head is \(32, 258\).*\[vocab_size, hidden_size\] = \(258, 32\)"):
        foreign_target(forward, EMBEDDING, HEAD.T, TARGET.config)
    with pytest.raises(ValueError, match="tie_embeddings is False, so the head must be given"):
        foreign_target(forward, EMBEDDING, None, TARGET.config)
    with pytest.raises(ValueError, match="tie_embeddings is True, so the head must be None"):
        foreign_target(forward, EMBEDDING, HEAD, toy_config(vocab_size=258, tie_embeddings=True))
    before_the_norm = foreign_target(lambda tokens: forward(tokens)[:, :-1], EMBEDDING, HEAD, TARGET.config, name="mine")
    with pytest.raises(ValueError, match=r"mine: hidden_states gave .* it must give \(\d+, \d+, 32\)"):
        score_samples(before_the_norm, SAMPLES, make_mesh(data=1), **OPTIONS)


def test_the_fingerprint_changes_with_the_weights_alone():
    again = foreign_target(forward, EMBEDDING, HEAD, TARGET.config)
    assert again.fingerprint == FOREIGN.fingerprint
    assert foreign_target(forward, EMBEDDING, HEAD.at[0, 0].add(1), TARGET.config).fingerprint != FOREIGN.fingerprint
    assert foreign_target(forward, EMBEDDING, HEAD, TARGET.config, fingerprint="v1").fingerprint == "v1"
