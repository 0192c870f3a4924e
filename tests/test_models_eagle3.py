"""The EAGLE-3 draft against plain numpy in float64, in the reference trainer's own indexing, and the target's streams."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eagle3_twin import rms, slow_steps
from toy import random_draft, toy_config, toy_target

from jsfdd.models.attention import cached_view, causal_view, empty_cache
from jsfdd.models.draft import DraftConfig, Eagle3Layer, draft_config, draft_head, draft_head_logits, draft_steps, init_draft
from jsfdd.models.target import decode, embed_tokens, final_state, hidden_states, residual_stream, unstack_layers

LAYERS = (0, 2, 3)
SHAPES = {
    "plain": {},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True, "norm_output": True},
    "norm_before_residual": {"norm_before_residual": True, "norm_output": True},
    "vocabulary": {"vocabulary": (1, 5, 6, 40)},
}


@functools.cache
def toy(name="plain"):
    """(target config, its params, draft config, its params with scales that are not 1)."""
    config, params = toy_target(num_layers=4)
    draft = dataclasses.replace(draft_config(config, kind="eagle3", target_layers=LAYERS), **SHAPES[name])
    draft_params = random_draft(draft, 1)
    random = np.random.default_rng(2)
    scaled = jax.tree.map(
        lambda x: x * random.uniform(0.5, 1.5, x.shape).astype(np.float32) if x.ndim == 1 else 2 * x, draft_params
    )
    return config, params, draft, scaled


@functools.partial(jax.jit, static_argnums=(0, 3))
def states_of(config, params, tokens, layers=LAYERS):
    return hidden_states(config, params, tokens, layers)


@pytest.mark.parametrize("name", SHAPES)
def test_a_draft_is_its_twin_at_every_step(name):
    config, params, draft, draft_params = toy(name)
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 64)
    hidden = states_of(config, params, tokens)[:, :-1]
    embedding = embed_tokens(config, params, tokens[:, 1:])
    found = jax.device_get(jax.jit(lambda e, h: list(draft_steps(draft, draft_params, e, h, 4)))(embedding, hidden))
    draft_params, embedding, hidden = jax.device_get((draft_params, embedding, hidden))
    for row in range(2):
        for i, outputs in enumerate(slow_steps(draft, draft_params, embedding[row], hidden[row], 4)):
            # Row t of the twin's step i stands here at the token that it reads, t + i.
            np.testing.assert_allclose(found[i][row, i:], outputs, rtol=2e-4, atol=2e-5)


def test_a_step_is_what_decoding_does():
    """The draft's cache, its recurrent state and the training-time test are one computation."""
    config, params, draft, draft_params = toy("fc_norm")
    tokens = jax.random.randint(jax.random.key(4), (2, 8), 0, 64)
    hidden, embedding = states_of(config, params, tokens)[:, :-1], embed_tokens(config, params, tokens[:, 1:])

    @jax.jit
    def decoded(embedding, hidden):
        def apply(*inputs, method):
            return Eagle3Layer(draft).apply({"params": draft_params}, *inputs, method=method)

        cache, outputs = empty_cache(draft.decoder, 2, 7), []
        state, cache = apply(
            embedding[:, :3], apply(hidden[:, :3], method="read"), cached_view(cache, 3), cache, method="decode"
        )
        state, cache = state[:, -1:], cache._replace(length=cache.length + 3)
        for number in range(3):
            outputs.append(apply(state, method="outputs")[:, 0])
            state, cache = apply(embedding[:, 3 + number : 4 + number], state, cached_view(cache, 1), cache, method="decode")
            cache = cache._replace(length=cache.length + 1)
        return outputs

    steps = jax.jit(lambda e, h: list(draft_steps(draft, draft_params, e, h, 3)))(embedding, hidden)
    for number, (of_step, outputs) in enumerate(zip(steps, decoded(embedding, hidden), strict=True)):
        np.testing.assert_allclose(np.asarray(of_step)[:, 2 + number], outputs, rtol=1e-4, atol=1e-5)


