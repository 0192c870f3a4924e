"""`flatness.token_scores` in fewer passes over the logits. Only `score_hidden` uses it; a test holds the two equal.

All scores follow from m = max z, s = Σ e^{z−m}, r = Σ e^{2(z−m)}, w = Σ (z−m)·e^{z−m} and the second largest logit:

    flatness = s/√(r·V)        top1   = 1/s                         energy = −(m + log s)
    entropy  = log s − w/s     margin = (1 − e^{second − m})/s      nll    = m + log s − z_x

On a CPU maxima and sums are written as they ran fastest there (experiments/001_scoring_overhead). An accelerator's compiler
fuses plain ones into one pass, and would keep two more arrays as large as the logits for what a CPU likes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsfdd.base.mesh import is_split_over_model
from jsfdd.base.records import TokenScores

_LANES = 128  # divides nearly every vocabulary, and fills the vector registers of any CPU


def fast_token_scores(logits: Float[Array, "rows V"], next_tokens: Int[Array, " rows"]) -> TokenScores:
    """The scores of `flatness.token_scores`, up to rounding."""
    vocab = logits.shape[-1]
    z = logits.astype(jnp.float32)
    largest, second = _two_largest(z)
    below = z - largest[:, None]  # ≤ 0, so nothing overflows
    e = _computed_once(jnp.exp(below))
    s = jnp.sum(e, axis=-1)
    r = jnp.sum(e * e, axis=-1)
    w = _sum_of_products(jnp.maximum(below, -1e4), e)  # the product must be 0 where e is, even for z = −inf
    z_next = jnp.take_along_axis(z, next_tokens[:, None], axis=-1)[:, 0]
    log_s = jnp.log(s)
    return TokenScores(
        flatness=jnp.clip(s * jax.lax.rsqrt(r * vocab), vocab**-0.5, 1.0),  # rounding may overstep the bounds
        entropy=jnp.maximum(log_s - w / s, 0.0),
        top1=1.0 / s,
        margin=jnp.abs(jnp.expm1(second - largest)) / s,
        energy=-(largest + log_s),
        nll=largest + log_s - z_next,
    )


def _two_largest(z: Float[Array, "rows V"]) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """The largest and the second largest of each row, equal if the largest occurs twice."""
    return _fastest(z, cpu=_two_largest_by_lanes, default=_two_largest_by_maxima)


def _two_largest_by_maxima(z: Float[Array, "rows V"]) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    return jnp.max(z, axis=-1), _max_without(z, jnp.argmax(z, axis=-1))


def _two_largest_by_lanes(z: Float[Array, "rows V"]) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """The vocabulary is dealt out to lanes, so that one pass finds every lane's maximum. The second largest is either the
    maximum of another lane, or in the lane of the largest.
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
    """The maximum of each row without the entry at `place`."""
    return jnp.max(jnp.where(jnp.arange(x.shape[1])[None, :] == place[:, None], -jnp.inf, x), axis=-1)


def _sum_of_products(x: Float[Array, "rows V"], y: Float[Array, "rows V"]) -> Float[Array, " rows"]:
    """jnp.sum(x * y, axis=-1)."""
    return _fastest(x, y, cpu=_folded_sum, default=lambda x, y: jnp.sum(x * y, axis=-1))


def _folded_sum(x: Float[Array, "rows V"], y: Float[Array, "rows V"]) -> Float[Array, " rows"]:
    """The same in a form that takes XLA's CPU backend a quarter of the time.

    The plain sum misses XLA's fast path there. Adding quarters first keeps three quarters of the products in registers.
    """
    parts = math.gcd(x.shape[-1], 4)
    folded = sum(jnp.split(x * y, parts, axis=-1))
    return jnp.matmul(folded, jnp.ones(folded.shape[-1]), precision="highest")


def _computed_once(x: Array) -> Array:
    """Keep `x` in memory on a CPU, where XLA would otherwise recompute it for every sum over it."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def _fastest(*arrays, cpu, default):
    """`cpu` of the arrays on a CPU, else `default`; and of a split vocabulary too, whose lanes and quarters would have to
    change devices (`base.mesh.is_split_over_model`)."""
    if is_split_over_model():
        return default(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=cpu, default=default)
