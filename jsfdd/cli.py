"""The `jsfdd` command: one sub-command per stage, its options generated from the stage's config.

Exit codes: 0 done; 2 wrong input (one line says which file, line or value, and the remedy; nothing half-written stays);
130 interrupted; anything else is a fault of jsfdd and comes with its traceback.
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
        _run(config)
    except _INPUT_ERRORS as error:
        if os.environ.get("JSFDD_TRACEBACK"):
            raise
        print(f"jsfdd: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jsfdd: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0


def _run(config) -> None:
    """Call the stage of a config. JAX and the rooms are only imported here, so that --help answers at once."""
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
            report = pipeline.evaluate(config)
            print(
                f"τ {report['tau']:.3f} [{report['tau_low']:.3f}, {report['tau_high']:.3f}], speedup "
                f"{report['speedup']:.2f}×, n = {report['n_prompts']} prompts: {config.out / 'report.json'}"
            )
        case options.ExportConfig():
            pipeline.export(config)
            print(f"{config.flavour} draft: {config.out}")
        case options.GenerateConfig():
            _generate(config)
        case options.ReportConfig():
            print(pipeline.report(config))


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


def _generate(config: options.GenerateConfig) -> None:
    """Print the answer as it comes; τ and tokens/s go to stderr, so that a pipe gets the text alone."""
    import jax.numpy as jnp

    from jsfdd.data.template import render_prompt
    from jsfdd.decoding.generate import DecodeSetup, prepare_params
    from jsfdd.decoding.stream import stream_answer
    from jsfdd.evaluation.evaluate import check_draft
    from jsfdd.pipeline import load_draft
    from jsfdd.weights.load import load_target

    if not config.prompt.strip():
        raise ValueError("--prompt is empty; give the user's message")
    drafted = None if config.draft is None else load_draft(config.draft)
    target = load_target(config.target, jnp.dtype(config.dtype))
    draft, draft_params = drafted or (None, None)
    if draft is not None:
        check_draft(target, draft, str(config.draft))
    params = prepare_params(target.params, draft_params)
    depth = config.num_draft_tokens if draft else 0
    setup = DecodeSetup(target.config, draft, depth, config.max_new_tokens, target.stop_tokens)
    prompt = render_prompt(target.tokenizer, [{"role": "user", "content": config.prompt}])
    if len(prompt) + config.max_new_tokens > target.config.max_position:
        raise ValueError(
            f"--prompt: {len(prompt)} tokens and an answer of up to {config.max_new_tokens} exceed the context of "
            f"{target.config.max_position} tokens; shorten it or lower --max-new-tokens"
        )
    shown: list[int] = []
    written = ""

    def show(tokens):
        # A character can be spread over several tokens: print what is settled, hold back a broken end.
        nonlocal written
        shown.extend(tokens)
        text = target.tokenizer.decode(shown, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(written) :], end="", flush=True)
            written = text

    result = stream_answer(setup, params, prompt, config.seed, config.temperature, show)
    text = target.tokenizer.decode(shown, skip_special_tokens=True)
    print(text[len(written) :])
    tau = f"τ {result.tau:.2f}, " if draft is not None and result.tau is not None else ""
    rate = len(result.tokens) / result.seconds
    print(f"{tau}{len(result.tokens)} tokens, {rate:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