def test_streams_are_what_enters_the_layers():
    """Those of layer i are what a target of its first i layers ends with, whether layers are a scan or a loop."""
    config, params = toy_target(num_layers=4)
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 64)
    width = config.hidden_size
    for several in (params, unstack_layers(params)):
        hidden = np.asarray(jax.jit(lambda p: decode(config, p, tokens, causal_view(2, 6), None, (0, 1, 3))[0])(several))
        assert hidden.shape == (2, 6, 4 * width)
        np.testing.assert_allclose(hidden[..., -width:], states_of(config, params, tokens, ()), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(final_state(config, hidden), hidden[..., -width:])
        np.testing.assert_allclose(hidden[..., :width], embed_tokens(config, params, tokens), rtol=1e-6)
        for place, number in ((1, 1), (2, 3)):
            shorter = dataclasses.replace(config, num_layers=number)
            first = {**params, "layers": jax.tree.map(lambda x, n=number: x[:n], params["layers"])}
            stream, entered, _ = jax.jit(residual_stream, static_argnums=0)(shorter, first, tokens, causal_view(2, 6), None)
            assert entered == ()
            np.testing.assert_allclose(hidden[..., place * width : (place + 1) * width], stream, rtol=1e-4, atol=1e-5)


def test_the_head_is_its_own_and_begins_as_the_targets_rows():
    config, params, draft, _ = toy("vocabulary")
    head = np.asarray(params["head"]["kernel"]).T
    fresh = init_draft(draft, jax.random.key(0), head)
    np.testing.assert_array_equal(fresh["head"]["rows"], head[np.array(draft.vocabulary)])
    np.testing.assert_array_equal(draft_head(draft, fresh, head), fresh["head"]["rows"])
    state = jax.random.normal(jax.random.key(1), (3, config.hidden_size))
    logits = np.asarray(draft_head_logits(config, params, draft, fresh, state))
    inside = np.isin(np.arange(64), draft.vocabulary)
    outputs = rms(np.asarray(state, np.float64), 1.0, config.rms_norm_eps)
    np.testing.assert_allclose(logits[:, inside], outputs @ np.asarray(head)[inside].T, rtol=1e-4, atol=1e-5)
    assert np.isneginf(logits[:, ~inside]).all()
    changed = fresh | {"head": {"rows": 2 * fresh["head"]["rows"]}}
    twice = np.asarray(draft_head_logits(config, params, draft, changed, state))
    np.testing.assert_allclose(twice[:, inside], 2 * logits[:, inside], rtol=1e-5)


def test_what_cannot_be_is_named():
    config = toy_config(num_layers=8)
    assert draft_config(config, kind="eagle3").target_layers == (2, 4, 5)
    assert draft_config(toy_config(num_layers=7), kind="eagle3").target_layers == (2, 3, 4)
    for layers, changes, match in [
        ((), {"num_layers": 6}, "has 6 layers, fewer than 7"),
        ((0, 1, 8), {"num_layers": 8}, "8 is out of range.*from 0 to 7"),
        ((0, 3, 3), {"num_layers": 8}, r"\[0, 3, 3\].*ascending"),
        ((-1, 3), {"num_layers": 8}, "numbered from 0"),
    ]:
        with pytest.raises(ValueError, match=match):
            draft_config(toy_config(**changes), kind="eagle3", target_layers=layers)
    decoder = draft_config(config).decoder
    with pytest.raises(ValueError, match="norm_output=True is of an EAGLE-3 draft"):
        DraftConfig(decoder, norm_output=True)
    with pytest.raises(ValueError, match="one of them"):
        DraftConfig(decoder, kind="eagle3", target_layers=(0,), fc_norm=True, norm_before_fc=True)
    for vocabulary, match in [((3, 3), "ascend"), ((3, 64), "outside"), ((-1, 3), "outside")]:
        with pytest.raises(ValueError, match=match):
            draft_config(config, vocabulary=vocabulary, kind="eagle3")
    draft = draft_config(config, kind="eagle3")
    params = random_draft(draft)
    with pytest.raises(ValueError, match=r"width 32: an EAGLE-3 draft reads the inputs of the target's layers \[2, 4, 5\]"):
        Eagle3Layer(draft).apply({"params": params}, jnp.zeros((1, 2, 32)), jnp.zeros((1, 2, 32)))
