"""How flat a next-token distribution is, and the other per-token metrics, from one look at the logits.

With m = max z, s = Σ e^{z−m}, r = Σ e^{2(z−m)}, w = Σ (z−m)·e^{z−m} and the second largest logit, all metrics follow:

    metric    value                                           of an uncertain target, which is what selection keeps
    flatness  cos(p, uniform) = s / √(r·V)                    large (arXiv 2601.18902, Eq. 6)
    entropy   −Σ p log p = log s − w/s, nats                  large
    top1      p₁ = 1/s, the largest probability               small
    margin    p₁ − p₂                                         small
    energy    −logsumexp(z) = −(m + log s), temperature 1     large: little evidence for any token (arXiv 2010.03759)
    nll       −log p(x_{t+1}) = m + log s − z_{x_{t+1}}       large, as ppl = exp of its mean over a sample

Flatness is a monotone function of an entropy: cos(p, uniform) = 1/(√V·‖p‖₂) = exp(H₂/2)/√V with H₂ = −log Σp², the
Rényi entropy of order 2. `effective_choices` undoes the √V, and so compares targets of different vocabularies.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsfdd.base.records import TokenScores
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.counted import fold_counted
from jsfdd.models.target import head_logits

_LANES = 128  # divides nearly every vocabulary, and fills the vector registers of any CPU


def token_scores(logits: Float[Array, "*shape V"], next_token: Int[Array, "*shape"]) -> TokenScores:
    """The metrics of each distribution softmax(logits), in float32 whatever the logits' dtype.

    A logit of −inf is a token that cannot occur and adds nothing; it still belongs to V. A row without a finite
    logit, or with a NaN or +inf, gives NaN: no target means that.

    Args:
      logits: unnormalised log-probabilities.
      next_token: the token that followed, for nll.

    Returns:
      Float32 metrics of shape `shape`; flatness in [1/√V, 1], the others as in the module's table.

    Example:
      >>> token_scores(jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32)).flatness
      Array([1.], dtype=float32)
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    z = logits.reshape(-1, vocab).astype(jnp.float32)
    largest, second = _two_largest(z)
    below = z - largest[:, None]  # ≤ 0, so nothing overflows
    e = _computed_once(jnp.exp(below))
    s = jnp.sum(e, axis=-1)
    r = jnp.sum(e * e, axis=-1)
    w = _sum_of_products(jnp.maximum(below, -1e4), e)  # where e is 0 so must the product be, even for z = −inf
    z_next = jnp.take_along_axis(z, next_token.reshape(-1, 1), axis=-1)[:, 0]
    log_s = jnp.log(s)
    scores = TokenScores(
        flatness=jnp.clip(s * jax.lax.rsqrt(r * vocab), vocab**-0.5, 1.0),  # rounding oversteps the bounds
        entropy=jnp.maximum(log_s - w / s, 0.0),
        top1=1.0 / s,
        margin=jnp.abs(jnp.expm1(second - largest)) / s,
        energy=-(largest + log_s),
        nll=largest + log_s - z_next,
    )
    return jax.tree.map(lambda x: x.reshape(shape), scores)


def effective_choices(flatness: Float[Array, "*shape"], vocab_size: int) -> Float[Array, "*shape"]:
    """exp(H₂) = V·flatness², in [1, V]: as many equally likely tokens would be just as flat. Arrays of any library."""
    return vocab_size * flatness**2


def score_hidden(
    config: DecoderConfig,
    params: dict,
    hidden: Float[Array, "B T D"],
    next_tokens: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    block: int,
) -> TokenScores:
    """The metrics of the target's distributions at the counted tokens, float32[B, T]; 0 at the others.

    The head runs on `block` counted tokens at a time and on no others, so memory is block·V, whatever B·T is.

    Args:
      config, params: the target; only its head is used.
      hidden: its hidden states after the final norm.
      next_tokens: the token after each.
      counted: where the score counts (the index rule of `records.py`).
      block: tokens per round.
    """
    hidden_rows, next_rows = hidden.reshape(-1, hidden.shape[-1]), next_tokens.reshape(-1)

    def visit(rows: Int[Array, " block"], scores: Float[Array, "R metrics"]) -> Float[Array, "R metrics"]:
        # The rows that fill up the last block read zeros, and their scores are dropped.
        logits = head_logits(config, params, hidden_rows.at[rows].get(mode="fill", fill_value=0))
        visited = token_scores(logits, next_rows.at[rows].get(mode="fill", fill_value=0))
        return scores.at[rows].set(jnp.stack(visited, axis=-1), mode="drop")

    nothing = jnp.zeros((next_rows.shape[0], len(TokenScores._fields)), jnp.float32)
    scores = fold_counted(counted.reshape(-1), block, visit, nothing)
    return TokenScores(*[scores[:, i].reshape(counted.shape) for i in range(scores.shape[1])])


def _two_largest(z: Float[Array, "rows V"]) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """The largest and the second largest of each row, equal if the largest occurs twice; −inf if V is 1.

    The vocabulary is dealt out to lanes and only the lanes' maxima take a pass over it. The second largest is either
    another lane's maximum, or in the column of the largest.
    """
    z = jnp.pad(z, ((0, 0), (0, -z.shape[1] % _LANES)), constant_values=-jnp.inf)
    columns = z.reshape(z.shape[0], -1, _LANES)
    lane_max = jnp.max(columns, axis=1)
    lane = jnp.argmax(lane_max, axis=-1)
    column = jnp.take_along_axis(columns, lane[:, None, None], axis=2)[:, :, 0]
    place = jnp.argmax(column, axis=-1)
    largest = jnp.take_along_axis(column, place[:, None], axis=1)[:, 0]
    second = jnp.maximum(_max_without(lane_max, lane), _max_without(column, place))
    return largest, second


def _max_without(x: Float[Array, "rows n"], place: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """Each row's maximum over all but one of its entries."""
    return jnp.max(jnp.where(jnp.arange(x.shape[1])[None, :] == place[:, None], -jnp.inf, x), axis=-1)


def _sum_of_products(x: Float[Array, "rows V"], y: Float[Array, "rows V"]) -> Float[Array, " rows"]:
    """jnp.sum(x * y, axis=-1), in the form that XLA's CPU backend takes a quarter of the time for.

    There the plain sum leaves its fast path, and a sum of quarters keeps three quarters of the products in registers.
    """
    parts = math.gcd(x.shape[-1], 4)
    folded = sum(jnp.split(x * y, parts, axis=-1))
    return jnp.matmul(folded, jnp.ones(folded.shape[-1]), precision="highest")


def _computed_once(x: Array) -> Array:
    """`x`, kept in memory on a CPU, where XLA would compute it again for every sum over it.

    An accelerator's compiler takes all the sums in one pass and needs no copy.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
