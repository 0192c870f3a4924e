"""The losses of `token_loss.py` as training runs them: a block of tokens at a time, and only tokens that count.

The head dominates training: it is 85-90% of the arithmetic of SmolLM2's step. So nothing of size tokens × V outlives its
block, and the gradient is worked out in the forward pass, while the logits are at hand: the backward pass only scales it.

    sums = visited_loss(kind, block, head, predicted, target, weight)       # sums["minimised"] has a gradient

All draft steps are visited in one loop: it is compiled once, and the gradient of a head that learns is one array, however many
steps there are. `head` is what the draft's outputs are multiplied with, a row each token of its vocabulary: the target's rows,
or an EAGLE-3 draft's own, which learn too where `trains_head`. A *kind* says what is known of the target's distribution p:
`Exact`, `Means` or `TopK`. Each has one method, `of_block`, the equations for one block; all else is shared. Sums are over a
draft step's tokens that count, each times its weight; divided by "counted" they are means:

    counted                         the weights' own sum; without weights, the tokens that count
    distance                        `minimised` is its sum over the draft steps, each times its factor
    cross_entropy, target_entropy   H(p, q) and H(p) in nats; their difference is KL(p‖q)
    agreement                       1 where the draft's likeliest token is the target's
    acceptance                      Σ_v min(p, q): the chance that a token drawn from q is accepted, α at depth 1
    coverage                        Σ p over the draft's vocabulary: the most that acceptance can become

                                    Exact   Exact, draft vocabulary   Means   TopK   TopK, draft vocabulary
    counted, distance                 ✓               ✓                 ✓       ✓              ✓
    cross_entropy, target_entropy     ✓
    agreement                         ✓               ✓                         ✓
    acceptance                        ✓               ✓
    coverage                                          ✓                                        ✓

**The layout.** Logits of a block are [V, block], the vocabulary on the leading axis. XLA's CPU backend vectorises sums over it,
because they run in step for all the block's tokens, and does not vectorise sums over a trailing axis. For an accelerator
either layout will do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsfdd.models.counted import fold_counted
from jsfdd.training.distances import coarse, cross_entropy, total_variation
from jsfdd.training.token_loss import Distance

Sums = dict[str, Float[Array, "*steps"]]
Terms = dict[str, Float[Array, " block"]]
# d distance / d predicted [block, D], and d distance / d z_q [Vq, block]; computed only where it is called.
Slope = Callable[[], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Exact:
    """All of p is known: `target` is (the target's head [V, D], its hidden states h [R, D])."""

    distance: Distance
    vocabulary: tuple[int, ...] = ()  # the draft's, empty for all tokens

    def of_block(self, head, predicted, z_q, target) -> tuple[Terms, Slope]:
        """`token_loss`."""
        z_p = vocabulary_logits(*target)
        tokens = np.array(self.vocabulary, np.int32)

        def of_all_tokens(z_q):
            return jnp.full(z_p.shape, -jnp.inf).at[tokens].set(z_q) if self.vocabulary else z_q

        distance, pull_back = jax.vjp(lambda z_q: self.distance.between(z_p, of_all_tokens(z_q), axis=0), z_q)
        z_q = of_all_tokens(z_q)
        # The draft agrees when its score of the target's likeliest token is its own highest: no argmax, no index.
        score = jnp.max(jnp.where(z_p == jnp.max(z_p, 0, keepdims=True), z_q, -jnp.inf), axis=0)
        terms = {
            "distance": distance,
            "agreement": score == jnp.max(z_q, axis=0),
            "acceptance": 1.0 - total_variation(z_p, z_q, axis=0),
        }
        if not self.vocabulary:
            terms |= {"cross_entropy": cross_entropy(z_p, z_q, axis=0), "target_entropy": cross_entropy(z_p, z_p, axis=0)}
        else:
            terms["coverage"] = jnp.sum(jax.nn.softmax(z_p, axis=0)[tokens], axis=0)
        return terms, lambda: _through(head, pull_back(jnp.ones_like(distance))[0])


@dataclasses.dataclass(frozen=True)
class Means:
    """p's mean head vectors are known: `target` is (e [R, D], mass [R]). The distance is the cross entropy.

    `head` is the target's, of which e is the mean: one that learns would leave it behind. The rounding is that of e, which is
    stored in bfloat16 unless told otherwise: the gradient is the exact one of a target that is off by as much.
    """

    def of_block(self, head, predicted, z_q, target) -> tuple[Terms, Slope]:
        """`mean_loss`, with d/dg = mass · Σ q_v head_v − e."""
        mean, mass = target
        mean = mean.astype(jnp.float32)
        top = jnp.max(z_q, axis=0)
        above = jnp.exp(z_q - top[None])
        total = jnp.sum(above, axis=0)
        distance = mass * (top + jnp.log(total)) - jnp.sum(mean * predicted, axis=1)
        return {"distance": distance}, lambda: (times_head(above, head) * (mass / total)[:, None] - mean, above)


@dataclasses.dataclass(frozen=True)
class TopK:
    """p's likeliest tokens are known: `target` is (log_probs [R, M], ids [R, K]), as in `token_loss.coarse_loss`."""

    distance: Distance

    def of_block(self, head, predicted, z_q, target) -> tuple[Terms, Slope]:
        """`coarse_loss`. The gradient moves the other tokens' probabilities together, in proportion."""
        log_p, ids = (array.T for array in target)
        beyond = len(log_p) - len(ids) - 1  # the number of outcomes that the draft cannot propose: 1 with a draft vocabulary

        def minimised(z_q):
            log_q = jnp.pad(coarse(z_q, ids, axis=0), ((0, beyond), (0, 0)), constant_values=-jnp.inf)
            return self.distance.between_outcomes(log_p, log_q, axis=0)

        distance, pull_back = jax.vjp(minimised, z_q)
        terms = {"distance": distance}
        if beyond:
            terms["coverage"] = 1.0 - jax.nn.softmax(log_p, axis=0)[-1]
        else:
            terms["agreement"] = jnp.take_along_axis(z_q, ids[:1], axis=0)[0] == jnp.max(z_q, axis=0)
        return terms, lambda: _through(head, pull_back(jnp.ones_like(distance))[0])


Kind = Exact | Means | TopK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 6, 7))
def visited_loss(
    kind: Kind,
    block: int,
    head: Float[Array, "Vq D"],
    predicted: Float[Array, "N*R D"],
    target: Any,
    weight: Float[Array, " N*R"],
    trains_head: bool = False,
    factors: tuple[float, ...] = (1.0,),
) -> Sums:
    """The sums of the module's table, [N] for N draft steps, and "minimised", which alone has a gradient.

    The gradient is by `predicted` and, if it learns, by `head`.

    Args:
      kind: what is known of p.
      block: tokens that meet the head at a time.
      head: the draft's, rows of its vocabulary alone. Products are in its dtype, all else in float32.
      predicted: g, of all tokens at the first step, then at the second, …
      target: as the kind says, of R tokens.
      weight: of each row of `predicted`, 0 where it does not count and then costs nothing.
      trains_head: whether the head has a gradient. It costs a third product of each token with the head.
      factors: of each draft step's distance in what is minimised.

    Raises:
      ValueError: a head that learns, and of p only the means under the target's.
    """
    return _visit(kind, block, head, predicted, target, weight, trains_head, factors, with_gradient=False)[0]


