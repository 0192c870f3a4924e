"""Read whole texts in one pass: the slow, obvious twin of the decoder, which works step by step with caches.

    decode_texts    the target's greedy answers to prompts, and the verdict on the first draft token of every step
    Reader          hidden states of whole texts; the token that the target's head chooses after any of them, and the draft's
                    choice after every true prefix

A step that starts with x_0 … x_c committed lets the draft guess x_{c+1} from its output at the last true pair
(h_{c−1}, x_c). Reading the whole text gives the same output at t = c − 1, so both must make the same guess.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsfdd.data.batches import bucket_lengths, pad_rows
from jsfdd.decoding.generate import make_stream, prepare_params
from jsfdd.decoding.prompts import prompt_batch
from jsfdd.decoding.settings import decode_setup
from jsfdd.decoding.stream import stream
from jsfdd.models.attention import causal_view
from jsfdd.models.draft import Draft, draft_head_logits, layer_of
from jsfdd.models.target import embed_tokens, final_norm, head_logits, residual_stream
from jsfdd.weights.target import Target

# Two ways to compute one logit differ by rounding; closer than this part of the largest logit is a tie. Accelerators
# may multiply float32 matrices in fewer bits.
_TIE, _COARSE_TIE = 1e-3, 3e-2


@dataclasses.dataclass(frozen=True)
class DecodedText:
    """A prompt with the target's greedy answer, as the speculative decoder wrote it.

    Attributes:
      id: of the prompt.
      tokens: int32[N], prompt and answer.
      prompt_length: P; tokens[P:] is the answer, tokens[P] from the prompt's own forward pass.
      step_tokens: for every step, the index of the token that its first draft token guessed, in P+1 … N−1.
      step_accepted: whether that guess was accepted.
    """

    id: str
    tokens: np.ndarray
    prompt_length: int
    step_tokens: list[int]
    step_accepted: list[bool]


class Choices(NamedTuple):
    """The tokens that the target's head chooses after n hidden states, each compared with the token that was asked about.

    Attributes:
      token: int[n], the likeliest token.
      probability: float[n], its probability.
      lead: float[n], its logit less the second largest one, as a share of the largest absolute logit.
      gap: float[n], its logit less that of the token that was asked about, as such a share.
    """

    token: np.ndarray
    probability: np.ndarray
    lead: np.ndarray
    gap: np.ndarray


class WholeText(NamedTuple):
    """What a text's tokens are to the target, all [T, D].

    Attributes:
      stream, hidden: hidden states before and after the final norm.
      embedding: of the tokens.
      entered: the inputs of the layers that were asked for, by their number.
    """

    stream: Float[Array, "T D"]
    hidden: Float[Array, "T D"]
    embedding: Float[Array, "T D"]
    entered: dict[int, Float[Array, "T D"]]

    def states(self, layers: Sequence[int]) -> Float[Array, "T S"]:
        """What a draft that reads these layers is given: their inputs, and the final state behind them."""
        return jnp.concatenate([*(self.entered[layer] for layer in layers), self.hidden], axis=-1)


def decode_texts(
    target: Target,
    draft: Draft,
    prompts: Sequence[tuple[str, Sequence[int]]],
    num_draft_tokens: int,
    max_new_tokens: int,
) -> list[DecodedText]:
    """Greedy answers to (id, token ids) prompts, decoded together, step by step."""
    setup = decode_setup(target, [draft.config], num_draft_tokens=num_draft_tokens, max_new_tokens=max_new_tokens)
    params = prepare_params(target.params, [draft.params])
    batch = prompt_batch([ids for _, ids in prompts], range(len(prompts)), len(prompts), seed=0)
    answers: list[list[int]] = [[] for _ in prompts]
    texts = [DecodedText(id, np.empty(0, np.int32), len(ids), [], []) for id, ids in prompts]
    for emitted in stream(make_stream(setup), params, batch, temperature=0.0):
        for row, text in enumerate(texts):
            if emitted.active[row]:
                text.step_tokens.append(text.prompt_length + len(answers[row]))
                text.step_accepted.append(int(emitted.accepted[row]) > 0)
            answers[row] += emitted.tokens[row, : emitted.count[row]].tolist()
    return [
        dataclasses.replace(text, tokens=np.asarray([*ids, *answer], np.int32))
        for text, (_, ids), answer in zip(texts, prompts, answers)
    ]


class Reader:
    """Reads whole texts with the target, all padded to one length so that everything is compiled once.

    Args:
      longest: tokens of the longest text to come; `width` is a little more.

    `tie` is the part of the largest logit within which two choices count as equal.
    """

    def __init__(self, target: Target, longest: int):
        self.target, self.width = target, bucket_lengths(longest)[-1]
        exact = jax.default_backend() == "cpu" and target.params["embed"]["embedding"].dtype == jnp.float32
        self.tie = _TIE if exact else _COARSE_TIE
        self._read = jax.jit(self._whole_text, static_argnames=("depth", "entered"))
        self._choose = jax.jit(self._head_choices)
        self._draft = jax.jit(self._draft_choices, static_argnums=1)

    def read(self, tokens: Int[np.ndarray, " N"], depth: int | None = None, entered: tuple[int, ...] = ()) -> WholeText:
        """Of a text, right-padded to `width`.

        Args:
          depth: read as a target of only the first so many layers.
          entered: numbers of layers whose inputs are wanted.
        """
        depth = depth or self.target.config.num_layers
        return self._read(self.target.params, self._pad(tokens)[None], depth=depth, entered=entered)

    def choices(self, hidden: Float[Array, "T D"], tokens: Int[np.ndarray, " N"]) -> Choices:
        """What the target's head says after each of the N tokens but the last, about the one that follows: n = N − 1."""
        asked = np.roll(self._pad(tokens), -1)
        chosen = self._choose(self.target.params, hidden, asked)
        return Choices(*(np.asarray(x)[: len(tokens) - 1] for x in chosen))

    def draft_choices(
        self, draft: Draft, tokens: Int[np.ndarray, " N"], embedding: Float[Array, "T D"], states: Float[Array, "T S"]
    ) -> Choices:
        """What the draft says, asked about tokens[2:]: n = N − 2, entry i about token i + 2.

        Args:
          embedding: row t is what the draft gets as the embedding of x_{t+1}.
          states: row t is what it gets of the target at t (`WholeText.states`).
        """
        asked = np.roll(self._pad(tokens), -2)
        chosen = self._draft(self.target.params, draft.config, draft.params, embedding, states, asked)
        return Choices(*(np.asarray(x)[: len(tokens) - 2] for x in chosen))

    def _pad(self, tokens):
        return pad_rows([np.asarray(tokens, np.int32)], (1, self.width))[0]

    def _whole_text(self, params, tokens, *, depth, entered):
        full = self.target.config
        config = dataclasses.replace(full, num_layers=depth, sliding_layers=full.sliding_layers[:depth])
        params = {**params, "layers": jax.tree.map(lambda x: x[:depth], params["layers"])}
        raw, streams, _ = residual_stream(config, params, tokens, causal_view(*tokens.shape), None, entered)
        return WholeText(
            raw[0], final_norm(config, params, raw)[0], embed_tokens(config, params, tokens)[0],
            {layer: stream[0] for layer, stream in zip(entered, streams)},
        )  # fmt: skip

    def _head_choices(self, params, hidden, asked):
        return _choices(lambda rows: head_logits(self.target.config, params, rows), hidden, asked)

    def _draft_choices(self, target_params, config, params, embedding, states, asked):
        layer = layer_of(config)
        read = layer.apply({"params": params}, states[None], method="read")
        view = causal_view(*read.shape[:2])
        output, _ = layer.apply({"params": params}, embedding[None], read, view, None, method="decode")
        target = self.target.config
        return _choices(lambda rows: draft_head_logits(target, target_params, config, params, rows), output[0], asked)


def _choices(logits_of: Callable[[Array], Array], states: Float[Array, "T D"], asked: Int[Array, " T"]) -> tuple:
    """The fields of `Choices`, a block of states at a time: the logits of a long text are the largest thing here by far."""

    def of_block(block):
        rows, tokens = block
        logits = logits_of(rows)
        scale = jnp.max(jnp.where(jnp.isfinite(logits), jnp.abs(logits), 0.0), axis=1)
        first, best = jnp.max(logits, axis=1), jnp.argmax(logits, axis=1)
        others = jnp.where(jnp.arange(logits.shape[1])[None, :] == best[:, None], -jnp.inf, logits)
        second = jnp.max(others, axis=1)
        asked_about = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
        probability = jnp.exp(first - jax.nn.logsumexp(logits, axis=1))
        return best, probability, (first - second) / scale, (first - asked_about) / scale

    blocks = states.reshape(-1, 16, states.shape[1]), asked.reshape(-1, 16)
    return jax.tree.map(lambda x: x.reshape(-1), jax.lax.map(of_block, blocks))
