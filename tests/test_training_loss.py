"""The loss against a slow twin that writes the definitions out, and its gradient against jax.grad of the twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from toy import toy_config

from jsfdd.config import TrainConfig
from jsfdd.models.draft import Draft, draft_config, init_draft
from jsfdd.models.target import embed_tokens, head_logits, hidden_states, init_params
from jsfdd.records import DraftBatch, Sample
from jsfdd.training.loss import borrow, hidden_noise, loss_sums, token_loss

TOY = toy_config(vocab_size=37, tie_embeddings=True)
UNTIED = toy_config(vocab_size=37, embedding_scale=4.0)
OPTIONS = TrainConfig(target="toy", data=("chats.jsonl",), out="out", hidden_weight=0.7, token_weight=0.3)


@functools.cache
def toy(config):
    """(target params, draft config, draft params, batch); compiled whole, which is faster than op by op."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    draft = draft_config(config)
    draft_params = jax.jit(init_draft, static_argnums=0)(draft, jax.random.key(1))
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocab_size, (3, 9)).astype(np.int32)
    counted = random.random((3, 9)) < 0.6
    hidden = jax.jit(hidden_states, static_argnums=0)(config, params, tokens)
    return params, draft, draft_params, DraftBatch(tokens, counted, hidden)


def slow_sums(draft_params, params, batch, config, draft, options):
    """The definitions of loss.py and records.py written out, [B, T, V] materialised, one mask at the end."""
    embedding = embed_tokens(config, params, jnp.asarray(batch.tokens))
    predicted = Draft(draft).apply({"params": draft_params}, embedding[:, 1:], batch.hidden[:, :-1])
    true = batch.hidden[:, 1:]
    p = jax.nn.softmax(head_logits(config, params, true))
    log_q = jax.nn.log_softmax(head_logits(config, params, predicted))
    error = jnp.abs(predicted - true)
    hidden_loss = jnp.mean(jnp.where(error < 1, 0.5 * error**2, error - 0.5), axis=-1)
    cross_entropy = -jnp.sum(p * log_q, axis=-1)
    per_token = {
        "hidden_loss": hidden_loss,
        "cross_entropy": cross_entropy,
        "total": options.hidden_weight * hidden_loss + options.token_weight * cross_entropy,
        "target_entropy": -jnp.sum(p * jnp.log(p), axis=-1),
        "agreement": (jnp.argmax(p, -1) == jnp.argmax(log_q, -1)).astype(jnp.float32),
        "acceptance": jnp.sum(jnp.minimum(p, jnp.exp(log_q)), axis=-1),
        "counted": jnp.ones(cross_entropy.shape),
    }
    # The loss at t counts when the score at t+1 does.
    return {name: jnp.sum(value * batch.counted[:, 1:]) for name, value in per_token.items()}


@pytest.mark.parametrize("config, block", [(TOY, 4), (TOY, 64), (UNTIED, 1)], ids=["tied", "one block", "untied"])
def test_loss_and_gradient_equal_the_slow_twin(config, block):
    params, draft, draft_params, batch = toy(config)

    def fast(draft_params):
        sums = loss_sums(
            draft_params, borrow(config, params), batch, None,
            target_config=config, draft_config=draft, options=OPTIONS, block=block,
        )  # fmt: skip
        return sums.total, sums

    def slow(draft_params):
        sums = slow_sums(draft_params, params, batch, config, draft, OPTIONS)
        return sums["total"], sums

    fast_gradient, sums = jax.jit(jax.grad(fast, has_aux=True))(draft_params)
    slow_gradient, expected = jax.jit(jax.grad(slow, has_aux=True))(draft_params)
    found = {"total": sums.total, "hidden_loss": sums.hidden_loss, **sums.tokens._asdict()}
    assert found.keys() == expected.keys()
    # An entropy is the small difference of sums of logits in the hundreds, where float32 steps by 3e-5.
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=3e-5, err_msg=name)
    assert 0 < found["counted"] < batch.tokens.size
    # Entries are sums that cancel: their rounding is that of the largest, about 6, not their own.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fast_gradient, slow_gradient)


