"""Limits of time and memory around foreign code that runs in this process, such as chat templates.

    with limited(seconds=10.0, memory=1 << 30):
        …                          # TimeoutError or MemoryError where it takes more

They hold in the main thread; elsewhere there are none, because Python interrupts only the main thread, and has one alarm. The
limit of memory is the system's own (RLIMIT_DATA), so it also holds inside one long step of C code, such as "a" * 10**9. It is
the whole process's: other threads must not take that much memory meanwhile, so no computation of JAX should be under way.
Systems other than Linux have only the limit of time.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator

_PAGE = os.sysconf("SC_PAGE_SIZE")
_DATA = 5  # column of /proc/self/statm: pages of data and stack, which is what RLIMIT_DATA counts
_AGAIN = 1.0  # seconds: foreign code may swallow the first exception, as Jinja does where it computes constants


@contextlib.contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """End the block with an exception when it takes too long or too much.

    Args:
      seconds: of the clock.
      memory: bytes beside those that the process has now.

    Raises:
      TimeoutError: too long. It comes after the step of C code that is running then.
      MemoryError: too much memory. What the block held is free again once the exception is handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, _stop)
    if handler is not signal.SIG_DFL:  # somebody else's alarm
        signal.signal(signal.SIGALRM, handler)
        yield
        return
    before = _limit_memory(memory)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, before)


def _stop(*_) -> None:
    raise TimeoutError


def _limit_memory(memory: int) -> tuple[int, int] | None:
    """Set the limit, and return the one before; None where the system has none."""
    if sys.platform != "linux":
        return None
    statm = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        wanted = int(os.read(statm, 256).split()[_DATA]) * _PAGE + memory
    finally:
        os.close(statm)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if any(limit != resource.RLIM_INFINITY and limit < wanted for limit in before):
        return None  # there is a tighter one already
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, before[1]))
    return before
