"""The `jsfdd` command: one subcommand per stage, whose options come from the stage's config.

Exit codes: 0 success; 1 `jsfdd doctor` found an error; 2 wrong input or options (the message names the file, line or value,
and the remedy; no half-written file is left); 3 another process of the run ended, so this one did too; 130, 143, 129
interrupted by SIGINT, SIGTERM, SIGHUP; 141 the reader of the output closed it (`jsfdd … | head`). Any other code is a bug in
jsfdd and comes with a traceback.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import os
import re
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

if os.environ.get("NO_COLOR"):
    os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")  # tyro reads only this variable, and only when it is imported

from jsfdd.base import interrupts
from jsfdd.base.disk import DiskError, disk_error, refusal
from jsfdd.base.text import printable, shortened
from jsfdd.commands.outcome import show
from jsfdd.commands.parser import Command, Invocation, parse

# The rooms raise one of these for wrong input, with the remedy in the message.
_INPUT_ERRORS = (
    ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError, DiskError,
)  # fmt: skip
_REMEDIES = {
    errno.EACCES: "check who may read or write it and the directories above it",
    errno.EPERM: "check who may read or write it and the directories above it",
    errno.EEXIST: "it is a file where a directory is to be; choose another --out",
    errno.ENOTDIR: "it is a file where a directory is to be; choose another --out",
}
_STATUS = re.compile(r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): ")  # of JAX
_CACHE_BYTES = 1 << 30  # of compiled programs, of which one takes about 200 kB on a CPU and megabytes on an accelerator
_BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report it

# `jsfdd X` is commands/x.py with XConfig, EXAMPLES, prepare, run and describe.
COMMANDS = (
    "respond", "score", "select", "train", "evaluate", "export", "generate", "doctor", "report", "watch", "plan", "run",
    "demo", "completion",
)  # fmt: skip

_COMPILE = ("respond", "score", "train", "evaluate", "generate", "run", "demo")
_WRITE_A_FILE = ("respond", "report")  # their --out is a file, not a directory

_DESCRIPTION = "Cheap training of draft models for speculative decoding."

_EPILOGUE = """
The stages in order: score chats by the flatness of the target's distributions, select the most
valuable share, train a draft on it, evaluate its acceptance, export it for serving. `run` does all
of them in one directory, for several selections at once. Before the stages, `respond` can replace
the chats' answers with the target's own.

start here:
  jsfdd demo                  all stages on a small model, on a CPU, in minutes
  jsfdd COMMAND --help        options and examples of a command
  jsfdd COMMAND … --dry-run   what a command would do with these inputs
  jsfdd --version             the version

exit codes:
  0    success
  1    doctor found an error
  2    wrong input or options; stderr names the fault and the remedy
  3    another process of the run ended, so this one did too
  130  interrupted (143 by SIGTERM, 129 by SIGHUP); the same command continues
       where it stopped
  141  the reader of the output closed it
  Any other code is a bug in jsfdd and comes with a traceback.

environment:
  NO_COLOR=1          no colours
  JSFDD_TRACEBACK=1   show a traceback for wrong input, too
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. This is the console script's entry point."""
    try:
        try:
            with interrupts.listening():
                code = _answer(arguments)
        except SystemExit:  # from --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # a closed pipe must raise here: at the end of the process nothing can catch it
        return code
    except BrokenPipeError:
        # Discard the rest of the output.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.dup2(null, sys.stderr.fileno())
        return _leave(_BROKEN_PIPE)
    except OSError as error:  # where no room expects a disk to refuse: a directory, the output
        if (number := refusal(error)) is None:
            raise
        print(f"jsfdd: error: {disk_error(error.filename or 'the output', number)}", file=sys.stderr)
        return _leave(2)


