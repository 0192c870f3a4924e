"""What `jsfdd plan --compile` adds to the estimates: what the compiler of an accelerator says of every stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from jsfdd.base.mesh import num_data_shards
from jsfdd.base.numbers import gigabytes
from jsfdd.commands import ahead, costs
from jsfdd.commands.ahead import Compiled
from jsfdd.commands.options import DecodingOptions
from jsfdd.data.batches import Shape
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.models.draft import draft_config
from jsfdd.training.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from jsfdd.commands.plan import Plan, PlanConfig


def compile_stages(config: PlanConfig, plan: Plan) -> list[Compiled]:
    """Compile the largest batch of each stage for `plan.mesh`."""
    target, mesh = plan.target, plan.mesh
    platform = "tpu" if mesh.devices.flat[0].platform == "tpu" else "gpu"
    read = costs.largest_shape(target, plan.lengths, config.chats.batch_tokens, platform)
    shards = num_data_shards(mesh)
    trained = Shape(-(-read.rows // shards), read.length)
    recipe = Recipe(draft_kind=config.draft_kind, soft_targets=config.soft_targets, compute_dtype="bfloat16")
    setup = DecodeSetup(
        target=target,
        drafts=(draft_config(target, kind=config.draft_kind),),
        num_draft_tokens=DecodingOptions.num_draft_tokens,
        max_new_tokens=config.max_new_tokens,
    )
    asked = Shape(-(-config.batch_size // shards), config.chats.max_length)

    def rounds(stage: str, shape: Shape) -> int:
        return ahead.head_rounds(stage, mesh, shape)

    return [
        ahead.compile_stage("score", read, lambda: ahead.lower_score(target, mesh, read), rounds("score", read)),
        ahead.compile_stage("hidden states", read, lambda: ahead.lower_hidden(target, mesh, read, setup.layers)),
        ahead.compile_stage(
            "train", trained, lambda: ahead.lower_train(target, mesh, trained, recipe), rounds("train", trained)
        ),
        ahead.compile_stage("evaluate", asked, lambda: ahead.lower_decode(setup, mesh, asked)),
    ]


def print_compiled(topology: str, compiled: list[Compiled], plan: Plan, out: Console) -> None:
    """Print what the compiler said as a table, its bytes beside the estimates."""
    out.print(f"compiled for {topology}, {plan.mesh.size} devices (GB of one, seconds of compiling):")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("stage", "batch", "GB", "estimate", "temporary", "Mcycles", "CPU s", "exchanges"):
        table.add_column(name, justify="left" if name in ("stage", "exchanges") else "right", no_wrap=True)
    estimates = {stage.name: stage.program for stage in plan.stages}
    for stage in compiled:
        batch, estimate = f"{stage.shape.rows} × {stage.shape.length}", gigabytes(estimates[stage.name])
        if stage.program is None:
            table.add_row(stage.name, batch, "too much", estimate)
            continue
        program = stage.program
        exchanges = ", ".join(f"{count} {kind}" for kind, (_, count) in program.collectives.items())
        table.add_row(
            stage.name, batch, gigabytes(program.peak), estimate, gigabytes(program.temporaries),
            f"{program.cycles / 1e6:.0f}" if program.cycles else "", f"{program.seconds:.0f}", exchanges or "none",
        )  # fmt: skip
    out.print(table)
    for stage in compiled:
        if stage.refused:
            out.print(f"{stage.name} does not fit: {stage.refused}", soft_wrap=True)
