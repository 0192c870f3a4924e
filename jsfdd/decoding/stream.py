"""Stream answers step by step, so that they can be shown while they are decoded."""

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
    """One streamed answer.

    Attributes:
      tokens: the answer's ids.
      steps: verifications by the target.
      tau: tokens emitted per verification; None without a verification.
      seconds: time without compiling.
      step_seconds: of one step, the prompt not counted; None without a step.
      accepted: number of a draft -> accepted draft tokens that it proposed.
    """

    tokens: list[int]
    steps: int
    tau: float | None
    seconds: float
    step_seconds: float | None
    accepted: Counter[int]


def stream(
    programs: tuple[Callable, Callable], params: DecodeParams, batch: PromptBatch, temperature: float
) -> Iterator[Emitted]:
    """Yield what each step emits, on the host, until every row is done.

    The first item comes from the forward pass over the prompts: one token per row, and no row counts as active.

    Args:
      programs: from `make_stream`.
    """
    prefill, step = programs
    temperature = jnp.float32(temperature)
    state = prefill(params, batch, temperature)
    # Copy, because the next step donates the state's buffers.
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
    """Decode one prompt, calling `show(tokens, proposers)` after each step.

    The first len(proposers) tokens were proposed by the drafts of those numbers, from 0; the rest are the target's.

    Args:
      params: from `prepare_params`.
      prompt: token ids, as `render_prompt` returns them.
    """
    prefill, step = programs = make_stream(setup)
    batch = prompt_batch([prompt], [0], 1, seed=seed)._replace(keys=jax.random.key(seed)[None])
    # Warm up with a row of length 0, which is done at once: this compiles and loads everything but computes little.
    idle = prefill(params, batch._replace(lengths=jnp.zeros(1, jnp.int32)), jnp.float32(temperature))
    jax.block_until_ready(step(params, idle, jnp.float32(temperature)))

    begin = time.perf_counter()
    answer: list[int] = []
    steps, emitted_by_steps, accepted = 0, 0, Counter()
    after_prompt = 0.0
    for emitted in stream(programs, params, batch, temperature):
        after_prompt = after_prompt or time.perf_counter()
        steps, emitted_by_steps = steps + int(emitted.active[0]), emitted_by_steps + int(emitted.active[0] * emitted.count[0])
        new = emitted.tokens[0, : emitted.count[0]].tolist()[: setup.max_new_tokens - len(answer)]
        proposers = emitted.proposers[0].tolist()[: min(len(new), int(emitted.accepted[0]))]
        accepted.update(proposers)
        answer += new
        show(new, proposers)
    tau = emitted_by_steps / steps if steps else None
    end = time.perf_counter()
    return StreamResult(answer, steps, tau, end - begin, (end - after_prompt) / steps if steps else None, accepted)
