"""`jsfdd demo`: `jsfdd run` with the packaged model, conversations and prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jsfdd.commands import run as stages
from jsfdd.commands.options import ChatOptions, DecodingOptions, ModelOptions, RecipeOptions, SelectionOptions
from jsfdd.commands.outcome import Outcome
from jsfdd.commands.run import Prepared, RunConfig

EXAMPLES = """
jsfdd demo
jsfdd demo --seed 1 --out demo-seed-1
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Run all stages on SmolLM2-135M and packaged chats, on a CPU, in minutes."""

    out: Path = Path("demo-run")
    """Directory of the run. A second call continues it and repeats nothing."""
    seed: int = 0
    """Seed of every random choice of the command."""


def prepare(config: DemoConfig) -> Prepared:
    return stages.prepare(demo_run(config))


def run(config: DemoConfig, prepared: Prepared) -> Outcome:
    return stages.run(demo_run(config), prepared)


def describe(config: DemoConfig, prepared: Prepared) -> Outcome:
    return stages.describe(demo_run(config), prepared)


def demo_run(config: DemoConfig) -> RunConfig:
    """The demo's options: what docs/results.md recommends, small enough for two CPU cores.

    The packaged conversations are the target's own answers already: to decode them would take seven minutes more. They have
    3,713 different tokens, so a head of 4,096 can propose all of them; it halves a training step and costs no τ
    (experiments/016). Nothing is held out: forty other prompts judge the drafts.
    """
    from importlib.resources import files

    folder = Path(str(files("jsfdd.data.demo")))
    return RunConfig(
        model=ModelOptions(target="smollm2"),
        chats=ChatOptions(data=(folder / "chats.jsonl",), max_length=384, batch_tokens=1024),
        selection=SelectionOptions(within="cluster"),
        recipe=RecipeOptions(epochs=3, learning_rate=1e-3, held_out_share=0.0, draft_vocab=4096),
        decoding=DecodingOptions(num_draft_tokens=3, max_new_tokens=24),
        prompts=(folder / "eval_prompts.jsonl",),
        out=config.out,
        seed=config.seed,
    )
