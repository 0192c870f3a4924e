"""Processes that tests start, with devices of their own: forked from one that has imported everything and computed nothing.

Importing is most of what a fresh process would cost.

    ends = finish([Child(main, folder, number, devices=2) for number in range(2)])
"""

import atexit
import multiprocessing
import os
import socket
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

LIMIT = 300  # seconds within which any of them ends, however loaded the machine
_IMPORTED = [
    "jsfdd.commands.cli", "jsfdd.evaluation.evaluate", "jsfdd.scoring.score", "jsfdd.training.train", "jsfdd.weights.target",
    "toy",
]  # fmt: skip
_context = multiprocessing.get_context("forkserver")


class Child:
    """`function(*arguments)` in a process of its own; its exit code is what the function returns, or 0.

    Args:
      function: of a module that can be imported.
      arguments: what pickle takes.
      devices: how many CPU devices JAX has there.
    """

    def __init__(self, function, *arguments, devices=4):
        _context.set_forkserver_preload(_IMPORTED)
        self._folder = tempfile.TemporaryDirectory()
        self._texts = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        self._process = _context.Process(target=_run, args=(function, arguments, devices, *map(str, self._texts)))
        self._process.start()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def finish(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) once it has ended; the code is negative where a signal ended it."""
        self._process.join(LIMIT)
        if self._process.is_alive():
            self._process.kill()
            raise TimeoutError(f"no end within {LIMIT} s; stderr: {self._texts[1].read_text()[-2000:]}")
        return self._process.exitcode, *(path.read_text(errors="replace") for path in self._texts)


def finish(children) -> list[tuple[int, str, str]]:
    """`Child.finish` of all; none is left running."""
    try:
        return [child.finish() for child in children]
    finally:
        for child in children:
            child.kill()


def begin_command(*arguments, second=None) -> list[Child]:
    """`jsfdd` with these arguments as two processes of one run; `second` are the second one's, if others."""
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id"]
    both = [arguments, second or arguments]
    return [command(*words, *place, number, devices=2) for number, words in enumerate(both)]


def command(*arguments, devices=4) -> Child:
    """`jsfdd` with these arguments."""
    from jsfdd.commands.cli import main

    return Child(main, [str(word) for word in arguments], devices=devices)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def stop_server() -> None:
    """Let go of the process that children are forked from; the next child starts another."""
    forkserver._forkserver._stop()


def _run(function, arguments, devices, *texts):
    for descriptor, path in enumerate(texts, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    try:
        sys.exit(function(*arguments) or 0)
    finally:
        atexit._run_exitfuncs()  # a forked process skips them, and JAX leaves its coordinator in one
