"""A mixture of experts in the place of the MLP: of E gated feed-forward blocks a token is read by the k likeliest.

    p = softmax(x · router)                                    # [N, E], float32
    w, e = top_k(p, k)                                         # w divided by its sum where the model's config says so
    y = Σ_k w_k · down_{e_k}(silu(gate_{e_k}(x)) · up_{e_k}(x))

Tokens are sorted by expert, so that every expert multiplies its own rows alone, in one `jax.lax.ragged_dot` for all. Over
"model" every expert is cut as an MLP is (`models/sharding.py`): of whole experts on different devices the compiler would gather
the weights.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsfdd.models.architecture import DecoderConfig, Experts


class Kernel(nn.Module):
    """A matrix [in, out], or one for each expert [E, in, out]."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        init = nn.initializers.lecun_normal(batch_axis=tuple(range(len(self.shape) - 2)))
        return self.param("kernel", init, self.shape)


class ExpertsMLP(nn.Module):
    """The routed feed-forward block of a config with `experts`."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """y as in the module's equations."""
        experts, width = self.config.experts, self.config.hidden_size
        wide, narrow = (experts.count, width, experts.intermediate_size), (experts.count, experts.intermediate_size, width)
        router = Kernel((width, experts.count), name="router")()
        gate, up = Kernel(wide, name="gate_experts")(), Kernel(wide, name="up_experts")()
        down = Kernel(narrow, name="down_experts")()
        tokens = x.reshape(-1, width)
        weights, chosen = route(tokens, router, experts)
        return visit(tokens, weights, chosen, gate, up, down).astype(x.dtype).reshape(x.shape)


def route(
    tokens: Float[Array, "N D"], router: Float[Array, "D E"], experts: Experts
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """The float32 weights and the numbers of the experts that read each token, likeliest first."""
    probabilities = jax.nn.softmax(jnp.dot(tokens, router, preferred_element_type=jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, experts.chosen)
    if experts.normalised:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


def visit(
    tokens: Float[Array, "N D"],
    weights: Float[Array, "N k"],
    chosen: Int[Array, "N k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "N D"]:
    """The weighted sum, in float32, of what the chosen experts make of each token."""
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # places of `chosen`, those of the first expert first
    sizes = jnp.sum(chosen.reshape(-1, 1) == jnp.arange(len(gate))[None], axis=0, dtype=jnp.int32)
    rows = tokens[order // chosen.shape[1]]
    inner = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    y = jax.lax.ragged_dot(inner, down, sizes)[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.sum(y.astype(jnp.float32) * weights[:, :, None], axis=1)