def test_gradient_in_float64_equals_finite_differences():
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        matrix, truth, predicted = (random.normal(size=shape) for shape in ((23, 6), (5, 6), (5, 6)))
        counted = np.array([True, False, True, True, False])

        def cross_entropy(predicted):
            return token_loss(2, jnp.asarray(matrix), predicted, jnp.asarray(truth), jnp.asarray(counted)).cross_entropy

        def exact(predicted):
            p = scipy.special.softmax(truth @ matrix.T, axis=1)
            return -np.sum((p * scipy.special.log_softmax(predicted @ matrix.T, axis=1))[counted])

        gradient = jax.jit(jax.grad(cross_entropy))(jnp.asarray(predicted))
        step = 1e-6
        for index in np.ndindex(*predicted.shape):
            moved = np.zeros(predicted.shape)
            moved[index] = step
            slope = (exact(predicted + moved) - exact(predicted - moved)) / (2 * step)
            assert gradient[index] == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_extreme_logits_stay_finite_and_exact():
    matrix = jnp.array([[1.0], [0.0], [-1.0]])
    truth, predicted = jnp.array([[3e4], [0.0]]), jnp.array([[-3e4], [0.0]])

    def total(predicted):
        sums = token_loss(2, matrix, predicted, truth, jnp.array([True, True]))
        return sums.cross_entropy, sums

    gradient, sums = jax.jit(jax.grad(total, has_aux=True))(predicted)
    assert sums.cross_entropy == pytest.approx(6e4 + np.log(3))  # all of p where log q = −6e4, then uniform
    assert sums.target_entropy == pytest.approx(np.log(3), rel=1e-6)
    assert sums.acceptance == pytest.approx(1.0, rel=1e-6)  # 0 at the first token, 1 at the second
    assert sums.agreement == 1.0
    np.testing.assert_allclose(gradient, [[-2.0], [0.0]], atol=1e-6)  # (q − p) @ matrix


def test_the_first_answer_token_and_the_prompt_do_not_count():
    # Positions:          0      1      2     3     4     5: x_2 … x_4 are the answer, x_5 is template.
    assistant = np.array([False, False, True, True, True, False])
    sample = Sample("a", "s", np.arange(6, dtype=np.int32), assistant)
    params, draft, draft_params, batch = toy(TOY)
    hidden = batch.hidden[:1, :6]
    batch = DraftBatch(sample.tokens[None], sample.counted[None], hidden)

    @jax.jit
    def sums(batch):
        return loss_sums(
            draft_params, borrow(TOY, params), batch, None,
            target_config=TOY, draft_config=draft, options=OPTIONS, block=4,
        )  # fmt: skip

    assert sums(batch).tokens.counted == 2  # at t = 1 and 2 the draft guesses x_3 and x_4; x_2 is the target's own
    # The loss at t = 2 compares with h_3; nothing reads h_4, h_5 or x_4, x_5.
    changed = batch._replace(hidden=hidden.at[:, 4:].add(9.0), tokens=np.array([[0, 1, 2, 3, 30, 31]], np.int32))
    jax.tree.map(np.testing.assert_array_equal, sums(changed), sums(batch))
    assert sums(batch._replace(hidden=hidden.at[:, 3].add(9.0))).total != sums(batch).total


def test_no_counted_token_means_zero_loss_and_gradient():
    head = borrow(TOY, toy(TOY)[0]).embedding
    rows = jnp.ones((4, 32))

    def total(predicted):
        sums = token_loss(2, head, predicted, rows, jnp.zeros(4, bool))
        return sums.cross_entropy, sums

    gradient, sums = jax.jit(jax.grad(total, has_aux=True))(2 * rows)
    assert all(value == 0 for value in sums)
    np.testing.assert_array_equal(gradient, 0)


def test_noise_is_uniform_scaled_by_length_and_blind_to_padding():
    keys = jax.random.split(jax.random.key(0), 2)
    counted = np.zeros((2, 100), bool)
    counted[0, :98] = True  # L = 99
    counted[1, :30] = True  # L = 31
    noise = hidden_noise(keys, jnp.asarray(counted), 64, 0.2)
    for row, length in zip(noise, (99, 31)):
        bound = 0.5 * 0.2 * 512 / length
        assert 0.99 * bound < jnp.max(jnp.abs(row)) <= bound
        assert jnp.std(row) == pytest.approx(bound / np.sqrt(3), rel=0.02)
        assert abs(jnp.mean(row)) < 0.02 * bound
    padded = hidden_noise(keys, jnp.pad(counted, ((0, 0), (0, 28))), 64, 0.2)
    np.testing.assert_array_equal(padded[:, :99], noise)
    assert not np.array_equal(noise[0] * 99, noise[1] * 31)
