"""The scores of a token, plain and fast, against their definitions in float64; the head that runs on counted tokens only."""

from __future__ import annotations

import dataclasses

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import USERS_PROGRAM, random_params, toy_config

from jsfdd.base.records import Sample, TokenScores
from jsfdd.models.target import head_logits, hidden_states
from jsfdd.scoring import fast_scores as forms
from jsfdd.scoring.fast_scores import fast_token_scores
from jsfdd.scoring.flatness import effective_choices, score_hidden, token_flatness, token_scores

CONFIG = toy_config(vocab_size=300, tie_embeddings=True)
PARAMS = random_params(CONFIG)
plain_scores, fast_scores, flatness_alone = jax.jit(token_scores), jax.jit(fast_token_scores), jax.jit(token_flatness)


@jax.jit
def accelerators_scores(logits, next_tokens):
    """As the program for a TPU has it, on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_two_largest", forms._two_largest_by_maxima)
        patch.setattr(forms, "_sum_of_products", lambda x, y: jnp.sum(x * y, axis=-1))
        return fast_token_scores(logits, next_tokens)


every_form = pytest.mark.parametrize(
    "jitted_scores", [plain_scores, fast_scores, accelerators_scores], ids=["plain", "fast", "accelerators"]
)


@jax.jit
def forward(tokens):
    return hidden_states(CONFIG, PARAMS, tokens)


def by_definition(logits, next_token) -> TokenScores:
    """Each metric as its definition reads, in float64. logits [N, V]."""
    z = np.asarray(logits, np.float64)
    largest = z.max(-1, keepdims=True)
    weights = np.exp(z - largest)
    p = weights / weights.sum(-1, keepdims=True)
    logsumexp = largest[:, 0] + np.log(weights.sum(-1))
    uniform = np.full(z.shape[-1], 1 / z.shape[-1])
    ordered = np.sort(p, -1)
    rows = np.arange(len(z))
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(p > 0, p * np.log(p), 0.0).sum(-1)
    return TokenScores(
        flatness=p @ uniform / (np.linalg.norm(p, axis=-1) * np.linalg.norm(uniform)),
        entropy=entropy,
        top1=ordered[:, -1],
        margin=ordered[:, -1] - ordered[:, -2],
        energy=-logsumexp,
        nll=logsumexp - z[rows, next_token],
    )


def assert_scores(found: TokenScores, expected: TokenScores, rtol=2e-5, atol=2e-6):
    for name, value in expected._asdict().items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=rtol, atol=atol, err_msg=name)


logit_rows = (
    st.sampled_from([2, 5, 128, 131, 300])
    .flatmap(
        lambda vocab: arrays.arrays(
            np.float32,
            (3, vocab),
            elements=st.floats(-10000, 10000, width=32) | st.floats(-3, 3, width=32) | st.sampled_from([0.0, 2.5, -np.inf]),
        )
    )
    .map(lambda z: np.concatenate([np.float32([[0.25]] * 3), z[:, 1:]], 1))
)  # one finite logit at least


@settings(max_examples=60, deadline=None)
@given(logit_rows)
def test_scores_follow_their_definitions_and_bounds_plain_and_fast(logits):
    next_token = np.argmax(logits, -1)  # whose nll is finite
    expected, vocab = by_definition(logits, next_token), logits.shape[-1]
    plain, fast = plain_scores(logits, next_token), fast_scores(logits, next_token)
    for found in (plain, fast, accelerators_scores(logits, next_token)):
        # Energy and nll are differences of logits up to 1e4, of which float32 holds 1e-3.
        assert_scores(found, expected, rtol=2e-5, atol=2e-3)
        assert_scores(found._replace(energy=0, nll=0), expected._replace(energy=0, nll=0))
        assert np.all(np.asarray(found.flatness) <= 1) and np.all(np.asarray(found.flatness) >= np.float32(vocab**-0.5))
        assert np.all(np.asarray(found.entropy) >= 0) and np.all(np.asarray(found.entropy) <= np.log(vocab) + 1e-5)
        assert np.all(np.asarray(found.margin) <= np.asarray(found.top1))
    assert_scores(fast, plain, rtol=2e-5, atol=2e-3)
    np.testing.assert_allclose(flatness_alone(logits), plain.flatness, rtol=1e-6)


@every_form
@pytest.mark.parametrize("vocab", [2, 7, 128, 1000, 49152, 128256])
def test_uniform_is_flattest_and_one_hot_least_flat(vocab, jitted_scores):
    logits = np.stack([np.full(vocab, 3.0), np.where(np.arange(vocab) == vocab // 2, 1e4, -1e4)]).astype(np.float32)
    found = TokenScores(*jax.device_get(jitted_scores(logits, np.array([0, vocab // 2]))))
    np.testing.assert_allclose(found.flatness, [1, vocab**-0.5], rtol=1e-6)
    np.testing.assert_allclose(found.entropy, [np.log(vocab), 0], rtol=1e-6)
    np.testing.assert_allclose(found.top1, [1 / vocab, 1], rtol=1e-6)
    np.testing.assert_allclose(found.margin, [0, 1], rtol=1e-6)
    np.testing.assert_allclose(found.nll, [np.log(vocab), 0], rtol=1e-6)
    np.testing.assert_allclose(effective_choices(found.flatness, vocab), [vocab, 1], rtol=1e-5)


@every_form
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 30.0])
def test_a_real_vocabulary_loses_no_precision(scale, jitted_scores):
    logits = np.random.default_rng(0).normal(size=(4, 49152)).astype(np.float32) * np.float32(scale)
    next_token = np.array([0, 7, 128, 49151])
    assert_scores(jitted_scores(logits, next_token), by_definition(logits, next_token), rtol=1e-5)


def test_flatness_is_the_cosine_to_uniform_and_an_exponential_of_renyi_entropy():
    logits = jax.random.normal(jax.random.key(0), (5, 11))
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    found = np.asarray(flatness_alone(logits))
    uniform = np.ones(11) / 11
    cosine = [row @ uniform / np.sqrt(row @ row) / np.sqrt(uniform @ uniform) for row in p]
    renyi = -np.log((p**2).sum(-1))
    np.testing.assert_allclose(found, cosine, rtol=1e-6)
    np.testing.assert_allclose(found, np.exp(renyi / 2) / np.sqrt(11), rtol=1e-6)
    np.testing.assert_allclose(effective_choices(found, 11), np.exp(renyi), rtol=1e-6)


@every_form
def test_scores_ignore_the_order_of_the_vocabulary_and_all_but_energy_a_common_shift(jitted_scores):
    random = np.random.default_rng(1)
    logits, order = 3 * random.standard_normal((6, 257), np.float32), random.permutation(257)
    next_token = np.arange(6)
    found = jitted_scores(logits, next_token)
    permuted = jitted_scores(logits[:, order], np.argsort(order)[next_token])
    shifted = TokenScores(*jax.device_get(jitted_scores(logits + np.float32(50), next_token)))
    assert_scores(permuted, found)
    assert_scores(shifted._replace(energy=shifted.energy + 50), found, rtol=1e-4, atol=1e-5)


@every_form
def test_ties_at_the_top_leave_no_margin_wherever_they_lie(jitted_scores):
    for first, second in [(0, 1), (0, 128), (5, 299), (130, 258), (128, 256)]:
        logits, next_token = np.linspace(-2, 0, 300, dtype=np.float32)[None, :], np.array([0])
        logits[0, [first, second]] = 4
        assert np.asarray(jitted_scores(logits, next_token).margin) == 0, (first, second)
        logits[0, second] = 3
        expected = by_definition(logits, next_token).margin
        np.testing.assert_allclose(jitted_scores(logits, next_token).margin, expected, rtol=1e-5)


@every_form
def test_a_token_that_cannot_occur_adds_nothing_but_counts_in_the_vocabulary(jitted_scores):
    logits = np.array([[1.0, -np.inf, 2.0, -np.inf]], np.float32)
    found, without = jitted_scores(logits, np.array([2])), jitted_scores(logits[:, ::2], np.array([1]))
    np.testing.assert_allclose(found.flatness, np.asarray(without.flatness) / np.sqrt(2), rtol=1e-6)
    for name in ("entropy", "top1", "margin", "energy", "nll"):
        np.testing.assert_allclose(getattr(found, name), getattr(without, name), rtol=1e-6, err_msg=name)


@every_form
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_not_hidden(bad, jitted_scores):
    found = jitted_scores(np.array([[0.0, bad, 1.0]], np.float32), np.array([0]))
    assert not np.isfinite(found.flatness) and not np.isfinite(found.entropy)


@every_form
def test_bfloat16_logits_are_scored_in_float32(jitted_scores):
    logits = (4 * jax.random.normal(jax.random.key(3), (3, 500))).astype(jnp.bfloat16)
    found = jitted_scores(logits, jnp.arange(3))
    assert all(values.dtype == jnp.float32 for values in found)
    assert_scores(found, by_definition(logits.astype(jnp.float32), np.arange(3)))


def test_shapes_in_front_of_the_vocabulary_stay():
    logits = np.random.default_rng(4).standard_normal((2, 3, 20), np.float32)
    found = plain_scores(logits, np.zeros((2, 3), np.int32))
    single = plain_scores(logits[1, 2], np.int32(0))
    assert found.flatness.shape == (2, 3) and single.flatness.shape == ()
    np.testing.assert_allclose(np.asarray(found.flatness)[1, 2], single.flatness, rtol=1e-6)


@pytest.mark.parametrize("block", [1, 4, 64])
def test_score_hidden_scores_counted_tokens_and_no_others(block):
    tokens = jax.random.randint(jax.random.key(1), (3, 10), 0, CONFIG.vocab_size)
    hidden = forward(tokens)
    counted = jax.random.bernoulli(jax.random.key(2), 0.4, (3, 10))
    scored = jax.jit(lambda *a: score_hidden(CONFIG, PARAMS, *a, block))
    found = scored(hidden, tokens, counted)
    expected = plain_scores(head_logits(CONFIG, PARAMS, hidden), tokens)
    for name in TokenScores._fields:
        values = np.asarray(getattr(found, name))
        np.testing.assert_allclose(values, np.where(counted, getattr(expected, name), 0), rtol=1e-4, atol=1e-5)
    none = scored(hidden, tokens, jnp.zeros((3, 10), bool))
    assert not any(np.any(values) for values in none)


def test_memory_of_score_hidden_does_not_grow_with_tokens_times_vocabulary():
    config = dataclasses.replace(CONFIG, vocab_size=4096)
    params = random_params(config)

    def temporary_bytes(length):
        kinds = [((32,), "float32"), ((), "int32"), ((), "bool")]
        shapes = [jax.ShapeDtypeStruct((4, length, *rest), kind) for rest, kind in kinds]
        program = (
            jax.jit(lambda *a: score_hidden(config, params, *a, 16)).lower(*shapes).compile(compiler_options=USERS_PROGRAM)
        )
        return program.memory_analysis().temp_size_in_bytes

    # [B, T, V] float32 would be 16 MB at the one length and 64 MB at the other.
    assert temporary_bytes(256) < 4e6 and temporary_bytes(1024) < 5e6


def test_index_rule_on_five_tokens():
    """Tokens u u a b e, of which a, b and the end e are the assistant's: the scores at a and at b count.

    At a stands the distribution of b given (u, u, a), at b that of e. That of a itself, at the second u, does not count.
    """
    tokens = np.array([3, 1, 4, 2, 5], np.int32)
    sample = Sample("s", "test", tokens, np.array([False, False, True, True, True]))
    assert sample.counted.tolist() == [False, False, True, True, False]
    hidden = forward(jnp.asarray(tokens)[None, :])
    next_tokens = jnp.array([[1, 4, 2, 5, 0]])
    score = jax.jit(score_hidden, static_argnums=(0, 5))
    found = score(CONFIG, PARAMS, hidden, next_tokens, jnp.asarray(sample.counted)[None, :], 8)
    logits = np.asarray(head_logits(CONFIG, PARAMS, hidden))[0]
    of_b, of_e = by_definition(logits[2:3], [2]), by_definition(logits[3:4], [5])
    for name in TokenScores._fields:
        expected = [0, 0, getattr(of_b, name)[0], getattr(of_e, name)[0], 0]
        np.testing.assert_allclose(np.asarray(getattr(found, name))[0], expected, rtol=1e-4, atol=1e-5, err_msg=name)
