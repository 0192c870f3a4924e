"""The EAGLE loss: how far the draft's next hidden state, and the distribution behind it, are from the target's.

For every position t that counts, with h the target's hidden states and g_t = draft(embedding of x_{t+1}, h_t + noise):

    loss_t = hidden_weight · mean_D SmoothL1(g_t − h_{t+1}) + token_weight · H(p_t, q_t)
    p_t = softmax(head(h_{t+1})),   q_t = softmax(head(g_t)),   H(p, q) = −Σ_v p_v log q_v

(arXiv 2401.15077 §4.2, with the weights 1.0 and 0.1 of its code). Everything here returns *sums* over counted tokens,
so that devices can add theirs up before anyone divides.

The head dominates: it is 85-90% of a step's arithmetic. `token_loss` visits only the tokens that count, a block at a
time, and its gradient with respect to g, (q − p) @ headᵀ, is worked out in the forward pass while p and q are at hand.
That makes three matrix products in all, with nothing of size tokens × V kept for the backward pass, which only scales.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jsfdd.config import TrainingOptions
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.counted import fold_counted
from jsfdd.models.draft import Draft, DraftConfig
from jsfdd.models.target import embed_tokens
from jsfdd.records import DraftBatch


class TokenSums(NamedTuple):
    """Sums over counted tokens, float32 scalars; divided by `counted` they are the means that a person reads."""

    counted: Float[Array, ""]  # tokens that count
    cross_entropy: Float[Array, ""]  # H(p, q), nats
    target_entropy: Float[Array, ""]  # H(p), nats: the least that H(p, q) can become; KL(p‖q) is the difference
    agreement: Float[Array, ""]  # 1 where the draft's likeliest token is the target's
    acceptance: Float[Array, ""]  # Σ_v min(p, q): the chance that a token drawn from q is accepted, α at depth 1


class LossSums(NamedTuple):
    """All sums of one batch; `hidden_loss` is of mean_D SmoothL1."""

    total: Float[Array, ""]
    hidden_loss: Float[Array, ""]
    tokens: TokenSums


class Borrowed(NamedTuple):
    """The part of the target that its draft borrows and leaves as it is, both matrices [V, D]."""

    embedding: Float[Array, "V D"]
    head: Float[Array, "V D"] | None  # None where the embedding serves as head


def borrow(config: DecoderConfig, target_params: dict) -> Borrowed:
    """What the draft needs of a target. A head of its own, stored as [D, V], is copied into [V, D].

    That costs memory once, and saves XLA's CPU backend a transposition in every block of every step.
    """
    head = None if config.tie_embeddings else target_params["head"]["kernel"].T
    return Borrowed(target_params["embed"]["embedding"], head)


def loss_sums(
    draft_params: dict,
    frozen: Borrowed,
    batch: DraftBatch,
    noise_keys: Array | None,
    *,
    target_config: DecoderConfig,
    draft_config: DraftConfig,
    options: TrainingOptions,
    block: int,
) -> LossSums:
    """The loss of a batch, summed over the tokens that count (records.py: the EAGLE pairing); float32.

    Args:
      frozen: from `borrow`.
      noise_keys: one key per row for the noise on the input, or None for none, as in evaluation.
      block: how many tokens meet the vocabulary at a time.
    """
    hidden = batch.hidden.astype(jnp.float32)
    embedding = embed_tokens(target_config, {"embed": {"embedding": frozen.embedding}}, batch.tokens[:, 1:])
    inputs, truth = hidden[:, :-1], hidden[:, 1:]
    counted = batch.counted[:, 1:]
    if noise_keys is not None and options.hidden_noise:
        inputs = inputs + hidden_noise(noise_keys, batch.counted, inputs.shape[2], options.hidden_noise)
    predicted = Draft(draft_config).apply({"params": draft_params}, embedding.astype(jnp.float32), inputs)

    distance = jnp.mean(optax.losses.huber_loss(predicted, truth), axis=-1)
    hidden_loss = jnp.sum(jnp.where(counted, distance, 0.0))
    head, width = frozen.embedding if frozen.head is None else frozen.head, predicted.shape[-1]
    tokens = token_loss(block, head, predicted.reshape(-1, width), truth.reshape(-1, width), counted.reshape(-1))
    total = options.hidden_weight * hidden_loss + options.token_weight * tokens.cross_entropy
    return LossSums(total, hidden_loss, tokens)


def hidden_noise(
    keys: Array, counted: Bool[Array, "B T"], width: int, scale: float
) -> Float[Array, "B T-1 D"]:
    """(u − ½) · scale · 512 / L with u uniform in [0, 1) and L the length of the row's text: EAGLE's augmentation.

    L ends with the row's last answer. A row's noise depends on its key alone, not on how far the row is padded.
    """
    batch, length = counted.shape
    ends = jnp.max(jnp.where(counted, jnp.arange(length)[None, :] + 2, 1), axis=1)
    u = jax.vmap(lambda key: jax.random.uniform(key, (length - 1, width)))(keys)
    return (u - 0.5) * (scale * 512.0 / ends)[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_loss(
    block: int,
    head: Float[Array, "V D"],
    predicted: Float[Array, "R D"],
    truth: Float[Array, "R D"],
    counted: Bool[Array, " R"],
) -> TokenSums:
    """Cross entropy between the distributions of `truth` (p) and `predicted` (q), and what goes with it.

    Only `cross_entropy` has a gradient, and only with respect to `predicted`: the target is frozen. The matrix products
    are in the head's dtype, all else in float32.
    """
    return _visit_tokens(block, head, predicted, truth, counted, with_gradient=False)[0]


def _token_loss_forward(block, head, predicted, truth, counted):
    return _visit_tokens(block, head, predicted, truth, counted, with_gradient=True)


def _token_loss_backward(block, gradient, cotangent: TokenSums):
    return None, gradient * cotangent.cross_entropy, None, None


token_loss.defvjp(_token_loss_forward, _token_loss_backward)


def _visit_tokens(block, head, predicted, truth, counted, with_gradient):
    """(TokenSums, d cross_entropy / d predicted [R,D], or [0,D] unless asked for).

    Logits are [V, block] with the vocabulary on the *leading* axis: sums and maxima over it then run in step for all
    the block's tokens, which XLA's CPU backend vectorises, and over a trailing axis does not.
    """

    def product(a, b, axis_a, axis_b):
        a, b, contract = a.astype(head.dtype), b.astype(head.dtype), (((axis_a,), (axis_b,)), ((), ()))
        return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)

    def logits(rows, hidden):
        return product(head, hidden.at[rows].get(mode="fill", fill_value=0.0), 1, 1)

    def visit(rows, carry):
        sums, gradient = carry
        valid = rows < counted.shape[0]
        z_p, z_q = logits(rows, truth), logits(rows, predicted)
        top_p, top_q = jnp.max(z_p, axis=0), jnp.max(z_q, axis=0)
        e_p, e_q = jnp.exp(z_p - top_p[None]), jnp.exp(z_q - top_q[None])
        s_p, s_q = jnp.sum(e_p, axis=0), jnp.sum(e_q, axis=0)
        gap = e_q * (1.0 / s_q)[None] - e_p * (1.0 / s_p)[None]  # q − p
        of_block = TokenSums(
            counted=jnp.ones(rows.shape),
            cross_entropy=top_q + jnp.log(s_q) - jnp.sum(e_p * z_q, axis=0) / s_p,
            target_entropy=top_p + jnp.log(s_p) - jnp.sum(e_p * z_p, axis=0) / s_p,
            # The draft agrees when its score of the target's likeliest token is its own highest: no argmax, no index.
            agreement=jnp.max(jnp.where(z_p == top_p[None], z_q, -jnp.inf), axis=0) == top_q,
            acceptance=1.0 - 0.5 * jnp.sum(jnp.abs(gap), axis=0),  # Σ min(p, q) = 1 − ½ Σ |p − q|
        )
        sums = jax.tree.map(lambda total, each: total + jnp.sum(jnp.where(valid, each, 0.0)), sums, of_block)
        if with_gradient:
            gradient = gradient.at[rows].set(product(gap, head, 0, 0), mode="drop")
        return sums, gradient

    rows = len(predicted) if with_gradient else 0
    zeros = TokenSums(*(jnp.zeros(()) for _ in TokenSums._fields))
    return fold_counted(counted, block, visit, (zeros, jnp.zeros((rows, predicted.shape[1]))))
