"""How far the draft's distribution q is from the target's p: plain functions of logits, all of them in nats or shares.

    cross_entropy     −Σ p log q          EAGLE's soft labels (arXiv 2401.15077 §4.2); KL(p‖q) + H(p), so KL's own gradient
    reverse_kl        Σ q log (q/p)       heeds what the draft says, not all that the target might have said
    total_variation   ½ Σ |p − q|         1 − Σ min(p, q): the chance that a token drawn from q is refused (arXiv 2211.17192)
    hybrid            the first + the third: total variation alone gives no slope where p and q hardly overlap
    top_k_loss        −Σ p log q over the target's k likeliest tokens alone (HASS, arXiv 2408.15766 §3.1)

Between `coarse` outcomes, some tokens and all others as one, each is at most what it is between tokens: to join outcomes can
only bring distributions nearer (the data-processing inequality), so what is found there is a lower bound.

Logits are [V, N] float32 with the vocabulary on the *leading* axis, where XLA's CPU backend vectorises the sums; each
function gives float32[N]. A draft logit of −inf is a token that the draft cannot propose; where log q stands, it is left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Logits = Float[Array, "V N"]
PerToken = Float[Array, " N"]


def cross_entropy(target: Logits, draft: Logits) -> PerToken:
    """H(p, q) = −Σ p log q, nats. At least H(p), where q = p."""
    return -jnp.sum(jax.nn.softmax(target, axis=0) * _log_q(draft), axis=0)


def reverse_kl(target: Logits, draft: Logits) -> PerToken:
    """KL(q‖p) = Σ q log (q/p), nats. Zero where q = p."""
    return jnp.sum(jax.nn.softmax(draft, axis=0) * (_log_q(draft) - jax.nn.log_softmax(target, axis=0)), axis=0)


def total_variation(target: Logits, draft: Logits) -> PerToken:
    """½ Σ |p − q|, in [0, 1]: one minus the acceptance of a token drawn from q."""
    return 0.5 * jnp.sum(jnp.abs(jax.nn.softmax(target, axis=0) - jax.nn.softmax(draft, axis=0)), axis=0)


def hybrid(target: Logits, draft: Logits) -> PerToken:
    """H(p, q) + ½ Σ |p − q|."""
    return cross_entropy(target, draft) + total_variation(target, draft)


def top_k_loss(target: Logits, draft: Logits, k: int) -> PerToken:
    """−Σ p log q over the k tokens that the target finds likeliest (with all that tie with the last of them), nats."""
    return -jnp.sum(top_k_share(target, k) * _log_q(draft), axis=0)


def first_k_loss(target: Logits, draft: Logits, k: int) -> PerToken:
    """`top_k_loss` where the first `k` outcomes are known to be those: −Σ p log q over them, nats."""
    return -jnp.sum((jax.nn.softmax(target, axis=0) * _log_q(draft))[:k], axis=0)


def top_k_share(target: Logits, k: int) -> Logits:
    """p at the k likeliest tokens (and what ties with the last of them), 0 elsewhere; not normalised again."""
    least = jax.lax.top_k(target.T, k)[0][:, -1]
    return jnp.where(target >= least[None], jax.nn.softmax(target, axis=0), 0.0)


def coarse(logits: Logits, tokens: Int[Array, "K N"]) -> Float[Array, "K1 N"]:
    """Logits of fewer outcomes: of each distribution its own `tokens`, and last all the others together.

    The last is −inf where there are no others, which is a draft's logit and not a target's.
    """
    columns = jnp.arange(logits.shape[1])[None]
    others = logits.at[tokens, columns].set(-jnp.inf)
    return jnp.concatenate([logits[tokens, columns], jax.nn.logsumexp(others, axis=0, keepdims=True)])


def _log_q(draft: Logits) -> Logits:
    return jnp.where(jnp.isneginf(draft), 0.0, jax.nn.log_softmax(draft, axis=0))


DISTANCES = {
    "cross_entropy": cross_entropy,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
    "hybrid": hybrid,
}
