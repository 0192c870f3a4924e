"""The token losses against their definitions in float64, and their gradients against finite differences; the losses that
training runs against the plain equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jsfdd.training.distances import DISTANCES, top_k_share
from jsfdd.training.soft_means import head_means
from jsfdd.training.token_loss import Distance, coarse_loss, mean_loss, token_loss
from jsfdd.training.visited_loss import Exact, Means, TopK, visited_loss

RANDOM = np.random.default_rng(0)
HEAD, TRUTH, PREDICTED = (RANDOM.normal(size=shape) for shape in ((23, 6), (5, 6), (5, 6)))
WEIGHT = np.array([1.0, 0.0, 0.25, 2.0, 0.0])
CROSS_ENTROPY = Distance("cross_entropy")


def exact(name, predicted, top_k=0, top_k_weight=0.0):
    """Each token's distance by its definition, in float64."""
    p, log_q = scipy.special.softmax(TRUTH @ HEAD.T, axis=1), scipy.special.log_softmax(predicted @ HEAD.T, axis=1)
    q = np.exp(log_q)
    cross_entropy, variation = -np.sum(p * log_q, axis=1), 0.5 * np.abs(p - q).sum(axis=1)
    values = {
        "cross_entropy": cross_entropy,
        "reverse_kl": np.sum(q * (log_q - np.log(p)), axis=1),
        "total_variation": variation,
        "hybrid": cross_entropy + variation,
    }[name]
    likeliest = np.argsort(-p, axis=1)[:, :top_k]
    return values - top_k_weight * np.take_along_axis(p * log_q, likeliest, axis=1).sum(axis=1)


@pytest.mark.parametrize("name, top_k_weight", [*((name, 0.0) for name in DISTANCES), ("cross_entropy", 0.5)])
def test_value_is_the_definition_and_gradient_its_slope(name, top_k_weight):
    distance = Distance(name, 3, top_k_weight)
    with jax.enable_x64(True):

        def loss(predicted):
            head, truth, weight = (jnp.asarray(x) for x in (HEAD, TRUTH, WEIGHT))
            return visited_loss(Exact(distance), 2, head, predicted, (head, truth), weight)["minimised"]

        def weighted(predicted):
            return np.sum(WEIGHT * exact(name, predicted, 3, top_k_weight))

        value, gradient = jax.device_get(jax.jit(jax.value_and_grad(loss))(PREDICTED))
        assert float(value) == pytest.approx(weighted(PREDICTED), rel=1e-5)
        step = 1e-6
        for index in np.ndindex(*PREDICTED.shape):
            moved = np.zeros(PREDICTED.shape)
            moved[index] = step
            slope = (weighted(PREDICTED + moved) - weighted(PREDICTED - moved)) / (2 * step)
            assert gradient[index] == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert np.abs(gradient[0]).max() > 0.01 and np.all(gradient[np.array([1, 4])] == 0)


def test_distances_are_least_where_both_agree():
    z = jnp.asarray(TRUTH @ HEAD.T, jnp.float32).T
    p = scipy.special.softmax(np.asarray(z, np.float64), axis=0)
    entropy = -np.sum(p * np.log(p), axis=0)
    for name, least in (("cross_entropy", entropy), ("reverse_kl", 0), ("total_variation", 0), ("hybrid", entropy)):
        np.testing.assert_allclose(DISTANCES[name](z, z, axis=0), least, atol=1e-6)
        assert np.all(DISTANCES[name](z, z + jnp.asarray(RANDOM.normal(size=z.shape), jnp.float32), axis=0) > least)


