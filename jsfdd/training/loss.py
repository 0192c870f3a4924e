"""The draft's loss: the distance of its next hidden state, and of the distribution behind it, from the target's.

For every position t that counts, with h the target's hidden states and g_t = draft(embedding of x_{t+1}, h_t + noise), an
EAGLE-1/2 draft's loss is

    loss_t = hidden_weight · mean_D SmoothL1(g_t − h_{t+1}) + token_weight · distance(p_t, q_t)
    p_t = softmax(head(h_{t+1})),   q_t = softmax(head(g_t)),   distance: H(p, q) unless the recipe names another

(arXiv 2401.15077 §4.2, with the weights 1.0 and 0.1 of its code). An EAGLE-3 draft's (arXiv 2503.01840) is the distance alone,
with q from its own head: its state stands for nothing of the target's.

While decoding, the draft reads the target's states only at its first step, and its own after that. HASS (arXiv 2408.15766) and
EAGLE-3's training-time test train it so: step n reads the state of step n − 1, and its loss is added, times decay^(n − 1). The
gradient goes through the states. It reaches exactly the rows whose token decoding would verify, so the first drafted token of
an answer is trained.

Everything here returns *sums* over counted tokens, so that devices can add theirs up before anyone divides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jsfdd.base.records import DraftBatch
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import DraftConfig, draft_head, draft_steps
from jsfdd.models.target import embed_tokens, final_state
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_rows import num_outcomes, unpack
from jsfdd.training.token_loss import Distance
from jsfdd.training.visited_loss import Exact, Kind, Means, Sums, TopK, visited_loss


class LossSums(NamedTuple):
    """All sums of one batch.

    Attributes:
      total: what is minimised.
      steps: for each draft step the sums of `visited_loss` over the tokens that count for it, and of an EAGLE-1/2 draft
        "hidden_loss", the sum of mean_D SmoothL1.
    """

    total: Float[Array, ""]
    steps: tuple[Sums, ...]

    @property
    def counted(self) -> Float[Array, ""]:
        """What the sums are divided by: the weight of all tokens that the first draft step counts."""
        return self.steps[0]["counted"]


class Borrowed(NamedTuple):
    """The part of the target that its draft borrows and leaves as it is, both matrices [V, D]."""

    embedding: Float[Array, "V D"]
    head: Float[Array, "V D"] | None = None  # None where the embedding serves as head

    @property
    def output(self) -> Float[Array, "V D"]:
        """The head, whichever matrix serves as it."""
        return self.embedding if self.head is None else self.head


def borrow(config: DecoderConfig, target_params: dict) -> Borrowed:
    """What the draft needs of a target. A head that is not the embedding is stored as [D, V], and copied into [V, D].

    That costs memory once, and saves XLA's CPU backend a transposition in every block of every step.
    """
    head = None if config.tie_embeddings else target_params["head"]["kernel"].T
    return Borrowed(target_params["embed"]["embedding"], head)


def restrict(borrowed: Borrowed, draft: DraftConfig) -> Borrowed:
    """The same with the head's rows of the draft's vocabulary alone; whole for a draft that has its own head."""
    if not draft.vocabulary or draft.kind == "eagle3":
        return borrowed
    return Borrowed(borrowed.embedding, borrowed.output[np.array(draft.vocabulary)])


def loss_sums(
    params: dict,
    borrowed: Borrowed,
    batch: DraftBatch,
    noise_keys: Array | None,
    *,
    draft: DraftConfig,
    recipe: Recipe,
    block: int,
) -> LossSums:
    """The loss of a batch, summed over the tokens that count (records.py: the EAGLE pairing); float32.

    Args:
      params: the draft's.
      borrowed: from `borrow`. Where the batch has soft targets, only the head's rows of the draft's vocabulary (`restrict`);
        else the whole head, which is asked for p at every step.
      noise_keys: one key per row for the noise on the input, or None for none, as in evaluation.
      block: how many tokens meet the vocabulary at a time.
    """
    hidden = batch.hidden.astype(jnp.float32)
    embedding = embed_tokens(draft.decoder, {"embed": {"embedding": borrowed.embedding}}, batch.tokens[:, 1:])
    inputs, truth = hidden[:, :-1], final_state(draft.decoder, hidden[:, 1:])
    if draft.kind == "eagle":
        inputs = final_state(draft.decoder, inputs)
        if noise_keys is not None and recipe.hidden_noise:
            inputs = inputs + hidden_noise(noise_keys, batch.counted, inputs.shape[2], recipe.hidden_noise)
    compute = jnp.dtype(recipe.compute_dtype)
    params, embedding, inputs = jax.tree.map(lambda x: x.astype(compute), (params, embedding, inputs))
    kind, arrays = _what_is_known(batch, borrowed, truth, draft, recipe)
    restricted = draft.kind == "eagle" and batch.soft_targets is not None
    head = borrowed.output if restricted else draft_head(draft, params, borrowed.output)

    states, weights, reached = [], [], batch.counted[:, 1:]
    for predicted in draft_steps(draft, params, embedding, inputs, recipe.unrolled):
        states.append(predicted.astype(jnp.float32))
        weights.append(jnp.where(reached, batch.weight[:, 1:], 0.0))
        # Step n at t is reached from step n − 1 at t − 1: a draft of an answer starts in the answer.
        reached = batch.counted[:, 1:] & jnp.pad(reached[:, :-1], ((0, 0), (1, 0)))
    states, weights = jnp.stack(states), jnp.stack(weights)
    sums = visited_loss(
        kind, block, head, _rows(states), arrays, weights.reshape(-1), recipe.trains_head, recipe.step_weights
    )  # fmt: skip
    total = sums.pop("minimised")
    if draft.kind == "eagle":
        smooth_l1 = jnp.mean(optax.losses.huber_loss(states, jnp.broadcast_to(truth, states.shape)), axis=-1)
        sums["hidden_loss"] = jnp.sum(jnp.where(weights > 0, weights * smooth_l1, 0.0), axis=(1, 2))
        hidden_loss = jnp.sum(jnp.array(recipe.step_weights) * sums["hidden_loss"])
        total = recipe.hidden_weight * hidden_loss + recipe.token_weight * total
    return LossSums(total, tuple({name: values[n] for name, values in sums.items()} for n in range(recipe.unrolled)))


def _what_is_known(batch: DraftBatch, borrowed: Borrowed, truth, draft: DraftConfig, recipe: Recipe) -> tuple[Kind, Any]:
    """What a batch knows of the target's distributions of x_{t+2}, and its arrays, a row each token."""
    distance = Distance.from_recipe(recipe)
    if batch.soft_targets is None:
        return Exact(distance, draft.vocabulary), (borrowed.output, _rows(truth))
    rows = _rows(batch.soft_targets[:, 1:])
    stored = recipe.stored_soft_targets(hidden_is_stored=True)
    if (rows.dtype == jnp.uint16) != (stored == "top_k"):
        raise ValueError(f"soft_targets={recipe.soft_targets!r}, but the stored rows are of another kind ({rows.dtype})")
    if stored == "top_k":
        k = recipe.likeliest(len(draft.vocabulary) or draft.decoder.vocab_size)
        return TopK(distance), unpack(rows, k, num_outcomes(k, bool(draft.vocabulary)))
    if recipe.token_loss != "cross_entropy":
        raise ValueError(f"token_loss={recipe.token_loss!r} needs more of the target than means; store soft_targets='top_k'")
    return Means(), (rows[:, :-1], rows[:, -1].astype(jnp.float32))


def _rows(array: Float[Array, "*B N"]) -> Float[Array, "R N"]:
    return array.reshape(-1, array.shape[-1])


def hidden_noise(keys: Array, counted: Bool[Array, "B T"], width: int, scale: float) -> Float[Array, "B T-1 D"]:
    """(u − ½) · scale · 512 / L with u uniform in [0, 1) and L the length of the row's text: EAGLE's augmentation.

    L ends with the row's last answer. A row's noise depends on its key alone, not on how far the row is padded.
    """
    batch, length = counted.shape
    ends = jnp.max(jnp.where(counted, jnp.arange(length)[None, :] + 2, 1), axis=1)
    u = jax.vmap(lambda key: jax.random.uniform(key, (length - 1, width)))(keys)
    return (u - 0.5) * (scale * 512.0 / ends)[:, None, None]