def _visit(kind, block, head, predicted, target, weight, trains_head, factors, with_gradient):
    """(sums, (d minimised / d predicted, d minimised / d head)); an array without rows where there is no gradient."""
    if trains_head and isinstance(kind, Means):
        raise ValueError("means know p by the target's head, and a head that learns leaves it: store the top k")
    num_steps, (num_rows, width) = len(factors), predicted.shape
    num_tokens = num_rows // num_steps

    def block_terms(rows):
        g = block_rows(predicted, rows)
        tokens = jnp.where(rows < num_rows, rows % num_tokens, num_tokens)  # rows that fill a block up have no token
        terms, slope = kind.of_block(head, g, vocabulary_logits(head, g), _block_of(kind, target, tokens))
        return {"counted": jnp.ones(len(rows)), **terms}, slope, g

    def visit(rows, carry):
        sums, (by_predicted, by_head) = carry
        w, step = block_rows(weight, rows), rows // num_tokens
        terms, slope, g = block_terms(rows)
        counts = (w > 0)[None] & (step[None] == jnp.arange(num_steps)[:, None])
        terms = {name: jnp.where(counts, (w * term)[None], 0.0) for name, term in terms.items()}
        sums = {name: sums[name] + jnp.sum(term, axis=1) for name, term in terms.items()}
        if with_gradient:
            of_predicted, of_logits = slope()
            w = w * block_rows(jnp.array(factors), step)
            by_predicted = by_predicted.at[rows].set(w[:, None] * of_predicted, mode="drop")
            if trains_head:
                by_head = by_head + times_rows(of_logits, w[:, None] * g, head.dtype)
        return sums, (by_predicted, by_head)

    names = jax.eval_shape(lambda rows: block_terms(rows)[0], jnp.zeros(block, int))
    sizes = (num_rows if with_gradient else 0, len(head) if with_gradient and trains_head else 0)
    gradients = tuple(jnp.zeros((size, width)) for size in sizes)
    sums, gradients = fold_counted(weight > 0, block, visit, ({name: jnp.zeros(num_steps) for name in names}, gradients))
    return {**sums, "minimised": jnp.sum(jnp.array(factors) * sums["distance"])}, gradients


