"""`jsfdd evaluate`: measure acceptance and speed of drafts by speculative decoding, and write report.json."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.commands.combine import check_combine, combined, load_drafts, name_drafts
from jsfdd.commands.inputs import describe_target, load_weights, tree_shape
from jsfdd.commands.options import (
    DecodingOptions,
    DraftOptions,
    ModelOptions,
    Paths,
    ProcessOptions,
    check,
    check_at_least,
    to_json,
)
from jsfdd.commands.outcome import Outcome, many, planned, rendered

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jsfdd.base.records import Prompt
    from jsfdd.decoding.settings import Team
    from jsfdd.models.draft import Draft
    from jsfdd.weights.target import Target

EXAMPLES = """
jsfdd evaluate --target smollm2 --draft draft --prompts prompts.jsonl --out evaluated
jsfdd evaluate --target DIR --draft draft-a draft-b --prompts prompts/ --out compared --json
jsfdd evaluate --target DIR --draft draft --tree-nodes 60 --prompts p.jsonl --out evaluated
jsfdd evaluate --target DIR --draft a b --combine merge --tree-nodes 60 --prompts p.jsonl --out o
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure acceptance and speed of drafts by speculative decoding."""

    model: ModelOptions
    decoding: DecodingOptions = DecodingOptions()
    drafts: DraftOptions = DraftOptions()
    processes: ProcessOptions = ProcessOptions()
    prompts: Paths
    """Prompts: files, directories or patterns as for --data. Rows have "turns"; a turn is asked after the answers to the
    turns before it."""
    batch_size: int = 8
    """Prompts decoded together."""
    out: Path
    """Directory for report.json. For several drafts, it gets a directory per draft and differences.json."""
    seed: int = 0
    """Seed of every random choice of the command."""

    def __post_init__(self):
        check("--draft", self.drafts.draft, len(self.drafts.draft) > 0, "at least one draft")
        check("--prompts", self.prompts, len(self.prompts) > 0, "at least one prompt file")
        check_at_least(1, batch_size=self.batch_size)
        check_combine(self.drafts, self.decoding)


class Prepared(NamedTuple):
    """The prompts, the drafts or teams by name, and the target without its weights."""

    prompts: list[Prompt]
    teams: dict[str, Team]
    target: Target


def prepare(config: EvaluateConfig) -> Prepared:
    from jsfdd.data.chat import read_prompts
    from jsfdd.weights.draft import check_draft

    tree_shape(config.decoding)
    prompts = read_prompts(config.prompts)
    target = describe_target(config.model)
    teams = measured_teams(config.drafts, target.config.num_layers)
    for name in teams:
        _check_no_other_report(config, config.out / name if len(teams) > 1 else config.out)
    for team in teams.values():
        for name, draft in team.drafts.items():
            check_draft(target, draft.config, name)
    check_prompts(target, prompts, config.decoding.max_new_tokens)
    return Prepared(prompts, teams, target)


def run(config: EvaluateConfig, prepared: Prepared) -> Outcome:
    """Evaluate. The outcome holds only the figures; prompts and examples are in each draft's report.json."""
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
    # On a narrow terminal, let lines wrap instead of cutting figures off.
    width = max(Console().width, 100)
    table = rendered(lambda out: print_evaluation(reports, differences, out), soft_wrap=True, width=width)
    values = {"command": "evaluate", "drafts": drafts, "differences": differences, "out": config.out}
    return Outcome(values, f"{table}written to {config.out}")


def describe(config: EvaluateConfig, prepared: Prepared) -> Outcome:
    prompts, teams, target = prepared
    combine, nodes = config.drafts.combine, config.decoding.tree_nodes
    values, words = describe_decoding(config.decoding, config.batch_size, config.model.model_shards, target, prompts)
    words = [f"{line}, for {many(len(teams), 'draft')}" for line in words]
    if combine is not None:
        how = {"average": "their average", "route": "each step routed to one of them", "merge": "their trees merged"}
        size = f", {many(nodes, 'node')} a tree" if nodes else ""
        words.append(f"{combine}: {' and '.join(name_drafts(config.drafts.draft))}, {how[combine]}{size}")
    files = [*(f"{name}/report.json" for name in teams), "differences.json"] if len(teams) > 1 else ["report.json"]
    return planned("evaluate", values | {"drafts": list(teams), "combine": combine}, words, config.out, files)


