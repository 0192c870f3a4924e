"""The target's likeliest tokens: what a row holds, and what training on coarse outcomes comes to, against the definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jsfdd.training.distances import DISTANCES, coarse
from jsfdd.training.soft_rows import num_outcomes, pack, row_words, unpack
from jsfdd.training.soft_top_k import top_outcomes
from jsfdd.training.token_loss import Distance
from jsfdd.training.visited_loss import Exact, TopK, visited_loss

RANDOM = np.random.default_rng(0)
V = 23
HEAD, TRUTH, PREDICTED = (RANDOM.normal(size=shape) for shape in ((V, 6), (5, 6), (5, 6)))
WEIGHT = np.array([1.0, 0.0, 0.25, 2.0, 0.0])
VOCABULARY = np.array([0, 2, 3, 7, 11, 12, 20])


def outcomes_of(k, vocabulary=None):
    """(log p of the outcomes [5, M], ids [5, k]) by their definition, in float64."""
    p = scipy.special.softmax(TRUTH @ HEAD.T, axis=1)
    proposed = p if vocabulary is None else p[:, vocabulary]
    ids = np.argsort(-proposed, axis=1)[:, :k]
    top = np.take_along_axis(proposed, ids, axis=1)
    tail = proposed.sum(axis=1, keepdims=True) - top.sum(axis=1, keepdims=True)
    # Of all tokens nothing is left; the difference of the two sums would be rounding.
    parts = [top, np.where(k == proposed.shape[1], 0, tail)]
    if vocabulary is not None:
        parts.append(1 - proposed.sum(axis=1, keepdims=True))
    return np.log(np.maximum(np.concatenate(parts, axis=1), 1e-300)), ids


def exact(name, predicted, k, top_k_weight):
    """Each token's distance between coarse outcomes by its definition, in float64."""
    log_p, ids = outcomes_of(k)
    q = scipy.special.softmax(predicted @ HEAD.T, axis=1)
    q = np.take_along_axis(q, ids, axis=1)
    q = np.concatenate([q, 1 - q.sum(axis=1, keepdims=True)], axis=1)
    p, log_q = np.exp(log_p), np.log(q)
    cross_entropy, variation = -np.sum(p * log_q, axis=1), 0.5 * np.abs(p - q).sum(axis=1)
    values = {
        "cross_entropy": cross_entropy,
        "reverse_kl": np.sum(q * (log_q - log_p), axis=1),
        "total_variation": variation,
        "hybrid": cross_entropy + variation,
    }[name]
    return values - top_k_weight * np.sum((p * log_q)[:, :2], axis=1)


@pytest.mark.parametrize("name, top_k_weight", [*((name, 0.0) for name in DISTANCES), ("cross_entropy", 0.5)])
def test_value_is_the_definition_and_gradient_its_slope(name, top_k_weight):
    distance = Distance(name, 2, top_k_weight)
    log_p, ids = outcomes_of(4)
    with jax.enable_x64(True):

        def loss(predicted):
            head, known, weight = jax.tree.map(jnp.asarray, (HEAD, (log_p, ids), WEIGHT))
            return visited_loss(TopK(distance), 2, head, predicted, known, weight)["minimised"]

        def weighted(predicted):
            return np.sum(WEIGHT * exact(name, predicted, 4, top_k_weight))

        value, gradient = jax.device_get(jax.jit(jax.value_and_grad(loss))(PREDICTED))
        assert float(value) == pytest.approx(weighted(PREDICTED), rel=1e-5)
        step = 1e-6
        for index in np.ndindex(*PREDICTED.shape):
            moved = np.zeros(PREDICTED.shape)
            moved[index] = step
            slope = (weighted(PREDICTED + moved) - weighted(PREDICTED - moved)) / (2 * step)
            assert gradient[index] == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert np.abs(gradient).max() > 0.01 and np.all(gradient[np.array([1, 4])] == 0)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("vocabulary", [None, VOCABULARY], ids=["all tokens", "draft vocabulary"])
def test_of_all_tokens_nothing_is_lost(name, vocabulary):
    whole = vocabulary is None
    size = V if whole else len(vocabulary)
    distance = Distance(name)
    head, truth, predicted, weight = (jnp.asarray(x, jnp.float32) for x in (HEAD, TRUTH, PREDICTED, WEIGHT))
    log_p, ids = (jnp.asarray(x) for x in outcomes_of(size, vocabulary))
    own = head if whole else head[vocabulary]
    exactly = Exact(distance, () if whole else tuple(vocabulary.tolist()))

    def by_outcomes(predicted):
        sums = visited_loss(TopK(distance), 2, own, predicted, (log_p.astype(jnp.float32), ids), weight)
        return sums["minimised"], sums

    def by_target(predicted):
        sums = visited_loss(exactly, 2, own, predicted, (head, truth), weight)
        return sums["minimised"], sums

    ((_, found), slope), ((_, expected), expected_slope) = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(predicted) for f in (by_outcomes, by_target)
    )
    np.testing.assert_allclose(slope, expected_slope, atol=1e-5)
    assert found.keys() == {"minimised", "counted", "distance", "agreement" if whole else "coverage"}
    for sum_name, value in found.items():
        np.testing.assert_allclose(value, expected[sum_name], rtol=1e-5)


LOGITS = arrays(np.float32, (9, 2), elements=st.floats(-8, 8, width=32))


