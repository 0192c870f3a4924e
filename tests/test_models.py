"""The decoder against itself: cached against whole, scanned against looped, and rotations against their definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_config, toy_draft, toy_target

from jsfdd.models.architecture import Experts, Rope
from jsfdd.models.attention import attention, cached_view, causal_view, empty_cache
from jsfdd.models.counted import fold_counted
from jsfdd.models.draft import EagleLayer, draft_config
from jsfdd.models.layers import rope_frequencies, rope_table, rotate
from jsfdd.models.target import decode, embed_tokens, head_logits, hidden_states, unstack_layers

# A model read op by op would be a program for each op.
_decode, _hidden_states = jax.jit(decode, static_argnums=0), jax.jit(hidden_states, static_argnums=0)

VARIANTS = {
    "llama": {},
    "qwen2": dict(family="qwen2", qkv_bias=True, tie_embeddings=True),
    "mistral": dict(family="mistral", sliding_window=4, sliding_layers=(True, True)),
    "gemma3": dict(
        family="gemma3",
        tie_embeddings=True,
        qk_norm=True,
        sandwich_norms=True,
        activation="gelu_tanh",
        embedding_scale=32**0.5,
        query_scale=0.3,
        sliding_window=4,
        sliding_layers=(True, False),
        local_rope=Rope(100.0),
    ),
    "qwen3_moe": dict(family="qwen3", qk_norm=True, experts=Experts(count=5, chosen=2, intermediate_size=24, normalised=True)),
}


def _tokens(batch=2, length=12, vocab=64):
    return np.array(jax.random.randint(jax.random.key(3), (batch, length), 0, vocab))


@pytest.mark.parametrize("name", VARIANTS)
def test_one_by_one_equals_whole(name):
    config, params = toy_target(**VARIANTS[name])
    tokens = _tokens()
    whole = _hidden_states(config, params, tokens)
    step = jax.jit(lambda cache, t: decode(config, params, t, cached_view(cache, 1), cache))
    cache, pieces = empty_cache(config, 2, 16), []
    for t in range(12):
        hidden, cache = step(cache, tokens[:, t : t + 1])
        cache = cache._replace(length=cache.length + 1)
        pieces.append(hidden)
    assert np.allclose(np.concatenate(pieces, axis=1), whole, atol=2e-5)
    assert np.abs(whole).max() > 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_a_prompt_read_whole_fills_the_cache_that_goes_on(name):
    config, params = toy_target(**VARIANTS[name])
    tokens, length = _tokens(), jnp.full(2, 8)

    @jax.jit
    def in_two_parts(tokens):
        prompt, cache = decode(config, params, tokens[:, :8], causal_view(2, 8), empty_cache(config, 2, 16))
        cache = cache._replace(length=length)
        rest, _ = decode(config, params, tokens[:, 8:], cached_view(cache, 4), cache)
        return jnp.concatenate([prompt, rest], axis=1)

    assert np.allclose(in_two_parts(tokens), _hidden_states(config, params, tokens), atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loop_over_unstacked_layers_equals_the_scan(name):
    config, params = toy_target(**VARIANTS[name])
    cache = empty_cache(config, 2, 16)._replace(length=jnp.array([2, 3]))
    tokens = _tokens(length=3)
    results = [
        jax.jit(lambda p: decode(config, p, tokens, cached_view(cache, 3), cache))(p) for p in (params, unstack_layers(params))
    ]
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-5), *results))


def test_rows_continue_at_their_own_lengths_and_roll_back():
    """Two rows of different lengths take three tokens, drop two of them, and go on as if they had never come."""
    config, params = toy_target()
    tokens = _tokens(length=12)

    def read(cache, new):
        return _decode(config, params, new, cached_view(cache, new.shape[1]), cache)

    _, cache = read(empty_cache(config, 2, 16), tokens[:, :6])
    cache = cache._replace(length=jnp.array([4, 6]))  # right-padded prompts of 4 and 6 tokens
    _, cache = read(cache, jnp.array([[1, 2, 3], [4, 5, 6]]))
    cache = cache._replace(length=cache.length + 1)
    hidden = np.asarray(read(cache, jnp.array([[7], [8]]))[0])
    for row, prefix in enumerate([[*tokens[0, :4], 1, 7], [*tokens[1, :6], 4, 8]]):
        alone = np.asarray(_hidden_states(config, params, np.array([prefix], np.int32)))
        assert np.allclose(hidden[row, 0], alone[0, -1], atol=2e-5)


def test_right_padding_changes_nothing():
    config, params = toy_target()
    tokens = _tokens()
    padded = np.concatenate([tokens, np.full((2, 5), 9, np.int32)], axis=1)
    whole = np.asarray(_hidden_states(config, params, padded))
    assert np.allclose(whole[:, :12], _hidden_states(config, params, tokens), atol=1e-5)


def test_sliding_window_forgets():
    """With windows of 4 in 2 layers a token reaches 6 back; 7 back it changes nothing."""
    config, params = toy_target(**VARIANTS["mistral"])
    tokens = _tokens(batch=1)
    hidden = np.asarray(_hidden_states(config, params, tokens))
    tokens[0, 0] = (tokens[0, 0] + 1) % 64
    changed = np.asarray(_hidden_states(config, params, tokens))
    same = np.abs(hidden - changed)[0].max(axis=1) == 0
    assert same.tolist() == [False] * 7 + [True] * 5


def test_borrowed_embedding_is_the_scaled_one():
    config, params = toy_target(**VARIANTS["gemma3"])
    rows = np.asarray(params["embed"]["embedding"])[[3, 5]]
    assert np.allclose(embed_tokens(config, params, jnp.array([3, 5])), rows * 32**0.5, rtol=1e-6)


def test_tied_head_is_the_embedding():
    config, params = toy_target(tie_embeddings=True)
    hidden = jax.random.normal(jax.random.key(0), (3, 32))
    expected = np.asarray(hidden) @ np.asarray(params["embed"]["embedding"]).T
    assert np.allclose(head_logits(config, params, hidden), expected, atol=1e-5)
    assert head_logits(config, params, hidden.astype(jnp.bfloat16)).dtype == jnp.float32


def test_attention_is_its_definition():
    """Each query's softmax over the keys it sees, written out head by head; query head n reads key head n // G."""
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 3, 2, 2, 8))  # B T K G H
    k, v = jax.random.normal(keys[1], (2, 2, 8, 5)), jax.random.normal(keys[2], (2, 2, 5, 8))
    mask = np.array(jax.random.bernoulli(keys[3], 0.5, (2, 3, 5)))
    mask[:, :, 0] = True
    got = np.asarray(jax.jit(functools.partial(attention, scale=0.3))(q, k, v, mask))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, t, kv, g in np.ndindex(2, 3, 2, 2):
        seen = np.flatnonzero(mask[b, t])
        weights = np.exp(0.3 * (q[b, t, kv, g] @ k[b, kv][:, seen]))
        assert np.allclose(got[b, t, kv, g], weights / weights.sum() @ v[b, kv][seen], atol=1e-5)


