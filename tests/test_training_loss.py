"""The loss against slow twins that write the definitions out, and its gradient against jax.grad of the twin."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import random_draft, random_params, toy_config

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import DraftBatch, Sample
from jsfdd.models.attention import cached_view, empty_cache
from jsfdd.models.draft import EagleLayer, draft_config, draft_steps
from jsfdd.models.target import embed_tokens, head_logits, hidden_states
from jsfdd.training.loss import borrow, hidden_noise, loss_sums
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_means import make_means_step
from jsfdd.training.token_loss import Distance

TOY = toy_config(vocab_size=37, tie_embeddings=True)
UNTIED = toy_config(vocab_size=37, embedding_scale=4.0)
RECIPE = Recipe(hidden_weight=0.7, token_weight=0.3)


@functools.cache
def toy(config):
    """(target params, draft config, draft params, batch); compiled whole, which is faster than op by op."""
    params = random_params(config)
    draft = draft_config(config)
    draft_params = random_draft(draft, 1)
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocab_size, (3, 9)).astype(np.int32)
    counted = random.random((3, 9)) < 0.6
    hidden = jax.jit(hidden_states, static_argnums=0)(config, params, tokens)
    return params, draft, draft_params, DraftBatch(tokens, counted, counted.astype(np.float32), hidden)


def slow_sums(draft_params, params, batch, config, draft, recipe):
    """The definitions of loss.py and records.py written out for one draft step, [B, T, V] materialised, one mask at the end."""
    embedding = embed_tokens(config, params, jnp.asarray(batch.tokens))
    predicted = EagleLayer(draft).apply({"params": draft_params}, embedding[:, 1:], batch.hidden[:, :-1])
    true = batch.hidden[:, 1:]
    p = jax.nn.softmax(head_logits(config, params, true))
    log_q = jax.nn.log_softmax(head_logits(config, params, predicted))
    error = jnp.abs(predicted - true)
    hidden_loss = jnp.mean(jnp.where(error < 1, 0.5 * error**2, error - 0.5), axis=-1)
    cross_entropy = -jnp.sum(p * log_q, axis=-1)
    per_token = {
        "hidden_loss": hidden_loss,
        "cross_entropy": cross_entropy,
        "distance": cross_entropy,
        "total": recipe.hidden_weight * hidden_loss + recipe.token_weight * cross_entropy,
        "target_entropy": -jnp.sum(p * jnp.log(p), axis=-1),
        "agreement": (jnp.argmax(p, -1) == jnp.argmax(log_q, -1)).astype(jnp.float32),
        "acceptance": jnp.sum(jnp.minimum(p, jnp.exp(log_q)), axis=-1),
        "counted": jnp.ones(cross_entropy.shape),
    }
    # The loss at t counts when the score at t+1 does.
    return {name: jnp.sum(value * batch.weight[:, 1:]) for name, value in per_token.items()}


def sums_and_gradient(batch, recipe, config=TOY, block=4):
    params, draft, draft_params, _ = toy(config)

    def total(draft_params):
        sums = loss_sums(
            draft_params, borrow(config, params), batch, None,
            draft=draft, recipe=recipe, block=block,
        )  # fmt: skip
        return sums.total, sums

    gradient, sums = jax.jit(jax.grad(total, has_aux=True))(draft_params)
    return jax.device_get((sums, gradient))


@pytest.mark.parametrize("config, block", [(TOY, 4), (TOY, 64), (UNTIED, 1)], ids=["tied", "one block", "untied"])
def test_loss_and_gradient_equal_the_slow_twin(config, block):
    params, draft, draft_params, batch = toy(config)

    def slow(draft_params):
        sums = slow_sums(draft_params, params, batch, config, draft, RECIPE)
        return sums["total"], sums

    sums, fast_gradient = sums_and_gradient(batch, RECIPE, config, block)
    slow_gradient, expected = jax.jit(jax.grad(slow, has_aux=True))(draft_params)
    (step,) = sums.steps
    found = {"total": sums.total, **step}
    assert found.keys() == expected.keys()
    # An entropy is the small difference of sums of logits in the hundreds, where float32 steps by 3e-5.
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=3e-5, err_msg=name)
    assert 0 < found["counted"] < batch.tokens.size
    # Entries are sums that cancel: their rounding is that of the largest, about 6, not their own.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fast_gradient, slow_gradient)


@pytest.mark.parametrize("config, draft_steps, top_k_weight", [(TOY, 1, 0.0), (UNTIED, 2, 0.5)], ids=["plain", "all of it"])
def test_stored_means_give_the_loss_of_the_whole_distribution(config, draft_steps, top_k_weight):
    params, _, _, batch = toy(config)
    recipe = dataclasses.replace(RECIPE, draft_steps=draft_steps, hass_top_k=3, hass_top_k_weight=top_k_weight)
    expected, expected_gradient = sums_and_gradient(batch, recipe, config)
    step = make_means_step(Distance.from_recipe(recipe), make_mesh(data=1), 4, "float32")
    sums, gradient = sums_and_gradient(batch._replace(soft_targets=step(borrow(config, params), batch)), recipe, config)
    np.testing.assert_allclose(sums.total, expected.total, rtol=1e-5)
    for found, known in zip(sums.steps, expected.steps, strict=True):
        np.testing.assert_allclose(found["distance"], known["distance"], rtol=1e-5)
        assert found["counted"] == known["counted"] > 0 and "agreement" not in found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), gradient, expected_gradient)


def test_each_harmonised_step_is_what_decoding_does():
    """Step n at t: the draft reads the target's states up to t − n + 1, and then n − 1 times its own prediction."""
    params, draft, draft_params, batch = toy(TOY)
    embedding, hidden = embed_tokens(TOY, params, batch.tokens[:, 1:]), batch.hidden[:, :-1]
    length = hidden.shape[1]
    all_at_once = jax.jit(lambda *inputs: list(draft_steps(draft, draft_params, *inputs, 4)))(embedding, hidden)

    def extended(embedding, states, cache):
        predicted, cache = EagleLayer(draft).apply(
            {"params": draft_params}, embedding, states, cached_view(cache, states.shape[1]), cache, method="decode"
        )
        return predicted[:, -1:], cache._replace(length=cache.length + states.shape[1])

    extended = jax.jit(extended)
    for begin in (0, 1, 3):
        cache = empty_cache(draft.decoder, 3, length)
        predicted, cache = extended(embedding[:, : begin + 1], hidden[:, : begin + 1], cache)
        for t, of_step in enumerate(all_at_once, begin):
            np.testing.assert_allclose(of_step[:, t], predicted[:, 0], rtol=1e-4, atol=1e-5)
            predicted, cache = extended(embedding[:, t + 1 : t + 2], predicted, cache)
    assert np.abs(all_at_once[1][:, 2:] - all_at_once[0][:, 2:]).max() > 0.01