def _forward(kind, block, head, predicted, target, weight, trains_head, factors):
    sums, (by_predicted, by_head) = _visit(
        kind, block, head, predicted, target, weight, trains_head, factors, with_gradient=True
    )  # fmt: skip
    return sums, (by_predicted, by_head.astype(head.dtype))


def _backward(kind, block, trains_head, factors, gradients, cotangent: Sums):
    by_predicted, by_head = gradients
    slope = cotangent["minimised"]
    return by_head * slope.astype(by_head.dtype) if trains_head else None, by_predicted * slope, None, None


visited_loss.defvjp(_forward, _backward)


def _block_of(kind: Kind, target, rows):
    """The part of `target` that belongs to a block."""
    if isinstance(kind, Exact):
        target_head, truth = target
        return target_head, block_rows(truth, rows)
    return jax.tree.map(lambda array: block_rows(array, rows), target)


def _through(head, slope: Float[Array, "Vq block"]) -> tuple[Array, Array]:
    return times_head(slope, head), slope


def block_rows(array: Array, rows: Int[Array, " block"]) -> Array:
    """A block's rows of an array. Rows past the end, which only fill the block up, are 0."""
    return array.at[rows].get(mode="fill", fill_value=0)


def vocabulary_logits(head: Float[Array, "V D"], hidden: Float[Array, "block D"]) -> Float[Array, "V block"]:
    """float32 logits with the vocabulary on the leading axis (see above)."""
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(head, hidden.astype(head.dtype), contract, preferred_element_type=jnp.float32)


def times_head(slope: Float[Array, "V block"], head: Float[Array, "V D"]) -> Float[Array, "block D"]:
    """Σ_v slope_v · head_v of each token, float32."""
    contract = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(slope.astype(head.dtype), head, contract, preferred_element_type=jnp.float32)


def times_rows(slope: Float[Array, "V block"], predicted: Float[Array, "block D"], dtype) -> Float[Array, "V D"]:
    """Σ over the tokens of slope · predicted: what a block adds to the gradient of the head, a product in `dtype`, float32."""
    contract = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(slope.astype(dtype), predicted.astype(dtype), contract, preferred_element_type=jnp.float32)
