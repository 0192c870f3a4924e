"""Drafts from wherever they are: alone, or together as --combine says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsfdd.commands.configs import EvaluateConfig, GenerateConfig
from jsfdd.decoding.ensemble import Combine, Ensemble, average_drafts, check_one_target
from jsfdd.models.draft import DraftConfig
from jsfdd.weights.checkpoint import load_draft as load_trained_draft
from jsfdd.weights.eagle import is_exported, read_draft

Draft = tuple[DraftConfig, dict]


def load_draft(path: Path) -> tuple[DraftConfig, dict]:
    """A draft from wherever it is: an exported directory, or a training run's last checkpoint."""
    return load_draft_and_record(path)[:2]


def load_draft_and_record(path: Path) -> tuple[DraftConfig, dict, dict | None]:
    """A draft, and what its training run recorded: None for an exported one."""
    return (*read_draft(path), None) if is_exported(path) else load_trained_draft(path)


def names_of(drafts: Sequence[Path]) -> dict[str, Path]:
    """Each draft under as much of its path's end as tells it from the others."""
    if len(set(drafts)) < len(drafts):
        raise ValueError(f"--draft: one draft is given twice: {', '.join(map(str, drafts))}")
    for length in range(1, max(len(path.parts) for path in drafts) + 1):
        names = ["-".join(path.parts[-length:]).strip("/") for path in drafts]
        if len(set(names)) == len(names):
            return dict(zip(names, drafts, strict=True))
    raise ValueError(f"--draft: {', '.join(map(str, drafts))} cannot be told apart by name; rename one")


def measured_drafts(config: EvaluateConfig) -> dict[str, Draft | Ensemble]:
    """All that an evaluation measures, by name: each draft, or what they are together, or both."""
    if config.combine is None:
        return {name: load_draft(path) for name, path in names_of(config.draft).items()}
    together, alone = _together(config)
    if not config.each_draft:
        return {config.combine: together}
    if config.combine in alone:
        raise ValueError(f"--draft: one is named {config.combine}, as --combine's result; rename it")
    return alone | {config.combine: together}


def answering_draft(config: GenerateConfig) -> Draft | Ensemble:
    """The one draft that an answer is decoded with, or what several are together."""
    return load_draft(config.draft[0]) if config.combine is None else _together(config)[0]


def _together(config: EvaluateConfig | GenerateConfig) -> tuple[Draft | Ensemble, dict[str, Draft]]:
    """What --combine makes of the drafts, and the drafts by name. ValueError says which of them are not alike, and how."""
    loaded = {name: load_draft_and_record(path) for name, path in names_of(config.draft).items()}
    drafts = {name: (draft, params) for name, (draft, params, _) in loaded.items()}
    check_one_target({name: draft for name, (draft, _) in drafts.items()})
    # An exported draft does not say which weights its target had.
    targets = [(name, record["target"]) for name, (*_, record) in loaded.items() if record is not None]
    for name, target in targets[1:]:
        if target != targets[0][1]:
            raise ValueError(
                f"drafts {targets[0][0]} and {name} cannot be combined: they were trained for different targets "
                f"(fingerprints {targets[0][1][:12]}… and {target[:12]}…)"
            )
    if config.combine == "average":
        return average_drafts(drafts, config.combine_weights or [1 / len(drafts)] * len(drafts)), drafts
    return Ensemble(drafts, Combine(config.combine, config.route_by, config.route_steps)), drafts
