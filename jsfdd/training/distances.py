"""How far the draft's distribution q is from the target's p: plain functions of logits, in nats or shares.

    cross_entropy     −Σ p log q          EAGLE's soft labels (arXiv 2401.15077 §4.2); KL(p‖q) + H(p), so it has KL's gradient
    reverse_kl        Σ q log (q/p)       penalises tokens that the draft proposes, not those that it misses
    total_variation   ½ Σ |p − q|         1 − Σ min(p, q): the probability that a token drawn from q is rejected (2211.17192)
    hybrid            cross_entropy + total_variation: total variation alone has no gradient where p and q hardly overlap
    top_k_loss        −Σ p log q over the target's k likeliest tokens alone (HASS, arXiv 2408.15766 §3.1)

`coarse` joins outcomes: some tokens stay themselves, and all others become one. Joined outcomes are never farther apart than
the tokens were (the data-processing inequality), so a distance between them is a lower bound.

All take float32 logits with the vocabulary on `axis`, which their results lack. A draft logit of −∞ is a token that the draft
cannot propose; terms with its log q are left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Logits = Float[Array, "*tokens_and_vocabulary"]
PerToken = Float[Array, "*tokens"]


def cross_entropy(target: Logits, draft: Logits, axis: int = -1) -> PerToken:
    """H(p, q) = −Σ p log q, nats. At least H(p), where q = p."""
    return -jnp.sum(jax.nn.softmax(target, axis) * _log_q(draft, axis), axis)


def reverse_kl(target: Logits, draft: Logits, axis: int = -1) -> PerToken:
    """KL(q‖p) = Σ q log (q/p), nats. Zero where q = p."""
    return jnp.sum(jax.nn.softmax(draft, axis) * (_log_q(draft, axis) - jax.nn.log_softmax(target, axis)), axis)


def total_variation(target: Logits, draft: Logits, axis: int = -1) -> PerToken:
    """½ Σ |p − q|, in [0, 1]: one minus the acceptance of a token drawn from q."""
    return 0.5 * jnp.sum(jnp.abs(jax.nn.softmax(target, axis) - jax.nn.softmax(draft, axis)), axis)


def hybrid(target: Logits, draft: Logits, axis: int = -1) -> PerToken:
    """H(p, q) + ½ Σ |p − q|."""
    return cross_entropy(target, draft, axis) + total_variation(target, draft, axis)


DISTANCES = {
    "cross_entropy": cross_entropy,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
    "hybrid": hybrid,
}


def top_k_loss(target: Logits, draft: Logits, k: int, axis: int = -1) -> PerToken:
    """−Σ p log q over the k tokens that the target finds likeliest (with all that tie with the last of them), nats."""
    return -jnp.sum(top_k_share(target, k, axis) * _log_q(draft, axis), axis)


def first_k_loss(target: Logits, draft: Logits, k: int, axis: int = -1) -> PerToken:
    """`top_k_loss` where the first `k` outcomes are known to be the likeliest, as after `coarse`."""
    terms = jax.nn.softmax(target, axis) * _log_q(draft, axis)
    return -jnp.sum(jax.lax.slice_in_dim(terms, 0, k, axis=axis), axis)


def top_k_share(target: Logits, k: int, axis: int = -1) -> Logits:
    """p at the k likeliest tokens (and what ties with the last of them), 0 elsewhere; not normalised again."""
    smallest = jnp.min(jax.lax.top_k(target, k, axis=axis)[0], axis, keepdims=True)
    return jnp.where(target >= smallest, jax.nn.softmax(target, axis), 0.0)


def coarse(logits: Logits, tokens: Int[Array, "*tokens_and_k"], axis: int = -1) -> Logits:
    """Logits of fewer outcomes: of the K `tokens` of each distribution, and last of all others together.

    The last is −∞ where there are no others, which a draft's logit may be and a target's may not.
    """
    others = jnp.put_along_axis(logits, tokens, -jnp.inf, axis, inplace=False)
    tail = jax.nn.logsumexp(others, axis, keepdims=True)
    return jnp.concatenate([jnp.take_along_axis(logits, tokens, axis), tail], axis)


def _log_q(draft: Logits, axis: int) -> Logits:
    return jnp.where(jnp.isneginf(draft), 0.0, jax.nn.log_softmax(draft, axis))
