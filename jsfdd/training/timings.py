"""The time of each part of training: the lines of timings.jsonl.

    {"step": 20, "steps": 66, "seconds": 8.1, "reading": 0.02, "held_out": 0.0, "probe": 0.0, "compiling": 0.0,
     "tokens_per_second": 1204.5, "tflops": 0.11}

`seconds` is the time since the previous line. It includes the named parts, which exclude each other; the rest was spent on the
steps, which the rates are based on. `tflops` counts the arithmetic of `models/flops.py`, in 10¹² FLOP/s over all devices. `mfu`
is its share of the devices' peak, if their kind is known. `step` is the last one done, `steps` how many the run has.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jsfdd.base.compiling import compile_seconds
from jsfdd.base.hardware import peak_flops
from jsfdd.models.draft import DraftConfig
from jsfdd.models.flops import step_flops
from jsfdd.training.schedule import Step

_PARTS = ("reading", "held_out", "probe", "compiling")


class Laps:
    """A clock with laps: `with laps.lap("reading"): …`."""

    def __init__(self):
        self._since, self._parts = time.perf_counter(), dict.fromkeys(_PARTS, 0.0)
        self._compiled = compile_seconds()

    @contextmanager
    def lap(self, part: str):
        """Time spent inside the block belongs to `part`."""
        begin, compiled = time.perf_counter(), compile_seconds()
        yield
        self._parts[part] += time.perf_counter() - begin - (compile_seconds() - compiled)

    def since_last(self) -> dict[str, float]:
        """`seconds` since the last call, or since the start, and the parts of them; all begin at 0 again."""
        now, compiled = time.perf_counter(), compile_seconds()
        lap = {"seconds": now - self._since, **self._parts, "compiling": compiled - self._compiled}
        self._since, self._parts, self._compiled = now, dict.fromkeys(_PARTS, 0.0), compiled
        return lap


class Throughput:
    """Rates of steps.

    Args:
      draft, mesh: what is trained, and on what.
      tokens, visited: for each sample, all its tokens, and those that meet the vocabulary.
      products, draft_steps: as in `flops.step_flops`.
    """

    def __init__(
        self,
        draft: DraftConfig,
        mesh: Mesh,
        tokens: Int[np.ndarray, " N"],
        visited: Int[np.ndarray, " N"],
        *,
        products: int,
        draft_steps: int,
    ):
        self._draft, self._peak, self._tokens, self._visited = draft, peak_flops(mesh), tokens, visited
        self._products, self._draft_steps = products, draft_steps

    def rates(self, steps: Sequence[Step], lap: dict[str, float]) -> dict[str, float]:
        """The rates of the steps in a lap."""
        plans = [plan for step in steps for plan in step.plans]
        samples = [i for plan in plans for i in plan.indices]
        seconds = lap["seconds"] - lap["held_out"] - lap["probe"] - lap["compiling"]
        visited = float(self._visited[samples].sum())
        flops = step_flops(self._draft, [plan.shape for plan in plans], visited, self._products, self._draft_steps)
        rates = {"tokens_per_second": float(self._tokens[samples].sum()) / seconds, "tflops": flops / seconds / 1e12}
        return rates if self._peak is None else rates | {"mfu": flops / seconds / self._peak}
