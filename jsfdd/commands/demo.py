"""`jsfdd demo`: `jsfdd run` with the packaged model, conversations and prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jsfdd.commands import run as stages
from jsfdd.commands.outcome import Outcome
from jsfdd.commands.run import Prepared, RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole loop on SmolLM2-135M with the packaged conversations, on a CPU, in minutes."""

    out: Path = Path("demo-run")
    """Directory of the run; a second call continues it and repeats nothing."""
    seed: int = 0
    """Seeds every random choice."""


def prepare(config: DemoConfig) -> Prepared:
    return stages.prepare(demo_run(config))


def run(config: DemoConfig, prepared: Prepared) -> Outcome:
    return stages.run(demo_run(config), prepared)


def describe(config: DemoConfig, prepared: Prepared) -> Outcome:
    return stages.describe(demo_run(config), prepared)


def demo_run(config: DemoConfig) -> RunConfig:
    """The demo's preset: small enough for two CPU cores, real in every part."""
    from importlib.resources import files

    folder = Path(str(files("jsfdd.data.demo")))
    return RunConfig(
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