def test_later_steps_count_only_what_a_draft_of_the_answer_reaches():
    *_, batch = toy(TOY)
    counted = np.zeros((3, 9), bool)
    counted[0, 3:8] = True  # an answer: its draft starts at t = 2, and t = 2 … 6 count
    counted[1, [2, 4, 6]] = True  # every answer two tokens long: no second step
    batch = batch._replace(counted=counted, weight=counted.astype(np.float32))
    sums, _ = sums_and_gradient(batch, dataclasses.replace(RECIPE, draft_steps=3))
    assert [float(step["counted"]) for step in sums.steps] == [5 + 3, 4, 3]
    assert sums.total == pytest.approx(sum(0.7 * step["hidden_loss"] + 0.3 * step["distance"] for step in sums.steps))


def test_weights_weigh_and_dropped_tokens_cost_nothing_else():
    *_, batch = toy(TOY)
    random = np.random.default_rng(1)
    weight = np.where(random.random((3, 9)) < 0.5, random.random((3, 9)), 0).astype(np.float32) * batch.counted
    sums, _ = sums_and_gradient(batch._replace(weight=weight), RECIPE)
    params, draft, draft_params, _ = toy(TOY)
    expected = jax.jit(lambda batch: slow_sums(draft_params, params, batch, TOY, draft, RECIPE))(batch._replace(weight=weight))
    np.testing.assert_allclose(sums.total, expected["total"], rtol=1e-5)
    np.testing.assert_allclose(sums.counted, weight[:, 1:].sum(), rtol=1e-6)


def test_bfloat16_activations_are_close_and_leave_gradients_float32():
    *_, batch = toy(TOY)
    expected, _ = sums_and_gradient(batch, RECIPE)
    sums, gradient = sums_and_gradient(batch, dataclasses.replace(RECIPE, compute_dtype="bfloat16"))
    assert sums.total == pytest.approx(expected.total, rel=0.05) and sums.total != expected.total
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}


def test_the_first_answer_token_and_the_prompt_do_not_count():
    # Positions:          0      1      2     3     4     5: x_2 … x_4 are the answer, x_5 is template.
    assistant = np.array([False, False, True, True, True, False])
    sample = Sample("a", "s", np.arange(6, dtype=np.int32), assistant)
    params, draft, draft_params, batch = toy(TOY)
    hidden = batch.hidden[:1, :6]
    batch = DraftBatch(sample.tokens[None], sample.counted[None], sample.counted[None].astype(np.float32), hidden)

    @jax.jit
    def sums(batch):
        return loss_sums(
            draft_params, borrow(TOY, params), batch, None,
            draft=draft, recipe=RECIPE, block=4,
        )  # fmt: skip

    assert sums(batch).counted == 2  # at t = 1 and 2 the draft guesses x_3 and x_4; x_2 is the target's own
    # The loss at t = 2 compares with h_3; nothing reads h_4, h_5 or x_4, x_5.
    changed = batch._replace(hidden=hidden.at[:, 4:].add(9.0), tokens=np.array([[0, 1, 2, 3, 30, 31]], np.int32))
    jax.tree.map(np.testing.assert_array_equal, sums(changed), sums(batch))
    assert sums(batch._replace(hidden=hidden.at[:, 3].add(9.0))).total != sums(batch).total


def test_noise_is_uniform_scaled_by_length_and_blind_to_padding():
    keys = jax.random.split(jax.random.key(0), 2)
    counted = np.zeros((2, 100), bool)
    counted[0, :98] = True  # L = 99
    counted[1, :30] = True  # L = 31
    noise_of = jax.jit(hidden_noise, static_argnums=(2, 3))
    noise = np.asarray(noise_of(keys, counted, 64, 0.2))
    for row, length in zip(noise, (99, 31)):
        bound = 0.5 * 0.2 * 512 / length
        assert 0.99 * bound < np.max(np.abs(row)) <= bound
        assert np.std(row) == pytest.approx(bound / np.sqrt(3), rel=0.02)
        assert abs(np.mean(row)) < 0.02 * bound
    padded = np.asarray(noise_of(keys, np.pad(counted, ((0, 0), (0, 28))), 64, 0.2))
    np.testing.assert_array_equal(padded[:, :99], noise)
    assert not np.array_equal(noise[0] * 99, noise[1] * 31)
