"""One answer, shown while it is decoded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.decoding.generate import DecodeSetup, PromptBatch, make_stream


class StreamResult(NamedTuple):
    """Attributes: tokens emitted (first one included), target verifications, τ (None without one), seconds after compiling,
    draft tokens accepted by the draft that proposed them."""

    tokens: list[int]
    steps: int
    tau: float | None
    seconds: float
    accepted: Counter[int]


def stream_answer(
    setup: DecodeSetup,
    params: dict,
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
    start, step = make_stream(setup)
    scalar = jnp.float32(temperature)
    # One program per power of two, not per prompt length.
    width = max(64, 1 << (len(prompt) - 1).bit_length())
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(prompt)] = prompt
    batch = PromptBatch(jnp.asarray(tokens), jnp.array([len(prompt)], jnp.int32), jax.random.key(seed)[None])
    idle = start(params, batch._replace(lengths=jnp.zeros(1, jnp.int32)), scalar)
    jax.block_until_ready(step(params, idle, scalar))  # compiled before the clock starts

    begin = time.perf_counter()
    state = start(params, batch, scalar)
    answer = [int(state.last_token[0])]
    show(answer, [])
    steps, emitted_by_steps, accepted = 0, 0, Counter()
    while not bool(state.done[0]):
        state, emitted = step(params, state, scalar)
        count = int(emitted.count[0])
        new = [int(token) for token in emitted.tokens[0, :count]][: setup.max_new_tokens - len(answer)]
        steps, emitted_by_steps = steps + 1, emitted_by_steps + count
        proposers = [0] * len(new) if emitted.proposers is None else emitted.proposers[0].tolist()
        proposers = proposers[: min(len(new), int(emitted.accepted[0]))]
        accepted.update(proposers)
        answer += new
        show(new, proposers)
    tau = emitted_by_steps / steps if steps else None
    return StreamResult(answer, steps, tau, time.perf_counter() - begin, accepted)
