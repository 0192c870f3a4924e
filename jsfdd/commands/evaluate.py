"""`jsfdd evaluate`: acceptance and speed of drafts by real speculative decoding, as report.json."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.commands.combine import check_combine, measured_drafts, names_of
from jsfdd.commands.inputs import tree_shape
from jsfdd.commands.options import Batched, CombineOptions, DecodingOptions, ProcessOptions, Seeded, TargetOptions
from jsfdd.commands.outcome import Outcome, many, planned, rendered

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jsfdd.base.records import Prompt
    from jsfdd.commands.run import RunConfig
    from jsfdd.decoding.settings import Team
    from jsfdd.models.draft import Draft
    from jsfdd.weights.target import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TargetOptions, DecodingOptions, CombineOptions, Batched, Seeded, ProcessOptions):
    """Measure acceptance and speed by real speculative decoding."""

    draft: tuple[Path, ...]
    """Drafts, each a training run's directory, its checkpoints/, or an exported draft. Several are compared in pairs, unless
    --combine makes one of them."""
    prompts: tuple[Path, ...]
    """Prompts: files, directories or patterns as for --data; rows with "turns"; each turn's own answer feeds the next."""
    out: Path
    """Directory for report.json, or where several drafts are compared for a directory of each and differences.json."""
    each_draft: bool = False
    """With --combine: also measure each draft alone, and compare them all on the same prompts, with the same --tree-nodes."""

    def __post_init__(self):
        super().__post_init__()
        if not self.draft:
            raise ValueError("--draft: got none, but it must be at least one draft")
        check_combine(self)
        if self.each_draft and self.combine is None:
            raise ValueError("--each-draft does nothing without --combine: drafts are measured alone anyway")


class Prepared(NamedTuple):
    """Prompts, drafts by name, and the target without its weights."""

    prompts: list[Prompt]
    drafts: dict[str, Team]
    target: Target


def prepare(config: EvaluateConfig) -> Prepared:
    from jsfdd.data.chat import read_prompts
    from jsfdd.weights.draft import check_draft
    from jsfdd.weights.target import describe_target

    tree_shape(config)
    prompts = read_prompts(config.prompts)
    drafts = measured_drafts(config)
    target = describe_target(config.target)
    for team in drafts.values():
        for name, draft in team.drafts.items():
            check_draft(target, draft.config, name)
    check_prompts(config, target, prompts)
    return Prepared(prompts, drafts, target)


def run(config: EvaluateConfig, prepared: Prepared) -> Outcome:
    """The outcome has the figures alone; prompts and examples are in each draft's file."""
    from rich.console import Console

    from jsfdd.evaluation.evaluate import compare
    from jsfdd.report.table import print_evaluation

    reports = evaluate(config, prepared)
    differences = compare(reports, config.seed)
    drafts = {
        name: {key: value for key, value in report.items() if isinstance(value, int | float) or value is None}
        | {key: report[key] for key in ("alpha", "accept_counts", "combined", "drafts") if key in report}
        for name, report in reports.items()
    }
    # A figure cut off is worse than a line that wraps.
    width = max(Console().width, 100)
    table = rendered(lambda out: print_evaluation(reports, differences, out), soft_wrap=True, width=width)
    values = {"command": "evaluate", "drafts": drafts, "differences": differences, "out": config.out}
    return Outcome(values, f"{table}{config.out}")


def describe(config: EvaluateConfig, prepared: Prepared) -> Outcome:
    prompts, drafts, target = prepared
    values, words = describe_decoding(config, target, prompts)
    words = [f"{line}, for {many(len(drafts), 'draft')}" for line in words]
    if config.combine is not None:
        how = {"average": "their average", "route": "each step routed to one of them", "merge": "their trees merged"}
        nodes = f", {many(config.tree_nodes, 'node')} a tree" if config.tree_nodes else ""
        words.append(f"{config.combine}: {' and '.join(names_of(config.draft))}, {how[config.combine]}{nodes}")
    several = [*(f"{name}/report.json" for name in drafts), "differences.json"]
    files = several if len(drafts) > 1 else ["report.json"]
    return planned("evaluate", values | {"drafts": list(drafts), "combine": config.combine}, words, config.out, files)


def evaluate(config: EvaluateConfig, prepared: Prepared | None = None) -> dict[str, dict]:
    """Write a report.json a draft (and differences.json); returns {draft's name: report}.

    Drafts that are combined are one, named as what combines them.
    """
    import jax.numpy as jnp

    from jsfdd.base.files import write_json
    from jsfdd.base.mesh import make_mesh
    from jsfdd.base.processes import agree, is_primary, wait_for_all
    from jsfdd.evaluation.evaluate import compare
    from jsfdd.weights.target import load_target

    prompts, drafts, _ = prepared or prepare(config)
    mesh = make_mesh(model=config.model_shards)
    target = load_target(config.target, jnp.dtype(config.dtype), mesh)
    agree({"the options": config.to_json(), "the prompts": [dataclasses.asdict(prompt) for prompt in prompts]})
    agree({"the target": target.fingerprint})
    reports = measure(config, target, drafts, prompts, mesh)
    if is_primary():
        for name, report in reports.items():
            out = config.out / name if len(reports) > 1 else config.out
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "report.json", report | {"config": config.to_json()})
        if len(reports) > 1:
            write_json(config.out / "differences.json", compare(reports, config.seed))
    wait_for_all("reports written")
    return reports


def measure(
    config: EvaluateConfig | RunConfig,
    target: Target,
    drafts: Mapping[str, Draft | Team],
    prompts: Sequence[Prompt],
    mesh: Mesh,
) -> dict[str, dict]:
    """The reports of drafts that are measured together, so paired."""
    from jsfdd.base.progress import progress
    from jsfdd.decoding.settings import Cutoff
    from jsfdd.evaluation import evaluate as evaluation

    with progress("decode", "answers") as bar:
        return evaluation.evaluate(
            target,
            drafts,
            prompts,
            mesh,
            temperature=config.temperature,
            num_draft_tokens=config.num_draft_tokens,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            seed=config.seed,
            tree=tree_shape(config),
            cutoff=Cutoff(config.top_k, config.top_p),
            progress=bar.update,
        )


def check_prompts(config: EvaluateConfig | RunConfig, target: Target, prompts: Sequence[Prompt]) -> list[int]:
    """Tokens of each prompt's first turn. ValueError names a prompt that leaves no room for an answer."""
    from jsfdd.decoding.prompts import first_prompts

    return [len(tokens) for tokens in first_prompts(target, prompts, config.max_new_tokens)]


def describe_decoding(
    config: EvaluateConfig | RunConfig, target: Target, prompts: Sequence[Prompt]
) -> tuple[dict, list[str]]:
    """What decoding the prompts takes: (values, words)."""
    from jsfdd.base.mesh import make_mesh, round_up_to_shards

    # Prompts of one source and turn are decoded together.
    together = Counter((prompt.source, turn) for prompt in prompts for turn in range(len(prompt.turns)))
    batch_size = round_up_to_shards(config.batch_size, make_mesh(model=config.model_shards))
    values = {
        "prompts": len(prompts),
        "turns": together.total(),
        "batches": sum(-(-count // batch_size) for count in together.values()),
        "longest_prompt": max(check_prompts(config, target, prompts)),
        "max_new_tokens": config.max_new_tokens,
    }
    batches, longest = many(values["batches"], "batch", "es"), many(config.max_new_tokens, "new token")
    return values, [
        f"decode {many(len(prompts), 'prompt')} ({many(values['turns'], 'turn')}) in {batches}, up to {longest} each, "
        "with and without a draft"
    ]
