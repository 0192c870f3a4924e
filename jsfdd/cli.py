"""The `jsfdd` command: one sub-command per stage, its options generated from the stage's config.

Exit codes: 0 done; 1 `jsfdd doctor` found an error; 2 wrong input (one line says which file, line or value, and the
remedy; nothing half-written stays); 130 interrupted; anything else is a fault of jsfdd and comes with its traceback.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from jsfdd import config as options

# Wrong input reaches the command line as one of these; library code raises them with the remedy in the message.
_INPUT_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole loop on SmolLM2-135M with the packaged conversations, on a CPU, in minutes."""

    out: Path = Path("demo-run")
    """Directory of the run; a second call continues it and repeats nothing."""
    seed: int = 0
    """Seeds every random choice."""


def _command(kind, name):
    return Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)]


_COMMANDS = {
    "score": options.ScoreConfig,
    "select": options.SelectConfig,
    "train": options.TrainConfig,
    "evaluate": options.EvaluateConfig,
    "export": options.ExportConfig,
    "generate": options.GenerateConfig,
    "doctor": options.DoctorConfig,
    "report": options.ReportConfig,
    "run": options.RunConfig,
    "demo": DemoConfig,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. The console script's entry point."""
    try:
        commands = tuple(_command(kind, name) for name, kind in _COMMANDS.items())
        config = tyro.cli(
            tyro.conf.OmitArgPrefixes[typing.Union[commands]],  # noqa: UP007 (a tuple of members)
            args=arguments,
            prog="jsfdd",
            description="Cheap training of speculative-decoding draft models: score, select, train, evaluate, export.",
        )
        return _run(config)
    except _INPUT_ERRORS as error:
        if os.environ.get("JSFDD_TRACEBACK"):
            raise
        print(f"jsfdd: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jsfdd: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def _run(config) -> int:
    """Call the stage of a config; returns the exit code.

    JAX and the rooms are only imported here, so that --help answers at once.
    """
    # Without torch transformers still gives what is used of it, but says so on every import.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _prepare_jax()
    from jsfdd import pipeline

    match config:
        case DemoConfig():
            pipeline.run(demo_run(config))
        case options.RunConfig():
            pipeline.run(config)
        case options.ScoreConfig():
            table = pipeline.score(config)
            print(f"{len(table.ids)} samples scored: {config.out / 'scores.parquet'}")
        case options.SelectConfig():
            selection = pipeline.select(config)
            kept, dropped = len(selection.ids), len(selection.dropped)
            print(f"{kept} samples kept ({dropped} without a counted token): {config.out / 'selection.json'}")
        case options.TrainConfig():
            result = pipeline.train(config)
            print(f"{result.steps} steps on {result.samples} samples in {result.seconds:.0f} s: {config.out}")
        case options.EvaluateConfig():
            from jsfdd.evaluation.evaluate import compare
            from jsfdd.evaluation.table import print_evaluation

            reports = pipeline.evaluate(config)
            print_evaluation(reports, compare(reports, config.seed))
            print(config.out)
        case options.ExportConfig():
            pipeline.export(config)
            print(f"{config.flavour} draft: {config.out}")
        case options.GenerateConfig():
            from jsfdd.answer import answer

            answer(config)
        case options.DoctorConfig():
            from jsfdd.doctor import doctor

            return 1 if doctor(config).worst == "error" else 0
        case options.ReportConfig():
            print(pipeline.report(config))
    return 0


def demo_run(config: DemoConfig) -> options.RunConfig:
    """The demo's preset: small enough for two CPU cores, real in every part."""
    from importlib.resources import files

    folder = Path(str(files("jsfdd.data.demo")))
    return options.RunConfig(
        target="smollm2",
        data=(folder / "chats.jsonl",),
        prompts=(folder / "eval_prompts.jsonl",),
        out=config.out,
        seed=config.seed,
        max_length=384,
        batch_tokens=1024,
        epochs=3,
        learning_rate=1e-3,
        held_out_share=0.08,
        num_draft_tokens=3,
        max_new_tokens=32,
    )


def _prepare_jax() -> None:
    """Compile once per machine, not once per process."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jsfdd" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
    sys.exit(main())
