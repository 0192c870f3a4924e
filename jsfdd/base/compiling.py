"""How long JAX has spent on compiling in this process: tracing, lowering, compiling, or reading a compiled program from disk.

before = compile_seconds()
step(state, batch)
compile_seconds() - before    # 0.0 unless the shape is new
"""

from __future__ import annotations

import sys
import time

_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Spans:
    """Total length of spans that are added when they end; one that lies in a later, longer one counts once."""

    def __init__(self):
        self.total = 0.0
        self._starts: list[tuple[float, float]] = []  # (start, seconds), in the order of their starts

    def add(self, end: float, seconds: float) -> None:
        while self._starts and self._starts[-1][0] >= end - seconds:
            self.total -= self._starts.pop()[1]
        self._starts.append((end - seconds, seconds))
        self.total += seconds


_spans: list[Spans] = []


def compile_seconds() -> float:
    """Seconds of compiling since the first call after JAX was imported; that call and all before it return 0.0."""
    if (jax := sys.modules.get("jax")) is None:
        return 0.0
    if not _spans:
        _spans.append(Spans())
        jax.monitoring.register_event_duration_secs_listener(_note)
    return _spans[0].total


def _note(event: str, seconds: float, **_) -> None:
    if event in _EVENTS:
        _spans[0].add(time.perf_counter(), seconds)
