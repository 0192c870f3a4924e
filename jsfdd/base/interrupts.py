"""SIGINT, SIGTERM and SIGHUP end a command with one line and the code 128 + signal, at any moment and within seconds.

    with listening():                                  # once, around a whole command
        …
        with noted() as signalled:                     # a loop that can end at a better moment than at once
            for step in steps:
                if signalled():
                    …save…
                    break                              # leaving the block raises Interrupted

A signal raises Interrupted in the main thread, or is only noted in a `noted` block. Either may come to nothing: C code may not
return for minutes, and an exception that is raised inside a callback of C code is swallowed. So a thread, which the system
wakes when the signal comes, ends the process itself after five seconds. No file can be cut short by that (`files.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 5.0
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated (SIGTERM)", signal.SIGHUP: "hung up (SIGHUP)"}
_STOP = b"\0"  # no signal has this number

_listening = False
_received: int | None = None
_patient = 0  # `noted` blocks around what runs now


class Interrupted(KeyboardInterrupt):
    """A signal ends the command. `code` is the exit code that shells expect of it, `words` says what happened."""

    def __init__(self, number: int):
        super().__init__()
        self.code, self.words = 128 + number, _line(number)


@contextmanager
def listening() -> Iterator[None]:
    """Handle the signals while the block runs. Does nothing outside the main thread, where Python handles none."""
    global _listening, _received
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    before = {number: signal.signal(number, _on_signal) for number in _WORDS}
    before_fd = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(receiver,), daemon=True, name="watch for signals").start()
    _listening, _received = True, None
    try:
        yield
    finally:
        _listening = False
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        if _received is None:  # else the thread sees to it that the process ends
            os.write(sender, _STOP)
        os.close(sender)


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Let signals wait in this block; `signalled()` says whether one came. Leaving the block then raises Interrupted."""
    global _patient
    _patient += 1
    try:
        yield lambda: _received is not None
    finally:
        _patient -= 1
    if _received is not None and not _patient:
        raise Interrupted(_received)


def _on_signal(number: int, _frame) -> None:
    global _received
    if _received is None:  # a second one could only disturb how the first one ends
        _received = number
        if not _patient:
            raise Interrupted(number)


def _watch(receiver: int) -> None:
    """Sleep until a signal comes, give the main thread its time, and end the process."""
    number = None
    while number not in _WORDS:  # other signals with a handler wake us too
        data = os.read(receiver, 1)
        if data in (b"", _STOP):
            os.close(receiver)
            return
        number = data[0]
    threading.Event().wait(SECONDS)
    for child in multiprocessing.active_children():
        child.terminate()
    os.write(2, f"jsfdd: {_line(number)}\n".encode())
    os._exit(128 + number)


def _line(number: int) -> str:
    return f"{_WORDS[number]}; the same command continues where it stopped"
