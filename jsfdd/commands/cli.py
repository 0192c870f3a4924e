"""The `jsfdd` command: one sub-command per stage, its options generated from the stage's config.

Exit codes: 0 done; 1 `jsfdd doctor` found an error; 2 wrong input (one line says which file, line or value, and the
remedy; nothing half-written stays); 3 another process of the run ended, so this one did too; 130 interrupted; 141 who read
the output has closed it (`jsfdd … | head`); anything else is a fault of jsfdd and comes with its traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from jsfdd.commands.options import ProcessOptions
from jsfdd.commands.outcome import show
from jsfdd.commands.parser import Command, Help, parse

# Wrong input reaches the command line as one of these; library code raises them with the remedy in the message.
_INPUT_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports of other tools

# `jsfdd X` is commands/x.py, with XConfig, prepare, run and, for those that take --dry-run and --json, describe.
COMMANDS = (
    "respond", "score", "select", "train", "evaluate", "export", "generate", "doctor", "report", "plan", "run", "demo",
    "completion",
)  # fmt: skip
STAGES = ("respond", "score", "select", "train", "evaluate", "export", "run", "demo")

_EXAMPLES = {
    "respond": """
        jsfdd respond --target smollm2 --data chats.jsonl --max-new-tokens 512 --out answers.jsonl
        jsfdd respond --target DIR --data chats/ --temperature 0.7 --out answers.jsonl --dry-run
    """,
    "score": """
        jsfdd score --target smollm2 --data chats.jsonl --out scored
        jsfdd score --target DIR --data 'chats/*.jsonl.zst' more/ hf:ORG/NAME:train --out scored --dry-run
        jsfdd score --target DIR --data chats/ --keep-features flatness --retain-ratio 0.5 --out scored
    """,
    "select": """
        jsfdd select --scores scored/scores.parquet --retain-ratio 0.5 --out scored
        jsfdd select --scores scored/scores.parquet --metric random --seed 1 --out chance --json
    """,
    "train": """
        jsfdd train --target smollm2 --data chats.jsonl --selection scored/selection.json --out draft
        jsfdd train --target DIR --data chats/ --mask-spans thinking tool_calls --out draft --dry-run
        jsfdd train --target DIR --data chats/ --selection S --features scored/hidden --out draft
        jsfdd train --target DIR --data math.jsonl chat.jsonl --mix math=0.5 chat=0.5 --out draft
    """,
    "evaluate": """
        jsfdd evaluate --target smollm2 --draft draft --prompts prompts.jsonl --out evaluated
        jsfdd evaluate --target DIR --draft draft-a draft-b --prompts prompts/ --out compared --json
        jsfdd evaluate --target DIR --draft draft --tree-nodes 60 --prompts p.jsonl --out evaluated
        jsfdd evaluate --target DIR --draft a b --combine merge --tree-nodes 60 --prompts p.jsonl --out o
    """,
    "export": """
        jsfdd export --draft draft --flavour vllm --out draft-vllm
    """,
    "generate": """
        jsfdd generate --target smollm2 --draft draft --prompt "Why is the sky blue?"
        jsfdd generate --target smollm2 --draft draft --show-accepted --prompt "Write a limerick."
        jsfdd generate --target DIR --draft a b --combine route --tree-nodes 60 --prompt "What is 2 + 2?"
        jsfdd generate --target smollm2 --no-draft --prompt "Why is the sky blue?" > answer.txt
    """,
    "doctor": """
        jsfdd doctor --target smollm2 --data chats.jsonl --draft draft
        jsfdd doctor --target DIR --data chats.jsonl --draft draft-vllm && vllm serve …
    """,
    "report": """
        jsfdd report --run run
    """,
    "plan": """
        jsfdd plan --target smollm2 --data chats.jsonl
        jsfdd plan --target DIR --data chats.jsonl --dtype bfloat16 --devices 16 --device-kind "TPU v5"
    """,
    "run": """
        jsfdd run --target smollm2 --data chats.jsonl --prompts prompts.jsonl --out run --dry-run
        jsfdd run --target smollm2 --data chats.jsonl --prompts prompts.jsonl --arms full --out run
    """,
    "demo": """
        jsfdd demo
        jsfdd demo --seed 1 --out demo-seed-1
    """,
    "completion": """
        jsfdd completion bash > ~/.local/share/bash-completion/completions/jsfdd
        jsfdd completion zsh  > ~/.zfunc/_jsfdd      # a directory of your $fpath
        jsfdd completion fish > ~/.config/fish/completions/jsfdd.fish
    """,
}

_DESCRIPTION = "Cheap training of draft models for speculative decoding."

_EPILOGUE = """
The stages, in order: score chats by the flatness of the target's distributions, select the most
valuable share, train a draft on it, evaluate its acceptance, export it for serving. All of them in
one directory, for several selections at once: run. Before them, respond lets the target answer
the chats itself.

start here:
  jsfdd demo                  all of it on a small model, on a CPU, in minutes
  jsfdd COMMAND --help        options and examples of a command
  jsfdd COMMAND … --dry-run   what a stage would do with these inputs

exit codes:
  0    done
  1    doctor found an error
  2    wrong input or options; one line on stderr says which, and the remedy
  3    another process of the run ended, so this one did too
  130  interrupted; the same command continues where it stopped
  141  who read the output has closed it
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
    examples = {name: f"example:\n{_indented(text)}\n" for name, text in _EXAMPLES.items()}
    try:
        return _run(parse(configs(), STAGES, Help(_DESCRIPTION, _EPILOGUE, examples), arguments))
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


def _needed_other_processes(error: RuntimeError) -> bool:
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and jax.distributed.is_initialized()


def _leave(code: int) -> int:
    """The exit code; but one of several processes ends here and now, for else it would wait for the others, and they for it."""
    import jax

    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _indented(text: str) -> str:
    return textwrap.indent(textwrap.dedent(text).strip(), "  ")


def configs() -> dict[str, type]:
    """The config class of every command, by its name."""
    return {name: getattr(_module(name), f"{name.capitalize()}Config") for name in COMMANDS}


def _module(name: str):
    return importlib.import_module(f"jsfdd.commands.{name}")


def _run(command: Command) -> int:
    """Carry a command out; returns the exit code.

    JAX and the rooms are only imported here, so that --help answers at once.
    """
    name, config, output = command
    module = _module(name)
    if name == "completion":
        show(module.run(config, None), as_json=False)
        return 0
    _prepare_jax()
    from jsfdd.base import processes

    if isinstance(config, ProcessOptions) and not output.dry_run:
        processes.start(config.coordinator, config.num_processes, config.process_id)
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
