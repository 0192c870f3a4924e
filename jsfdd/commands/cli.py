"""The `jsfdd` command: one sub-command per stage, its options generated from the stage's config.

Exit codes: 0 done; 1 `jsfdd doctor` found an error; 2 wrong input or options (the message says which file, line or
value, and the remedy; nothing half-written stays); 3 another process of the run ended, so this one did too; 130 interrupted;
141 the reader of the output has closed it (`jsfdd … | head`); anything else is a fault of jsfdd and comes with its traceback.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

if os.environ.get("NO_COLOR"):
    os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")  # tyro knows the variable by this name alone, and reads it once

from jsfdd.commands.outcome import show
from jsfdd.commands.parser import Asked, Command, parse

# Wrong input reaches the command line as one of these; library code raises them with the remedy in the message.
_INPUT_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports of other tools

# `jsfdd X` is commands/x.py with XConfig, EXAMPLES, prepare, run and describe.
COMMANDS = (
    "respond", "score", "select", "train", "evaluate", "export", "generate", "doctor", "report", "plan", "run", "demo",
    "completion",
)  # fmt: skip

_DESCRIPTION = "Cheap training of draft models for speculative decoding."

_EPILOGUE = """
The stages in order: score chats by the flatness of the target's distributions, select the most
valuable share, train a draft on it, evaluate its acceptance, export it for serving; run does all
of them in one directory, for several selections at once. Before them, respond lets the target
answer the chats itself.

start here:
  jsfdd demo                  all of it on a small model, on a CPU, in minutes
  jsfdd COMMAND --help        options and examples of a command
  jsfdd COMMAND … --dry-run   what a command would do with these inputs

exit codes:
  0    done
  1    doctor found an error
  2    wrong input or options; stderr says which, and the remedy
  3    another process of the run ended, so this one did too
  130  interrupted; the same command continues where it stopped
  141  the reader of the output has closed it
  Anything else is a fault of jsfdd and comes with a traceback.

environment:
  NO_COLOR=1          no colours
  JSFDD_TRACEBACK=1   show where wrong input was noticed
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. The console script's entry point."""
    try:
        try:
            code = _answer(arguments)
        except SystemExit:  # of --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here and not at the process's end, where a closed pipe could only be complained of
        return code
    except BrokenPipeError:
        # Whatever is still to be flushed goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.dup2(nowhere, sys.stderr.fileno())
        return _leave(_BROKEN_PIPE)


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
    except _INPUT_ERRORS as error:
        if os.environ.get("JSFDD_TRACEBACK"):
            raise
        print(f"jsfdd: error: {error}", file=sys.stderr)
        return _leave(2)
    except RuntimeError as error:
        if not _needed_other_processes(error):
            raise
        print(
            f"jsfdd: error: a step that needs all processes failed ({str(error).splitlines()[0]}). If another process has "
            "ended, its own message says why; start all of them again with the same command, which continues",
            file=sys.stderr,
        )
        return _leave(3)
    except KeyboardInterrupt:
        print("jsfdd: interrupted; the same command continues where it stopped", file=sys.stderr)
        return _leave(130)


def overview() -> str:
    """What `jsfdd --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    first_sentences = (inspect.getdoc(command(name).config).splitlines()[0].split(". ")[0].rstrip(".") for name in COMMANDS)
    lines = [f"  {name:{width}}{sentence}" for name, sentence in zip(COMMANDS, first_sentences, strict=True)]
    return "\n".join(["usage: jsfdd COMMAND [OPTIONS]", "", _DESCRIPTION, "", "commands:", *lines, _EPILOGUE.rstrip("\n")])


def command(name: str) -> Command:
    """A command by its name. ValueError for one that there is not."""
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        raise ValueError(f"no command {name!r}; " + (f"did you mean {close[0]}?" if close else f"take {', '.join(COMMANDS)}"))
    module = _module(name)
    return Command(getattr(module, f"{name.capitalize()}Config"), textwrap.indent(module.EXAMPLES.strip("\n"), "  "))


def _needed_other_processes(error: RuntimeError) -> bool:
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and jax.distributed.is_initialized()


def _leave(code: int) -> int:
    """The exit code. One of several processes ends here and now: it would wait for the others, and they for it."""
    if (jax := sys.modules.get("jax")) and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _module(name: str):
    return importlib.import_module(f"jsfdd.commands.{name}")


def _run(name: str, asked: Asked) -> int:
    """Carry a command out; returns the exit code. JAX and the rooms are only imported here, so that --help answers at once."""
    module, config, output = _module(name), asked.config, asked.output
    if name == "completion":
        show(module.run(config, module.prepare(config)), output.json)
        return 0
    _prepare_jax()
    from jsfdd.base import processes

    if (place := getattr(config, "processes", None)) and not output.dry_run:
        processes.start(place.coordinator, place.num_processes, place.process_id)
    prepared = module.prepare(config)
    outcome = (module.describe if output.dry_run else module.run)(config, prepared)
    if processes.is_primary():
        show(outcome, output.json)
    return outcome.exit_code


def _prepare_jax() -> None:
    """Compile once per machine, not once per process."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jsfdd" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
    sys.exit(main())
