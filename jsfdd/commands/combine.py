"""Several drafts by name, and what --combine makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsfdd.commands.evaluate import EvaluateConfig
    from jsfdd.commands.generate import GenerateConfig
    from jsfdd.decoding.settings import Team
    from jsfdd.models.draft import Draft


def names_of(drafts: Sequence[Path]) -> dict[str, Path]:
    """Each draft under as much of its path's end as tells it from the others."""
    if len(set(drafts)) < len(drafts):
        raise ValueError(f"--draft: one draft is given twice: {', '.join(map(str, drafts))}")
    for length in range(1, max(len(path.parts) for path in drafts) + 1):
        names = ["-".join(path.parts[-length:]).strip("/") for path in drafts]
        if len(set(names)) == len(names):
            return dict(zip(names, drafts, strict=True))
    raise ValueError(f"--draft: {', '.join(map(str, drafts))} cannot be told apart by name; rename one")


def measured_drafts(config: EvaluateConfig) -> dict[str, Team]:
    """All that an evaluation measures, by name: each draft, or what they are together, or both."""
    from jsfdd.decoding.settings import Team

    drafts = _load_drafts(config.draft)
    alone = {name: Team({name: draft}) for name, draft in drafts.items()}
    if config.combine is None:
        return alone
    together = _together(config, drafts)
    if not config.each_draft:
        return {config.combine: together}
    if config.combine in alone:
        raise ValueError(f"--draft: one is named {config.combine}, as --combine's result; rename it")
    return alone | {config.combine: together}


def answering_drafts(config: GenerateConfig) -> Team:
    """What an answer is decoded with: no draft, one, or what several are together."""
    from jsfdd.decoding.settings import Team

    drafts = _load_drafts(config.draft)
    return Team(drafts) if config.combine is None else _together(config, drafts)


def check_combine(config: EvaluateConfig | GenerateConfig) -> None:
    """ValueError where the options of --combine and --draft do not go together."""
    if config.combine is None:
        return
    count = len(config.draft)
    if count < 2:
        raise ValueError(f"--combine {config.combine}: needs two drafts or more, but --draft gives {count}")
    if config.combine_weights and len(config.combine_weights) != count:
        raise ValueError(f"--combine-weights: got {len(config.combine_weights)} of them for {count} drafts; give one for each")
    if config.combine != "average" and not config.tree_nodes:
        raise ValueError(
            f"--combine {config.combine} works on trees, since a choice between sampled chains would change what is sampled; "
            "give --tree-nodes, with --tree-top-k 1 for a tree that is a chain"
        )


def _load_drafts(paths: Sequence[Path]) -> dict[str, Draft]:
    from jsfdd.weights.draft import load_draft

    return {name: load_draft(path) for name, path in names_of(paths).items()} if paths else {}


def _together(config: EvaluateConfig | GenerateConfig, drafts: dict[str, Draft]) -> Team:
    """What --combine makes of the drafts. ValueError says which of them are not alike, and how."""
    from jsfdd.decoding.ensemble import average_drafts, check_one_target
    from jsfdd.decoding.settings import Combine, Team

    check_one_target({name: draft.config for name, draft in drafts.items()})
    # An exported draft does not say which weights its target had.
    targets = [(name, draft.record["target"]) for name, draft in drafts.items() if draft.record is not None]
    for name, target in targets[1:]:
        if target != targets[0][1]:
            raise ValueError(
                f"drafts {targets[0][0]} and {name} cannot be combined: they were trained for different targets "
                f"(fingerprints {targets[0][1][:12]}… and {target[:12]}…)"
            )
    if config.combine == "average":
        return Team({"average": average_drafts(drafts, config.combine_weights or [1 / len(drafts)] * len(drafts))})
    return Team(drafts, Combine(config.combine, config.route_by, config.route_steps))
