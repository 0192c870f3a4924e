"""Losslessness of one verification, by exact distributions; and proof that the test would notice a wrong one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from two_tokens import TRIALS, deviation, joint_of_trials

from jsfdd.decoding.verify import (
    Cutoff,
    Verdict,
    draw,
    fast_nucleus_edge,
    nucleus_edge,
    verify,
    verify_greedy,
    verify_sampled,
    warp,
)

V, G = 6, 2


def _bigram_pair():
    """A target and a draft over V tokens: row x is the distribution of the token after x."""
    rng = np.random.default_rng(7)
    return rng.dirichlet(np.full(V, 0.6), V).astype(np.float32), rng.dirichlet(np.full(V, 0.6), V).astype(np.float32)


def _simulate(judge, target, draft):
    """The first two emitted tokens of TRIALS runs from token 0, completed by the target where a run emits only one."""
    target, draft = jnp.asarray(target), jnp.asarray(draft)

    def trial(key):
        draft_key, judge_key, rest_key = jax.random.split(key, 3)
        k1, k2 = jax.random.split(draft_key)
        d1 = jax.random.categorical(k1, jnp.log(draft[0]))
        d2 = jax.random.categorical(k2, jnp.log(draft[d1]))
        tokens = jnp.stack([d1, d2]).astype(jnp.int32)
        verdict = judge(judge_key, tokens, jnp.stack([draft[0], draft[d1]]), jnp.stack([target[0], target[d1], target[d2]]))
        first = jnp.where(verdict.num_accepted > 0, d1, verdict.next_token)
        second = jnp.where(verdict.num_accepted > 1, d2, verdict.next_token)
        alone = jax.random.categorical(rest_key, jnp.log(target[first]))
        return first, jnp.where(verdict.num_accepted > 0, second, alone), verdict.num_accepted

    return joint_of_trials(trial, V)


@pytest.mark.slow
def test_two_token_distribution_is_the_targets():
    target, draft = _bigram_pair()
    joint, accepted = _simulate(verify_sampled, target, draft)
    assert abs(deviation(joint, target)) < 5
    # First-token acceptance has a closed form: sum of min(p, q).
    alpha = float(np.minimum(target[0], draft[0]).sum())
    assert np.mean(accepted > 0) == pytest.approx(alpha, abs=5 * np.sqrt(alpha * (1 - alpha) / TRIALS))


def _no_residual(key, tokens, q, p):
    """Wrong: corrects from p itself, not from the residual."""
    verdict = verify_sampled(key, tokens, q, p)
    again = jax.random.categorical(jax.random.fold_in(key, 1), jnp.log(p[verdict.num_accepted])).astype(jnp.int32)
    return Verdict(verdict.num_accepted, again)


def _swapped(key, tokens, q, p):
    """Wrong: p and q exchanged."""
    return verify_sampled(key, tokens, p[:-1], jnp.concatenate([q, p[-1:]]))


def _reused_key(key, tokens, q, p):
    """Wrong: the same uniform for every depth."""
    u = jax.random.uniform(key)
    accepted = u * q[jnp.arange(G), tokens] < p[jnp.arange(G), tokens]
    a = jnp.sum(jnp.cumprod(accepted.astype(jnp.int32)))
    residual = jnp.maximum(p[a] - jnp.concatenate([q, jnp.zeros_like(p[:1])])[a], 0.0)
    return Verdict(a, jax.random.categorical(jax.random.fold_in(key, 1), jnp.log(residual)).astype(jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [_no_residual, _swapped, _reused_key])
def test_the_distribution_test_has_power(wrong):
    target, draft = _bigram_pair()
    joint, _ = _simulate(wrong, target, draft)
    assert deviation(joint, target) > 20


@pytest.mark.slow
def test_equal_distributions_accept_everything():
    target, _ = _bigram_pair()
    _, accepted = _simulate(verify_sampled, target, target)
    assert np.all(accepted == G)


def test_disjoint_supports_reject_everything():
    p = np.array([[0.5, 0.5, 0, 0]] * 3, np.float32)
    q = np.array([[0, 0, 0.5, 0.5]] * 2, np.float32)
    keys = jax.random.split(jax.random.key(1), 500)
    verdict = jax.jit(jax.vmap(verify_sampled, in_axes=(0, None, None, None)))(keys, np.array([2, 3], np.int32), q, p)
    assert np.all(np.asarray(verdict.num_accepted) == 0)
    assert set(np.unique(verdict.next_token)) == {0, 1}


def test_greedy_literal():
    logits = jax.nn.one_hot(jnp.array([4, 2, 5]), V)
    cases = {(4, 2): (2, 5), (4, 3): (1, 2), (0, 2): (0, 4)}
    for tokens, (accepted, following) in cases.items():
        verdict = verify_greedy(jnp.array(tokens, jnp.int32), logits)
        assert (int(verdict.num_accepted), int(verdict.next_token)) == (accepted, following)


def test_verify_switches_on_temperature():
    """Temperature 0 is the greedy rule on every row; above 0 the rows are judged by their own keys."""
    logits = np.asarray(jax.random.normal(jax.random.key(3), (2, G + 1, V)))
    best = np.argmax(logits, -1)[:, :G].astype(np.int32)
    keys = jax.random.split(jax.random.key(4), 2)
    judge = jax.jit(verify)
    verdict = judge(keys, best, logits[:, :G], logits, jnp.float32(0))
    assert np.all(np.asarray(verdict.num_accepted) == G)
    assert np.all(np.asarray(verdict.next_token) == np.argmax(logits[:, G], -1))
    sampled = judge(keys, best, logits[:, :G], logits, jnp.float32(0.7))
    p = jax.jit(jax.nn.softmax)(logits / np.float32(0.7))
    alone = [jax.jit(verify_sampled)(keys[b], best[b], np.asarray(p)[b, :G], np.asarray(p)[b]) for b in range(2)]
    assert np.array_equal(sampled.next_token, [int(v.next_token) for v in alone])


def test_a_temperature_below_zero_is_refused():
    with pytest.raises(ValueError, match="temperature is -1"):
        verify(jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 0), int), jnp.zeros((1, 0, 3)), jnp.zeros((1, 1, 3)), -1)


def test_draw_follows_temperature():
    p = np.array([0.7, 0.2, 0.1])
    keys = jax.random.split(jax.random.key(0), 100_000)
    batch = np.broadcast_to(np.log(p).astype(np.float32), (100_000, 3))
    drawn = jax.jit(draw)
    assert np.all(np.asarray(drawn(keys, batch, jnp.float32(0))) == 0)
    for temperature in (0.5, 1.0, 2.0):
        exact = p ** (1 / temperature) / np.sum(p ** (1 / temperature))
        seen = np.bincount(drawn(keys, batch, jnp.float32(temperature)), minlength=3) / 100_000
        assert np.abs(seen - exact).max() < 5 * 0.5 / np.sqrt(100_000)


def test_no_draft_tokens_is_a_plain_draw():
    p = jnp.array([[0.7, 0.2, 0.1]])
    keys = jax.random.split(jax.random.key(0), 50_000)
    judge = jax.jit(jax.vmap(lambda key: verify_sampled(key, jnp.zeros(0, jnp.int32), jnp.zeros((0, 3)), p)))
    seen = np.bincount(judge(keys).next_token, minlength=3) / 50_000
    assert np.abs(seen - np.asarray(p[0])).max() < 0.012


_warp = jax.jit(warp, static_argnums=2)


def _slow_warp(logits, temperature, top_k, top_p):
    """The definition, in float64 with a sort: probabilities of what may be sampled."""
    z = np.asarray(logits, np.float64) / temperature
    if top_k:
        z = np.where(z >= np.sort(z)[-top_k], z, -np.inf)
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    order = np.argsort(-p, kind="stable")
    needed = np.searchsorted(np.cumsum(p[order]), top_p - 1e-9) + 1 if top_p < 1 else len(p)
    p = np.where(p >= p[order[min(needed, len(p)) - 1]], p, 0)
    return p / p.sum()


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.6), (0, 0.999), (7, 0.8), (1, 0.5), (0, 1e-6), (50, 0.9)])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_warp_is_its_definition(top_k, top_p, temperature):
    logits = 3 * np.asarray(jax.random.normal(jax.random.key(8), (20, 50)))
    warped = _warp(logits, jnp.float32(temperature), Cutoff(top_k, top_p))
    ours = np.asarray(jax.nn.softmax(warped, axis=-1))
    for row in range(20):
        slow = _slow_warp(logits[row], temperature, top_k, top_p)
        assert np.array_equal(np.asarray(ours[row]) > 0, slow > 0)
        assert np.allclose(ours[row], slow, atol=1e-6)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_the_fast_edge_is_the_sorted_one(top_p):
    probs = jnp.concatenate([
        jax.nn.softmax(3 * jax.random.normal(jax.random.key(3), (20, 50)), axis=-1),
        jnp.array([[0.25] * 4 + [0.0] * 46, [1.0] + [0.0] * 49]),
    ])  # fmt: skip
    assert np.array_equal(fast_nucleus_edge(probs, top_p), nucleus_edge(probs, top_p))


def test_tokens_that_tie_at_the_edge_stay_together():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.1, 0.1]]))
    kept = [np.flatnonzero(np.isfinite(_warp(logits, jnp.float32(1), c))).tolist() for c in (Cutoff(2), Cutoff(0, 0.5))]
    assert kept == [[0, 1, 2], [0, 1, 2]]


def test_top_p_holds_the_share_it_promises():
    """Over a real vocabulary's width: the kept mass reaches top_p, and would not without the least probable token kept."""
    logits = 4 * jax.random.normal(jax.random.key(9), (4, 49_152))
    p = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        kept = np.isfinite(np.asarray(_warp(logits, jnp.float32(1), Cutoff(0, top_p))))
        for row in range(4):
            mass, least = p[row][kept[row]].sum(), p[row][kept[row]].min()
            assert mass >= top_p - 1e-5 and mass - least < top_p + 1e-5
            assert p[row][~kept[row]].max() < least