def test_rotation_is_relative_and_keeps_lengths():
    """<rotate(q, m), rotate(k, n)> depends on m − n alone."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def turn(x, position):
        return rotate(x, rope_table(jnp.array([[position]]), Rope(1e4), 16))[0, 0, 0]

    assert np.dot(turn(q, 9), turn(k, 4)) == pytest.approx(np.dot(turn(q, 105), turn(k, 100)), abs=1e-4)
    assert np.linalg.norm(turn(q, 77)) == pytest.approx(np.linalg.norm(q), rel=1e-5)


def test_rope_rules():
    plain, scale = rope_frequencies(Rope(1e4), 16)
    assert scale == 1 and plain[0] == 1 and np.allclose(plain, 1e4 ** (-np.arange(8) / 8))
    assert np.allclose(rope_frequencies(Rope(1e4, "linear", factor=4), 16)[0], plain / 4)
    llama3 = rope_frequencies(Rope(1e4, "llama3", factor=8, original_max_position=1024), 16)[0]
    # Fast rotations stay, slow ones are slowed by the factor, those between lie between.
    assert np.allclose(llama3[:3], plain[:3]) and np.allclose(llama3[-2:], plain[-2:] / 8)
    assert np.all((llama3 <= plain + 1e-9) & (llama3 >= plain / 8 - 1e-9))
    yarn, factor = rope_frequencies(Rope(1e4, "yarn", factor=4, original_max_position=1024), 16)
    assert factor == pytest.approx(0.1 * np.log(4) + 1) and yarn[0] == 1 and yarn[-1] == pytest.approx(plain[-1] / 4)
    assert np.allclose(rope_frequencies(Rope(1e4, frequency_divisors=(2.0,) * 8), 16)[0], plain / 2)


def test_draft_one_by_one_equals_whole():
    config, _ = toy_target()
    draft, params = toy_draft(config)
    embedding, hidden = jax.random.normal(jax.random.key(0), (2, 2, 9, 32))
    whole = jax.jit(EagleLayer(draft).apply)({"params": params}, embedding, hidden)

    @jax.jit
    def read(embedding, hidden, cache):
        view = cached_view(cache, 1)
        out, cache = EagleLayer(draft).apply({"params": params}, embedding, hidden, view, cache, method="decode")
        return out, cache._replace(length=cache.length + 1)

    cache, pieces = empty_cache(draft.decoder, 2, 12), []
    embedding, hidden = np.asarray(embedding), np.asarray(hidden)
    for t in range(9):
        out, cache = read(embedding[:, t : t + 1], hidden[:, t : t + 1], cache)
        pieces.append(out)
    assert np.allclose(np.concatenate(pieces, axis=1), whole, atol=2e-5)


def test_draft_config_keeps_what_must_agree_and_drops_the_familys_extras():
    target = dataclasses.replace(toy_config(), **VARIANTS["gemma3"])
    decoder = draft_config(target).decoder
    assert (decoder.num_layers, decoder.qk_norm, decoder.sandwich_norms, decoder.sliding_layers) == (1, False, False, ())
    assert (decoder.hidden_size, decoder.rope, decoder.embedding_scale) == (32, target.rope, target.embedding_scale)
    with pytest.raises(ValueError, match="one layer"):
        dataclasses.replace(draft_config(target), decoder=target)


@pytest.mark.parametrize("block", [1, 3, 16])
@pytest.mark.parametrize("where", [[], [0], [2, 3, 9], list(range(10))])
def test_fold_counted_visits_each_counted_row_once(block, where):
    counted = jnp.zeros(10, bool).at[jnp.array(where, jnp.int32)].set(True)
    visits = fold_counted(counted, block, lambda rows, seen: seen.at[rows].add(1, mode="drop"), jnp.zeros(10, jnp.int32))
    assert np.array_equal(visits, np.asarray(counted))
