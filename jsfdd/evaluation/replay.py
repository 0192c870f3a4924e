"""Replay: measure a draft's acceptance without decoding, on answers that the target wrote once.

    recorded = record(target, prompts, mesh, …)                    # the target answers, once
    hidden = store_hidden(…, recorded.samples, …)                  # and reads its answers, once
    judge = make_judge(target, hidden, recorded, draft, mesh, …)   # compiled once for all drafts of one shape
    counts = walk(recorded, judge(draft_params))                   # the counts that decoding would give

A lossless decoder emits the target's text with any draft. So the text is decoded once, and a draft is measured by its
predictions at every position of that text. HASS's step i (`models.draft.draft_steps`) drafts i tokens ahead at all positions
at once, without running the target. At temperature 0 a draft token is accepted if it is the text's next token, and the counts
are exactly the decoder's. Above 0, speculative sampling (`decoding.verify`) emits x with probability p(x), and emits x as an
accepted draft token with probability min(p(x), q(x)). So, given the text,

    P(accepted | x) = min(1, q(x) / p(x))

independently from step to step. `walk` sums over all ways to cut the text into steps, so the text is the only source of
randomness left. This module replays chains; `replay_trees.py` replays trees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jsfdd.base.mesh import map_over_devices, own_rows, replicate, round_up_to_shards, shard_rows, to_host
from jsfdd.base.records import DraftBatch, Prompt, Sample
from jsfdd.base.tuning import vocabulary_block
from jsfdd.data.batches import choose_shapes, make_batches, next_power_of_two
from jsfdd.decoding.conversation_log import Answer
from jsfdd.decoding.conversations import PromptGroup, by_width, hold, read_answer
from jsfdd.decoding.generate import make_generate, prepare_params
from jsfdd.decoding.prompts import prompt_batch, questions_in
from jsfdd.decoding.settings import decode_setup
from jsfdd.evaluation.acceptance import AcceptanceCounts, no_counts
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.counted import fold_counted
from jsfdd.models.draft import DraftConfig, draft_head, draft_steps
from jsfdd.models.target import embed_tokens, final_state
from jsfdd.training.batch import PerToken, TrainingData, device_batch
from jsfdd.training.loss import Borrowed, borrow
from jsfdd.training.visited_loss import block_rows, vocabulary_logits
from jsfdd.weights.target import Target


class Recorded(NamedTuple):
    """The target's answers, and how they were decoded.

    Attributes:
      samples: one per turn: the conversation up to that turn and its answer, where `assistant_mask` is True.
      prompts: int[N], the number of each sample's prompt; the turns of one prompt are adjacent.
      temperature: the temperature of the answers.
      max_new_tokens: the longest answer that counts.
      ahead: answers that did not stop are recorded for this many more tokens, since a decoder's last step may overshoot.
      stop_tokens: the target's.
    """

    samples: list[Sample]
    prompts: np.ndarray
    temperature: float
    max_new_tokens: int
    ahead: int
    stop_tokens: tuple[int, ...]


class Judged(NamedTuple):
    """A draft's predictions at every position of one text, at each depth i = 1 … G; 0 where no step can reach.

    Entry [i − 1, t] is about token t + 2, from the draft step that reads x_{t+1}.

    Attributes:
      accept: the probability that the text's token is accepted there, given that the depth is reached.
      probability: the probability of the draft's likeliest token, without temperature.
      entropy: the entropy of the draft's distribution in nats, without temperature.
    """

    accept: Float[np.ndarray, "G T"]
    probability: Float[np.ndarray, "G T"]
    entropy: Float[np.ndarray, "G T"]


def record(
    target: Target,
    prompts: Sequence[Prompt],
    mesh: Mesh,
    *,
    temperature: float,
    max_new_tokens: int,
    ahead: int,
    batch_size: int,
    seed: int,
) -> Recorded:
    """Let the target answer all turns of all prompts, as `evaluate`'s baseline does with the same arguments.

    Args:
      ahead: the longest chain (γ) that will be replayed.

    Raises:
      ValueError: a prompt with its answer is longer than the target's context.
    """
    decode = make_generate(decode_setup(target, max_new_tokens=max_new_tokens + ahead), mesh)
    params = prepare_params(target.params, mesh=mesh)
    samples: dict[tuple[int, int], Sample] = {}

    def answer(group: PromptGroup) -> list[Answer]:
        # Padding rows cost as much as others, so a small group gets a small batch.
        rows = round_up_to_shards(min(batch_size, next_power_of_two(len(group.rows))), mesh)
        batch = prompt_batch(group.prompts, group.numbers, rows, seed=seed, turn=group.turn)
        out = to_host(decode(params, shard_rows(batch, mesh), temperature))
        answers = [tokens[:length] for tokens, length, _ in zip(out.tokens, out.lengths, group.rows)]
        for i, ids, tokens in zip(group.rows, group.prompts, answers):
            text = np.concatenate([ids, tokens]).astype(np.int32)
            answered = np.arange(len(text)) >= len(ids)
            samples[i, group.turn] = Sample(f"{prompts[i].id}/{group.turn}", prompts[i].source, text, answered)
        return [read_answer(target, tokens[:max_new_tokens], max_new_tokens) for tokens in answers]

    hold(target, questions_in(prompts), answer, by_width(batch_size), max_new_tokens=max_new_tokens + ahead)
    order = sorted(samples)
    numbers = np.array([i for i, _ in order])
    return Recorded([samples[key] for key in order], numbers, temperature, max_new_tokens, ahead, target.stop_tokens)


def make_judge(
    target: Target,
    hidden: PerToken,
    recorded: Recorded,
    draft: DraftConfig,
    mesh: Mesh,
    *,
    num_draft_tokens: int,
    batch_tokens: int = 4096,
) -> Callable[[dict], list[Judged]]:
    """Make `judge(draft_params)`, which returns a draft's `Judged` for every recorded text, in the order of the samples.

    Args:
      hidden: the target's hidden states of the samples, by id, with the streams that the draft reads in front, if any. They
        should be float32; rounded ones change the figures.
      draft: the shape of the drafts.
      num_draft_tokens: γ, at most `recorded.ahead`.
      batch_tokens: tokens of a batch, padding included.

    Raises:
      ValueError: γ exceeds `recorded.ahead`; at a call, a sample's hidden states are missing.
    """
    if num_draft_tokens > recorded.ahead:
        raise ValueError(f"num_draft_tokens={num_draft_tokens}: the answers were recorded for up to {recorded.ahead}")
    step = _make_judge_step(target.config, draft, mesh, num_draft_tokens, recorded.temperature)
    frozen = replicate(borrow(target.config, target.params), mesh)
    data = TrainingData(recorded.samples, hidden)
    lengths = [len(sample.tokens) for sample in recorded.samples]
    plans = make_batches(lengths, choose_shapes(lengths, batch_tokens))

    def judge(draft_params: dict) -> list[Judged]:
        params = frozen, replicate(draft_params, mesh)
        by_text: dict[int, Judged] = {}
        for plan in plans:
            judged = step(params, device_batch(data, plan.indices, plan.shape, mesh))
            for row, i in zip(np.concatenate(list(own_rows(judged, mesh).values())), plan.indices):
                by_text[i] = Judged(*row[:, :, : lengths[i]])
        return [by_text[i] for i in range(len(lengths))]

    return judge


@functools.lru_cache(maxsize=8)
def _make_judge_step(config: DecoderConfig, draft: DraftConfig, mesh: Mesh, depth: int, temperature: float):
    """Compile `((borrowed, draft params), DraftBatch) -> [B, 3, G, T]`: the three fields of `Judged`."""
    slots = None
    if draft.vocabulary:  # each token's place in the draft's vocabulary, −1 if it has none
        slots = np.full(config.vocab_size, -1, np.int32)
        slots[list(draft.vocabulary)] = np.arange(len(draft.vocabulary))
    block = vocabulary_block(mesh.devices.flat[0].platform)

    def step(params: tuple[Borrowed, dict], batch: DraftBatch) -> Float[Array, "B three G T"]:
        borrowed, draft_params = params
        rows, length = batch.tokens.shape
        hidden = batch.hidden.astype(jnp.float32)
        embedding = embed_tokens(config, {"embed": {"embedding": borrowed.embedding}}, batch.tokens[:, 1:])
        head = draft_head(draft, draft_params, borrowed.output)
        text = jnp.pad(batch.tokens[:, 2:], ((0, 0), (0, 1))).reshape(-1)
        reached = batch.counted[:, 1:]
        log_p = jnp.zeros(0)
        if temperature > 0:
            truth = final_state(config, hidden[:, 1:])
            log_p = _text_log_probs(borrowed.output, truth, reached, text, temperature, block)
        depths = []
        for predicted in draft_steps(draft, draft_params, embedding, hidden[:, :-1], depth):
            verdicts = judge_depth(head, predicted.reshape(-1, predicted.shape[2]), reached, text, log_p)
            depths.append(jnp.pad(verdicts.reshape(3, rows, length - 1), ((0, 0), (0, 0), (0, 1))))
            # A step never starts before the answer's first token, so depth i is not reached before the i-th token.
            reached = batch.counted[:, 1:] & jnp.pad(reached[:, :-1], ((0, 0), (1, 0)))
        return jnp.stack(depths).transpose(2, 1, 0, 3)

    def judge_depth(head, predicted, reached, text, log_p):
        """The three fields of `Judged` at one depth, [3, positions]; 0 where the depth is not reached."""

        def visit(numbers, verdicts):
            z = vocabulary_logits(head, block_rows(predicted, numbers))
            token = text.at[numbers].get(mode="fill", fill_value=0)
            slot = token if slots is None else jnp.asarray(slots)[token]
            z_text = jnp.where(slot < 0, -jnp.inf, jnp.take_along_axis(z, jnp.maximum(slot, 0)[None], axis=0)[0])
            top = jnp.max(z, axis=0)
            above = jnp.exp(z - top[None])
            total = jnp.sum(above, axis=0)
            entropy = jnp.log(total) - jnp.sum((z - top[None]) * above, axis=0) / total
            if temperature > 0:
                log_q = (z_text - top) / temperature - jnp.log(jnp.sum(jnp.exp((z - top[None]) / temperature), axis=0))
                accept = jnp.exp(jnp.minimum(log_q - log_p.at[numbers].get(mode="fill", fill_value=0.0), 0.0))
            else:
                accept = (z_text == top).astype(jnp.float32)
            return verdicts.at[:, numbers].set(jnp.stack([accept, 1 / total, entropy]), mode="drop")

        return fold_counted(reached.reshape(-1), block, visit, jnp.zeros((3, reached.size)))

    return map_over_devices(step, mesh)


def _text_log_probs(head, hidden, counted: Bool[Array, "B T1"], text, temperature: float, block: int):
    """log p of each text token at the temperature, flattened."""
    rows = hidden.reshape(-1, hidden.shape[2])

    def visit(numbers, log_p):
        z = vocabulary_logits(head, block_rows(rows, numbers)) / temperature
        token = text.at[numbers].get(mode="fill", fill_value=0)
        values = jnp.take_along_axis(z, token[None], axis=0)[0] - jax.nn.logsumexp(z, axis=0)
        return log_p.at[numbers].set(values, mode="drop")

    return fold_counted(counted.reshape(-1), block, visit, jnp.zeros(counted.size))


def walk(recorded: Recorded, judged: Sequence[Judged]) -> AcceptanceCounts:
    """The counts that decoding would give, per prompt (summed over its turns); above temperature 0, their expectation."""
    depth = judged[0].accept.shape[0]
    counts = no_counts(int(recorded.prompts.max()) + 1, depth, float)
    for sample, number, verdicts in zip(recorded.samples, recorded.prompts, judged):
        start = int(np.argmax(sample.assistant_mask))
        stops = np.isin(sample.tokens[start:], recorded.stop_tokens)
        for total, counted in zip(counts, walk_text(verdicts.accept, start, stops, recorded.max_new_tokens)):
            total[number] += counted
    return counts


def walk_text(
    accept: Float[np.ndarray, "G T"], start: int, stops: Bool[np.ndarray, " N"], max_new_tokens: int
) -> tuple[Float[np.ndarray, " G1"], Float[np.ndarray, " G"], Float[np.ndarray, " G"]]:
    """Expected counts of one answer, which begins at token `start`, as in `AcceptanceCounts`.

    Args:
      accept: from `Judged`.
      start: the position of the answer's first token.
      stops: where the answer holds a stop token.
      max_new_tokens: the longest answer that counts.
    """
    depth = len(accept)
    histogram, reached, accepted = np.zeros(depth + 1), np.zeros(depth), np.zeros(depth)
    begins = np.zeros(len(stops) + depth + 2)  # begins[n]: the probability that a step starts after n tokens
    begins[1] = 1.0
    for n in range(1, min(max_new_tokens, len(stops))):
        chance = begins[n]
        if not chance or stops[n - 1]:
            continue
        for i in range(depth):
            yes = chance * accept[i, start + n + i - 2]
            reached[i] += chance
            accepted[i] += yes
            histogram[i] += chance - yes
            begins[n + i + 1] += chance - yes
            chance = yes
            if stops[n + i]:
                # Draft tokens after the end of the answer do not count.
                histogram[i + 1] += chance
                chance = 0.0
                break
        histogram[depth] += chance
        begins[n + depth + 1] += chance
    return histogram, reached, accepted