@functools.partial(jax.jit, static_argnums=2)
def all_distances(target, draft, k):
    """[distances, 2]: each between the k likeliest tokens and the tail, or, for None, between all tokens."""
    if k is not None:
        likeliest = jax.lax.top_k(target, k, axis=0)[1]
        target, draft = (coarse(z, likeliest, axis=0) for z in (target, draft))
        target = jnp.maximum(target, -65504.0)  # as a row has it: of a target −inf is no logit
    return jnp.stack([distance(target, draft, axis=0) for distance in DISTANCES.values()])


@settings(deadline=None)
@given(LOGITS, LOGITS, st.sampled_from([0, 1, 4, 9]))
def test_joined_outcomes_are_never_farther_apart(target, draft, k):
    """The data-processing inequality, from k tokens to a few more to all; of the cross entropy too, −log being convex."""
    few, some, whole = (all_distances(target, draft, n) for n in (k, min(k + 4, 9), None))
    for nearer, farther in ((few, some), (some, whole)):
        assert np.all(nearer <= farther + 1e-5 * (1 + farther))  # of 17 nats float32 knows 2e-6


def test_metrics_that_coarse_outcomes_do_not_tell_are_not_told():
    log_p, ids = outcomes_of(3)
    head, predicted, log_p, weight = (jnp.asarray(x, jnp.float32) for x in (HEAD, PREDICTED, log_p, WEIGHT))
    sums = visited_loss(TopK(Distance()), 2, head, predicted, (log_p, jnp.asarray(ids)), weight)
    agrees = np.argmax(TRUTH @ HEAD.T, axis=1) == np.argmax(PREDICTED @ HEAD.T, axis=1)
    assert sums["agreement"] == np.sum(WEIGHT * agrees) and sums["counted"] == WEIGHT.sum()
    assert sums.keys() == {"minimised", "counted", "distance", "agreement"}


@pytest.mark.parametrize("vocabulary", [None, VOCABULARY], ids=["all tokens", "draft vocabulary"])
def test_rows_are_the_targets_likeliest_tokens(vocabulary):
    head, truth, weight = (jnp.asarray(x, jnp.float32) for x in (HEAD, TRUTH, WEIGHT))
    rows = top_outcomes(3, 2, head, truth, weight, () if vocabulary is None else tuple(vocabulary.tolist()))
    assert rows.shape == (5, row_words(3, V, 0 if vocabulary is None else 7)) and rows.dtype == jnp.uint16
    log_probs, ids = unpack(rows, 3, num_outcomes(3, vocabulary is not None))
    expected_log_p, expected_ids = outcomes_of(3, vocabulary)
    for token in np.flatnonzero(WEIGHT):
        np.testing.assert_array_equal(ids[token], expected_ids[token])
        np.testing.assert_allclose(log_probs[token], expected_log_p[token], rtol=2**-11, atol=1e-5)
    assert not np.any(rows[WEIGHT == 0])


def test_a_certain_target_has_a_tail_of_nothing_and_trains():
    """A tail that float32's exp takes for 0, one that is exactly none, and logits in the thousands."""
    head, truth = jnp.array([[1.0], [0.0], [-1.0]]), jnp.array([[3e4], [0.0]])
    for k in (1, 3):
        log_probs, ids = unpack(top_outcomes(k, 2, head, truth, jnp.ones(2)), k, k + 1)
        assert np.all(np.isfinite(log_probs)) and np.all(ids[0, 0] == 0)

        for name in ("reverse_kl", "hybrid"):
            kind = TopK(Distance(name))

            def loss(predicted, kind=kind, known=(log_probs, ids)):
                return visited_loss(kind, 2, head, predicted, known, jnp.ones(2))["minimised"]

            value, slope = jax.jit(jax.value_and_grad(loss))(jnp.array([[-40.0], [0.0]]))
            assert np.isfinite(value) and np.all(np.isfinite(slope)), (k, name)
            if name == "reverse_kl":  # total variation has a kink where q = p
                np.testing.assert_allclose(slope[1], 0, atol=1e-3)


@settings(deadline=None)
@given(st.sampled_from([1, 3]), st.sampled_from([1 << 16, 1 << 31]), st.booleans(), st.data())
def test_a_row_gives_back_what_it_was_given(k, vocab_size, limited, data):
    outcomes = num_outcomes(k, limited)
    ids = np.array([data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=k, max_size=k))], np.int32)
    log_probs = data.draw(arrays(np.float32, (1, outcomes), elements=st.floats(-60_000, 0, width=32)))
    log_probs[0, -1] = data.draw(st.sampled_from([log_probs[0, -1], -np.inf]))
    rows = jax.jit(pack, static_argnums=2)(log_probs, ids, vocab_size)
    assert rows.shape == (1, row_words(k, vocab_size, 0) + limited)
    found, found_ids = jax.jit(unpack, static_argnums=(1, 2))(rows, k, outcomes)
    np.testing.assert_array_equal(found_ids, ids)
    np.testing.assert_allclose(found, np.maximum(log_probs, -65504), rtol=2**-11, atol=6e-8)


def test_a_row_has_its_size():
    assert 2 * row_words(32, 49_152, 0) == 4 * 32 + 2 and 2 * row_words(32, 128_256, 0) == 6 * 32 + 2
    assert 2 * row_words(32, 128_256, 8192) == 4 * 32 + 4