def test_top_k_share_keeps_ties():
    z = jnp.log(jnp.array([[4.0], [2.0], [2.0], [1.0], [1.0]]))
    np.testing.assert_allclose(top_k_share(z, 2, axis=0)[:, 0], [0.4, 0.2, 0.2, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(top_k_share(z, 1, axis=0)[:, 0], [0.4, 0, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("distance", [CROSS_ENTROPY, Distance("cross_entropy", 4, 0.5)], ids=["plain", "top k"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_mean_loss_is_token_loss_without_the_target(distance, dtype, tolerance):
    head, truth, predicted, weight = (jnp.asarray(x, jnp.float32) for x in (HEAD, TRUTH, PREDICTED, WEIGHT))
    means = jax.jit(lambda: head_means(distance, 2, head, truth, weight, dtype))()
    assert means.shape == (5, 7) and means.dtype == dtype and not np.any(np.asarray(means, np.float32)[1])

    def by_means(predicted):
        known = means[:, :-1], means[:, -1].astype(jnp.float32)
        return visited_loss(Means(), 2, head, predicted, known, weight)["minimised"]

    def by_target(predicted):
        return visited_loss(Exact(distance), 2, head, predicted, (head, truth), weight)["minimised"]

    (found, slope), (expected, expected_slope) = (jax.jit(jax.value_and_grad(f))(predicted) for f in (by_means, by_target))
    assert float(found) == pytest.approx(float(expected), rel=tolerance)
    np.testing.assert_allclose(slope, expected_slope, atol=tolerance * float(np.abs(expected_slope).max()))


def test_rounding_of_means_leaves_no_bias_of_the_mass():
    """bfloat16 rounds a mass of 1.3 by 0.2%: were e not scaled by as much, q = p would not be a minimum."""
    distance = Distance("cross_entropy", 2, 0.3)
    head, truth = jnp.asarray(HEAD, jnp.float32), jnp.asarray(TRUTH, jnp.float32)
    means_in = jax.jit(lambda dtype: head_means(distance, 8, head, truth, jnp.ones(5), dtype), static_argnums=0)
    rounded, whole = (np.asarray(means_in(dtype), np.float32) for dtype in ("bfloat16", "float32"))
    assert np.all(rounded[:, -1] != whole[:, -1])
    np.testing.assert_allclose(rounded[:, :-1], whole[:, :-1] * (rounded[:, -1] / whole[:, -1])[:, None], rtol=2**-8)


def test_a_draft_vocabulary_limits_q_and_what_p_asks_for():
    tokens = np.array([0, 2, 3, 7, 11, 12, 20])
    vocabulary = tuple(tokens.tolist())
    head, truth, predicted, weight = (jnp.asarray(x, jnp.float32) for x in (HEAD, TRUTH, PREDICTED, WEIGHT))
    p = scipy.special.softmax(TRUTH @ HEAD.T, axis=1)
    log_q = scipy.special.log_softmax(PREDICTED @ HEAD[tokens].T, axis=1)
    expected = -np.sum(p[:, tokens] * log_q, axis=1)

    own = jax.device_put(np.asarray(head)[tokens])
    sums = jax.jit(lambda: visited_loss(Exact(CROSS_ENTROPY, vocabulary), 2, own, predicted, (head, truth), weight))()
    assert sums["distance"].item() == pytest.approx(np.sum(WEIGHT * expected), rel=1e-5)
    acceptance, coverage = np.minimum(p[:, tokens], np.exp(log_q)).sum(axis=1), p[:, tokens].sum(axis=1)
    assert sums["acceptance"].item() == pytest.approx(np.sum(WEIGHT * acceptance), rel=1e-5)
    assert sums["coverage"].item() == pytest.approx(np.sum(WEIGHT * coverage), rel=1e-5)
    agreement = np.argmax(p, axis=1) == tokens[np.argmax(log_q, axis=1)]
    assert sums["agreement"].item() == pytest.approx(np.sum(WEIGHT * agreement)) and "cross_entropy" not in sums

    means = np.asarray(jax.jit(lambda: head_means(CROSS_ENTROPY, 2, head, truth, weight, "float32", vocabulary))())
    np.testing.assert_allclose(means[:, -1], np.where(WEIGHT > 0, coverage, 0), rtol=1e-5)

    def by_means(predicted):
        known = jax.device_put((means[:, :-1], means[:, -1]))
        return visited_loss(Means(), 2, own, predicted, known, weight)["minimised"]

    def by_target(predicted):
        return visited_loss(Exact(CROSS_ENTROPY, vocabulary), 2, own, predicted, (head, truth), weight)["minimised"]

    (found, slope), (whole, whole_slope) = (jax.jit(jax.value_and_grad(f))(predicted) for f in (by_means, by_target))
    assert float(found) == pytest.approx(float(whole), rel=1e-5)
    np.testing.assert_allclose(slope, whole_slope, atol=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_stay_finite_where_the_draft_cannot_go(name):
    z = jnp.asarray(TRUTH @ HEAD.T, jnp.float32).T
    limited = z.at[3:9].set(-jnp.inf)
    value, slope = jax.jit(jax.value_and_grad(lambda draft: DISTANCES[name](z, draft, axis=0).sum()))(limited)
    assert np.isfinite(value) and np.all(np.isfinite(slope)) and np.all(np.asarray(slope)[3:9] == 0)


def test_extreme_logits_stay_finite_and_exact():
    matrix = jnp.array([[1.0], [0.0], [-1.0]])
    truth, predicted, weight = jnp.array([[3e4], [0.0]]), jnp.array([[-3e4], [0.0]]), jnp.ones(2)

    def total(predicted):
        sums = visited_loss(Exact(CROSS_ENTROPY), 2, matrix, predicted, (matrix, truth), weight)
        return sums["minimised"], sums

    gradient, sums = jax.jit(jax.grad(total, has_aux=True))(predicted)
    assert (
        sums["cross_entropy"] == sums["distance"] == pytest.approx(6e4 + np.log(3))
    )  # all of p where log q = −6e4, then uniform
    assert sums["target_entropy"] == pytest.approx(np.log(3), rel=1e-6)
    assert sums["acceptance"] == pytest.approx(1.0, rel=1e-6)  # 0 at the first token, 1 at the second
    assert sums["agreement"] == 1.0
    np.testing.assert_allclose(gradient, [[-2.0], [0.0]], atol=1e-6)  # (q − p) @ matrix
    means = np.asarray(jax.jit(lambda: head_means(CROSS_ENTROPY, 2, matrix, truth, weight, "float32"))())
    known = jax.device_put((means[:, :-1], means[:, -1]))
    by_means, slope = jax.jit(
        jax.value_and_grad(lambda predicted: visited_loss(Means(), 2, matrix, predicted, known, weight)["minimised"])
    )(predicted)
    assert by_means == pytest.approx(6e4 + np.log(3))
    np.testing.assert_allclose(slope, [[-2.0], [0.0]], atol=1e-6)


def test_no_counted_token_means_zero_loss_and_gradient():
    rows, head = jnp.ones((4, 6)), jnp.asarray(HEAD, jnp.float32)

    def total(predicted):
        sums = visited_loss(Exact(CROSS_ENTROPY), 2, head, predicted, (head, rows), jnp.zeros(4))
        return sums["minimised"], sums

    gradient, sums = jax.jit(jax.grad(total, has_aux=True))(2 * rows)
    assert len(sums) == 7 and all(value == 0 for value in sums.values())
    np.testing.assert_array_equal(gradient, 0)


VOCABULARY = (0, 2, 3, 7, 11, 12, 20)


def kinds():
    """(name, kind, head, what is known of p, the plain equation of predicted) in float64; log p of four tokens and the tail."""
    p = scipy.special.softmax(TRUTH @ HEAD.T, axis=1)
    ids = np.argsort(-p, axis=1)[:, :4]
    top = np.take_along_axis(p, ids, axis=1)
    log_p = np.log(np.concatenate([top, 1 - top.sum(axis=1, keepdims=True)], axis=1))
    mean, mass = 1.3 * p @ HEAD, np.full(5, 1.3)
    allowed = np.isin(np.arange(23), VOCABULARY)
    limited_ids = np.argsort(-p[:, VOCABULARY], axis=1)[:, :3]
    limited = np.take_along_axis(p[:, VOCABULARY], limited_ids, axis=1)
    beyond = 1 - p[:, VOCABULARY].sum(axis=1, keepdims=True)
    limited = np.log(np.concatenate([limited, 1 - limited.sum(axis=1, keepdims=True) - beyond, beyond], axis=1))
    head = HEAD[list(VOCABULARY)]
    for name in DISTANCES:
        distance = Distance(name, 3, 0.5)
        yield "exact", Exact(distance), HEAD, (HEAD, TRUTH), lambda g, d=distance: token_loss(d, HEAD, g, TRUTH)
        yield "top k", TopK(distance), HEAD, (log_p, ids), lambda g, d=distance: coarse_loss(d, HEAD, g, log_p, ids)
    for name in ("cross_entropy", "total_variation"):  # vocabularies know of no distance
        distance = Distance(name, 3, 0.5)
        yield (
            "exact, draft vocabulary", Exact(distance, VOCABULARY), head, (HEAD, TRUTH),
            lambda g, d=distance: token_loss(d, HEAD, g, TRUTH, allowed),
        )  # fmt: skip
        yield (
            "top k, draft vocabulary", TopK(distance), head, (limited, limited_ids),
            lambda g, d=distance: coarse_loss(d, head, g, limited, limited_ids),
        )  # fmt: skip
    yield "means", Means(), HEAD, (mean, mass), lambda g: mean_loss(HEAD, g, mean, mass)


def of_all_kinds(loss, *arguments, skip=()):
    """Value and slopes of `loss(kind, head, known, plain, *arguments)` for every kind, from one program."""
    numbers = range(len(arguments)) if len(arguments) > 1 else 0
    losses = [functools.partial(loss, *case) for name, *case in kinds() if name not in skip]
    return jax.jit(lambda *values: [jax.value_and_grad(one, numbers)(*values) for one in losses])(*arguments)


def test_the_losses_of_training_are_the_plain_equations():
    """Value and gradient, of every kind and distance; the plain side is differentiated by JAX."""

    def visited(kind, head, known, _, g):
        return visited_loss(kind, 2, *jax.tree.map(jnp.asarray, (head, g, known, WEIGHT)))["minimised"]

    def weighted(kind, head, known, plain, g):
        return jnp.sum(WEIGHT * plain(g))

    with jax.enable_x64(True):
        cases = [(name, kind) for name, kind, *_ in kinds()]
        sides = (of_all_kinds(loss, jnp.asarray(PREDICTED)) for loss in (visited, weighted))
        for (name, kind), (found, slope), (expected, expected_slope) in zip(cases, *sides, strict=True):
            assert float(found) == pytest.approx(float(expected), rel=1e-6), (name, kind)
            # Training's logits and its way back through the head are float32.
            np.testing.assert_allclose(slope, expected_slope, rtol=1e-5, atol=1e-5, err_msg=f"{name} {kind}")


def test_a_head_that_learns_has_the_slope_of_the_plain_equations():
    """An EAGLE-3 draft's own head, which is not the target's; means cannot know it."""

    def own_head(head):
        return head + 0.3 * np.random.default_rng(1).normal(size=HEAD.shape)[: len(head)]

    def visited(kind, head, known, _, moved, g):
        own = own_head(head) + moved[: len(head)]
        return visited_loss(kind, 2, own, g, jax.tree.map(jnp.asarray, known), jnp.asarray(WEIGHT), True)["minimised"]

    def plain(kind, head, known, _, moved, g):
        own = own_head(head) + moved[: len(head)]
        if isinstance(kind, TopK):
            return jnp.sum(WEIGHT * coarse_loss(kind.distance, own, g, *known))
        z_q = g @ own.T
        if kind.vocabulary:
            z_q = jnp.full((5, 23), -jnp.inf).at[:, np.array(kind.vocabulary)].set(z_q)
        return jnp.sum(WEIGHT * kind.distance.between(TRUTH @ HEAD.T, z_q))

    with jax.enable_x64(True):
        cases = [case for case in kinds() if case[0] != "means"]
        arguments = jnp.zeros(HEAD.shape), jnp.asarray(PREDICTED)
        sides = (of_all_kinds(loss, *arguments, skip=("means",)) for loss in (visited, plain))
        for (name, kind, *_), (found, slopes), (expected, expected_slopes) in zip(cases, *sides, strict=True):
            assert float(found) == pytest.approx(float(expected), rel=1e-6), (name, kind)
            for slope, expected_slope in zip(slopes, expected_slopes, strict=True):
                np.testing.assert_allclose(slope, expected_slope, rtol=1e-5, atol=1e-5, err_msg=f"{name} {kind}")
                assert np.any(slope)
        (means,) = (case for case in kinds() if case[0] == "means")
        with pytest.raises(ValueError, match="store the top k"):
            visited(*means[1:], *arguments)
