"""Answers step by step, for whoever wants to see them while they are decoded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.decoding.generate import make_stream
from jsfdd.decoding.prompts import prompt_batch
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.decoding.state import DecodeParams, Emitted, PromptBatch


class StreamResult(NamedTuple):
    """Attributes: tokens emitted (first one included), target verifications, τ (None without one), seconds after compiling,
    draft tokens accepted by the draft that proposed them."""

    tokens: list[int]
    steps: int
    tau: float | None
    seconds: float
    accepted: Counter[int]


def stream(
    programs: tuple[Callable, Callable], params: DecodeParams, batch: PromptBatch, temperature: float
) -> Iterator[Emitted]:
    """What each step emits, on the host, until every row is done.

    The first item is of the prompts' own forward pass: one token a row, and no row counts as active.

    Args:
      programs: from `make_stream`.
    """
    prefill, step = programs
    temperature = jnp.float32(temperature)
    state = prefill(params, batch, temperature)
    # Copies: the state's own buffers are given away to the next step.
    first, counts = np.array(state.last_token), np.array(state.num_generated)
    done, none = np.array(state.done), np.zeros_like(counts)
    yield Emitted(first[:, None], counts, none, none, none.astype(bool), none[:, None], none[:, None])
    while not done.all():
        state, emitted = step(params, state, temperature)
        done = np.array(state.done)
        yield jax.device_get(emitted)


def stream_answer(
    setup: DecodeSetup,
    params: DecodeParams,
    prompt: Sequence[int],
    seed: int,
    temperature: float,
    show: Callable[[list[int], list[int]], None],
) -> StreamResult:
    """Decode one prompt, calling `show(tokens, proposers)` as each step comes.

    The first len(proposers) tokens were proposed, each by the draft of that number, from 0; what follows is the target's.

    Args:
      params: from `prepare_params`.
      prompt: token ids, as `render_prompt` gives them.
    """
    prefill, step = programs = make_stream(setup)
    batch = prompt_batch([prompt], [0], 1, seed=seed)._replace(keys=jax.random.key(seed)[None])
    # Rows of length 0 are done at once: everything is compiled and loaded, hardly anything computed.
    idle = prefill(params, batch._replace(lengths=jnp.zeros(1, jnp.int32)), jnp.float32(temperature))
    jax.block_until_ready(step(params, idle, jnp.float32(temperature)))

    begin = time.perf_counter()
    answer: list[int] = []
    steps, emitted_by_steps, accepted = 0, 0, Counter()
    for emitted in stream(programs, params, batch, temperature):
        steps, emitted_by_steps = steps + int(emitted.active[0]), emitted_by_steps + int(emitted.active[0] * emitted.count[0])
        new = emitted.tokens[0, : emitted.count[0]].tolist()[: setup.max_new_tokens - len(answer)]
        proposers = emitted.proposers[0].tolist()[: min(len(new), int(emitted.accepted[0]))]
        accepted.update(proposers)
        answer += new
        show(new, proposers)
    tau = emitted_by_steps / steps if steps else None
    return StreamResult(answer, steps, tau, time.perf_counter() - begin, accepted)
