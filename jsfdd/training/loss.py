"""The draft's loss: how far its next hidden state, and the distribution behind it, are from the target's.

For every position t that counts, with h the target's hidden states and g_t = draft(embedding of x_{t+1}, h_t + noise):

    loss_t = hidden_weight · mean_D SmoothL1(g_t − h_{t+1}) + token_weight · distance(p_t, q_t)
    p_t = softmax(head(h_{t+1})),   q_t = softmax(head(g_t)),   distance: H(p, q) unless told otherwise (`distances.py`)

(arXiv 2401.15077 §4.2, with the weights 1.0 and 0.1 of its code). While decoding, the draft reads h only at its first
step, and its own g after that. HASS (arXiv 2408.15766) trains it so: step n reads g of step n − 1 in place of h, and its
loss is added. Everything here returns *sums* over counted tokens, so that devices can add theirs up before anyone divides.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jsfdd.base.records import DraftBatch
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import DraftConfig, allowed_tokens, draft_steps
from jsfdd.models.target import embed_tokens
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_rows import num_outcomes, unpack
from jsfdd.training.token_loss import Distance, TokenSums, coarse_loss, mean_loss, token_loss


class StepSums(NamedTuple):
    """Sums of one draft step over the tokens that count for it; `hidden_loss` is of mean_D SmoothL1."""

    hidden_loss: Float[Array, ""]
    tokens: TokenSums


class LossSums(NamedTuple):
    """All sums of one batch: what is minimised, and each draft step's part in it, from the first."""

    total: Float[Array, ""]
    steps: tuple[StepSums, ...]

    @property
    def counted(self) -> Float[Array, ""]:
        """What the sums are divided by: the weight of all tokens that the first draft step counts."""
        return self.steps[0].tokens.counted


class Borrowed(NamedTuple):
    """The part of the target that its draft borrows and leaves as it is, both matrices [V, D]."""

    embedding: Float[Array, "V D"]
    head: Float[Array, "V D"] | None  # None where the embedding serves as head

    @property
    def output(self) -> Float[Array, "V D"]:
        """The head, whichever matrix serves as it."""
        return self.embedding if self.head is None else self.head


def borrow(config: DecoderConfig, target_params: dict) -> Borrowed:
    """What the draft needs of a target. A head of its own, stored as [D, V], is copied into [V, D].

    That costs memory once, and saves XLA's CPU backend a transposition in every block of every step.
    """
    head = None if config.tie_embeddings else target_params["head"]["kernel"].T
    return Borrowed(target_params["embed"]["embedding"], head)


def restrict(frozen: Borrowed, draft_config: DraftConfig) -> Borrowed:
    """The same with the head's rows of the draft's vocabulary alone."""
    if not draft_config.vocabulary:
        return frozen
    return Borrowed(frozen.embedding, frozen.output[jnp.asarray(draft_config.vocabulary)])


def loss_sums(
    draft_params: dict,
    frozen: Borrowed,
    batch: DraftBatch,
    noise_keys: Array | None,
    *,
    target_config: DecoderConfig,
    draft_config: DraftConfig,
    options: Recipe,
    block: int,
) -> LossSums:
    """The loss of a batch, summed over the tokens that count (records.py: the EAGLE pairing); float32.

    Args:
      frozen: from `borrow`.
      batch: where it has what is known of the target's distributions, its likeliest tokens with --target-top-k and else its
        means, of the head only the rows of the draft's vocabulary are needed (`restrict`); else the whole head is asked again.
      noise_keys: one key per row for the noise on the input, or None for none, as in evaluation.
      block: how many tokens meet the vocabulary at a time.
    """
    hidden = batch.hidden.astype(jnp.float32)
    embedding = embed_tokens(target_config, {"embed": {"embedding": frozen.embedding}}, batch.tokens[:, 1:])
    inputs, truth = hidden[:, :-1], hidden[:, 1:]
    if noise_keys is not None and options.hidden_noise:
        inputs = inputs + hidden_noise(noise_keys, batch.counted, inputs.shape[2], options.hidden_noise)
    compute = jnp.dtype(options.compute_dtype)
    params, embedding, inputs = jax.tree.map(lambda x: x.astype(compute), (draft_params, embedding, inputs))

    allowed, k = allowed_tokens(draft_config), options.target_top_k

    def of_step(predicted, weight) -> StepSums:
        distance = jnp.mean(optax.losses.huber_loss(predicted, truth), axis=-1)
        hidden_loss = jnp.sum(jnp.where(weight > 0, weight * distance, 0.0))
        rows = weight.size
        predicted, weight = predicted.reshape(rows, -1), weight.reshape(rows)
        if batch.known is None:
            truth_rows = truth.reshape(rows, -1)
            tokens = token_loss(Distance.of(options), block, frozen.output, predicted, truth_rows, weight, allowed)
        elif options.target_top_k:
            known = unpack(batch.known[:, 1:].reshape(rows, -1), k, num_outcomes(k, allowed is not None))
            tokens = coarse_loss(Distance.of(options), block, frozen.output, predicted, *known, weight)
        else:
            means = batch.known[:, 1:].reshape(rows, -1)
            mass = means[:, -1].astype(jnp.float32)
            tokens = mean_loss(block, frozen.output, predicted, means[:, :-1], mass, weight)
        return StepSums(hidden_loss, tokens)

    steps, weight, reached = [], batch.weight[:, 1:], batch.counted[:, 1:]
    for predicted in draft_steps(draft_config, params, embedding, inputs, options.hass_steps):
        steps.append(of_step(predicted.astype(jnp.float32), jnp.where(reached, weight, 0.0)))
        # Step n at t is reached from step n − 1 at t − 1: a draft of an answer starts in the answer.
        reached = batch.counted[:, 1:] & jnp.pad(reached[:, :-1], ((0, 0), (1, 0)))
    total = sum(options.hidden_weight * step.hidden_loss + options.token_weight * step.tokens.distance for step in steps)
    return LossSums(total, tuple(steps))


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