def _answer(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        match words:
            case [] | ["-h" | "--help"]:
                print(overview())
                return 0
            case ["--version"]:
                print(importlib.import_module("jsfdd").__version__)
                return 0
            case [name, *rest]:
                return _run(name, parse(name, command(name), rest))
    except (*_INPUT_ERRORS, RuntimeError) as error:
        if _is_distributed(error):
            print(
                f"jsfdd: error: a step that needs all processes failed ({str(error).splitlines()[0]}). If another process has "
                "ended, its message says why. Start all of them again with the same command, which continues",
                file=sys.stderr,
            )
            return _leave(3)
        if isinstance(error, RuntimeError) or os.environ.get("JSFDD_TRACEBACK"):
            raise
        print(f"jsfdd: error: {_words(error)}", file=sys.stderr)
        return _leave(2)
    except KeyboardInterrupt as error:
        ended = error if isinstance(error, interrupts.Interrupted) else interrupts.Interrupted(signal.SIGINT)
        print(f"jsfdd: {ended.words}", file=sys.stderr)
        return _leave(ended.code)


def overview() -> str:
    """The text of `jsfdd --help`."""
    width = max(map(len, COMMANDS)) + 2
    first_sentences = (inspect.getdoc(command(name).config).splitlines()[0].split(". ")[0].rstrip(".") for name in COMMANDS)
    lines = [f"  {name:{width}}{sentence}" for name, sentence in zip(COMMANDS, first_sentences, strict=True)]
    return "\n".join(["usage: jsfdd COMMAND [OPTIONS]", "", _DESCRIPTION, "", "commands:", *lines, _EPILOGUE.rstrip("\n")])


def command(name: str) -> Command:
    """Look up a command by its name. ValueError if there is none."""
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        raise ValueError(f"no command {name!r}; " + (f"did you mean {close[0]}?" if close else f"take {', '.join(COMMANDS)}"))
    module = _module(name)
    return Command(getattr(module, f"{name.capitalize()}Config"), textwrap.indent(module.EXAMPLES.strip("\n"), "  "))


def _words(error: BaseException) -> str:
    """An error as one line: what the system says of a file gets the remedy that the rooms' own errors have."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.errno is not None:
        text = f"{error.filename}: {os.strerror(error.errno).lower()}; {_REMEDIES.get(error.errno, 'check the path')}"
    return shortened(printable(text))


def _is_distributed(error: Exception) -> bool:
    """Whether JAX raised the error in a run of several processes. Where an array is read, JAX raises it as a ValueError."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(_STATUS.match(str(error)))


def _leave(code: int) -> int:
    """Return the exit code. A process of several exits at once, because a normal end would wait for the others."""
    if (jax := sys.modules.get("jax")) and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _module(name: str):
    return importlib.import_module(f"jsfdd.commands.{name}")


def _run(name: str, invocation: Invocation) -> int:
    """Carry out a command and return the exit code. Only this function imports JAX and the rooms, to keep --help fast."""
    module, config, output = _module(name), invocation.config, invocation.output
    if name == "completion":
        show(module.run(config, module.prepare(config)), output.json)
        return 0
    _prepare_jax()
    from jsfdd.base import processes

    if place := getattr(config, "processes", None):
        join = processes.check_place if output.dry_run else processes.start
        join(place.coordinator, place.num_processes, place.process_id)
    if out := getattr(config, "out", None):
        _check_out(out, is_file=name in _WRITE_A_FILE)
    prepared = module.prepare(config)
    if not output.dry_run and name in _COMPILE:
        _announce_compiling()
    outcome = (module.describe if output.dry_run else module.run)(config, prepared)
    if processes.is_primary():
        show(outcome, output.json)
    return outcome.exit_code


def _check_out(out: Path, is_file: bool) -> None:
    """Raise NotADirectoryError if `out` is below a file, or is a file and should be a directory: a command would notice only
    when it writes."""
    present = next(path for path in (*([] if is_file else [out]), *out.parents, Path()) if path.exists())
    if not present.is_dir():
        raise NotADirectoryError(f"{present}: not a directory; choose another --out")


def _prepare_jax() -> None:
    """Share compiled programs between processes, through a cache on disk, from which the ones used longest ago go first."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        # Not jsfdd/xla, where earlier versions kept programs without the times of use that JAX needs to drop the oldest: beside
        # one of those it would store nothing more.
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jsfdd" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


def _announce_compiling() -> None:
    """Say why the first minutes are slow, where no program has been compiled yet."""
    import jax

    from jsfdd.base.progress import console

    cache = Path(jax.config.jax_compilation_cache_dir)
    if not any(cache.glob("*-cache")):
        console.print(
            f"programs are compiled when first needed, seconds each, and kept in {cache} for the next run", soft_wrap=True
        )


if __name__ == "__main__":
    sys.exit(main())