def evaluate(config: EvaluateConfig, prepared: Prepared | None = None) -> dict[str, dict]:
    """Write a report.json per draft (and differences.json if there are several), and return {draft's name: report}.

    Combined drafts have one report, named by the --combine rule.
    """
    from jsfdd.base.lock import sole_writer
    from jsfdd.base.processes import is_primary

    prepared = prepared or prepare(config)
    if is_primary():
        config.out.mkdir(parents=True, exist_ok=True)
    with sole_writer(config.out):
        return _evaluate(config, prepared)


def _evaluate(config: EvaluateConfig, prepared: Prepared) -> dict[str, dict]:
    from jsfdd.base.files import write_json
    from jsfdd.base.mesh import make_mesh
    from jsfdd.base.processes import agree, is_primary, wait_for_all
    from jsfdd.evaluation.evaluate import compare

    prompts, teams, _ = prepared
    mesh = make_mesh(model=config.model.model_shards)
    target = load_weights(config.model, mesh)
    agree({"the options": to_json(config), "the prompts": [dataclasses.asdict(prompt) for prompt in prompts]})
    agree({"the target": target.fingerprint})
    reports = measure(config.decoding, config.batch_size, config.seed, target, teams, prompts, mesh)
    if is_primary():
        for name, report in reports.items():
            out = config.out / name if len(reports) > 1 else config.out
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "report.json", report | {"config": to_json(config)})
        if len(reports) > 1:
            write_json(config.out / "differences.json", compare(reports, config.seed))
    wait_for_all("reports written")
    return reports


def _check_no_other_report(config: EvaluateConfig, out: Path) -> None:
    """Raise ValueError if there is a report of other options, which this one would replace."""
    from jsfdd.base.files import differences, plain, read_json

    path = out / "report.json"
    if not path.exists():
        return
    saved, present = ({**values, "out": None} for values in (read_json(path, dict).get("config", {}), plain(to_json(config))))
    if changed := differences(saved, present):
        raise ValueError(f"{path}: a report of other options ({changed}); choose another --out, or delete it")


def measured_teams(options: DraftOptions, num_layers: int) -> dict[str, Team]:
    """What is measured on a target of `num_layers` layers, by name: every draft by itself, or all drafts combined."""
    from jsfdd.decoding.settings import Team

    drafts = load_drafts(options.draft, num_layers)
    if options.combine is not None:
        return {options.combine: combined(drafts, options.combine)}
    return {name: Team({name: draft}) for name, draft in drafts.items()}


def measure(
    decoding: DecodingOptions,
    batch_size: int,
    seed: int,
    target: Target,
    drafts: Mapping[str, Draft | Team],
    prompts: Sequence[Prompt],
    mesh: Mesh,
) -> dict[str, dict]:
    """Measure drafts together, so that their figures are paired; return their reports."""
    from jsfdd.base.progress import progress
    from jsfdd.decoding.settings import Cutoff
    from jsfdd.evaluation import evaluate as evaluation

    with progress("decode", "answers") as bar:
        return evaluation.evaluate(
            target,
            drafts,
            prompts,
            mesh,
            temperature=decoding.temperature,
            num_draft_tokens=decoding.num_draft_tokens,
            max_new_tokens=decoding.max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            tree=tree_shape(decoding),
            cutoff=Cutoff(decoding.top_k, decoding.top_p),
            progress=bar.update,
        )


def check_prompts(target: Target, prompts: Sequence[Prompt], max_new_tokens: int) -> list[int]:
    """The length of each prompt's first turn. ValueError names a prompt that leaves no room for an answer."""
    from jsfdd.decoding.prompts import first_prompts

    return [len(tokens) for tokens in first_prompts(target, prompts, max_new_tokens)]


def describe_decoding(
    decoding: DecodingOptions, batch_size: int, model_shards: int, target: Target, prompts: Sequence[Prompt]
) -> tuple[dict, list[str]]:
    """Describe the decoding of the prompts: (values, words)."""
    from jsfdd.base.mesh import make_mesh, round_up_to_shards

    # Prompts of one source and turn are decoded together.
    together = Counter((prompt.source, turn) for prompt in prompts for turn in range(len(prompt.turns)))
    batch_size = round_up_to_shards(batch_size, make_mesh(model=model_shards))
    values = {
        "prompts": len(prompts),
        "turns": together.total(),
        "batches": sum(-(-count // batch_size) for count in together.values()),
        "longest_prompt": max(check_prompts(target, prompts, decoding.max_new_tokens)),
        "max_new_tokens": decoding.max_new_tokens,
    }
    batches, longest = many(values["batches"], "batch", "es"), many(decoding.max_new_tokens, "new token")
    return values, [
        f"decode {many(len(prompts), 'prompt')} ({many(values['turns'], 'turn')}) in {batches}, up to {longest} each, "
        "with and without a draft"
    ]
