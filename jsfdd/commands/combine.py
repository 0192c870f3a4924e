"""Load several drafts by name, and combine them as --combine asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsfdd.commands.options import DecodingOptions, DraftOptions
    from jsfdd.decoding.settings import Team
    from jsfdd.models.draft import Draft


def load_drafts(paths: Sequence[Path], num_layers: int) -> dict[str, Draft]:
    """Load the drafts of a target of `num_layers` layers, each named by the shortest end of its path that is unique."""
    from jsfdd.weights.draft import load_draft

    return {name: load_draft(path, num_layers) for name, path in name_drafts(paths).items()}


def name_drafts(drafts: Sequence[Path]) -> dict[str, Path]:
    """Name each path by its shortest end that is unique. ValueError if there is no such name."""
    if not drafts:
        return {}
    if len(set(drafts)) < len(drafts):
        raise ValueError(f"--draft: a draft is given twice: {', '.join(map(str, drafts))}")
    for length in range(1, max(len(path.parts) for path in drafts) + 1):
        names = ["-".join(path.parts[-length:]).strip("/") for path in drafts]
        if len(set(names)) == len(names):
            return dict(zip(names, drafts, strict=True))
    raise ValueError(f"--draft: {', '.join(map(str, drafts))} have no different names; rename one")


def check_combine(drafts: DraftOptions, decoding: DecodingOptions) -> None:
    """Raise ValueError if --combine does not go with --draft or --tree-nodes."""
    combine, count = drafts.combine, len(drafts.draft)
    if combine is not None and count < 2:
        raise ValueError(f"--combine {combine}: needs two drafts or more, but --draft gives {count}")
    if decoding.tree_nodes and not count:
        raise ValueError("--tree-nodes sets the size of a draft's tree; give --draft DIR or leave it out")
    if combine in ("route", "merge") and not decoding.tree_nodes:
        raise ValueError(
            f"--combine {combine} works on trees, since a choice between sampled chains would change the text's distribution; "
            "give --tree-nodes, with --tree-top-k 1 for a tree that is a chain"
        )


def check_one_team(drafts: DraftOptions) -> None:
    """Raise ValueError if there are several drafts and no --combine."""
    if len(drafts.draft) > 1 and drafts.combine is None:
        raise ValueError(f"--draft: got {len(drafts.draft)}, but without --combine one draft decodes")


def one_team(options: DraftOptions, num_layers: int) -> Team:
    """Load the drafts that decode together for a target of `num_layers` layers: none, one, or several with --combine."""
    from jsfdd.decoding.settings import Team

    drafts = load_drafts(options.draft, num_layers)
    return Team(drafts) if options.combine is None else combined(drafts, options.combine)


def combined(drafts: Mapping[str, Draft], combine: str) -> Team:
    """Combine drafts by a --combine rule. ValueError names the drafts that do not go together, and the difference."""
    from jsfdd.decoding.ensemble import average_drafts, check_one_target
    from jsfdd.decoding.settings import Combine, Team

    check_one_target({name: draft.config for name, draft in drafts.items()})
    # An exported draft has no record, so its target's weights are unknown.
    targets = [(name, draft.record["target"]) for name, draft in drafts.items() if draft.record is not None]
    for name, target in targets[1:]:
        if target != targets[0][1]:
            raise ValueError(
                f"drafts {targets[0][0]} and {name} cannot be combined: they were trained for different targets "
                f"(fingerprints {targets[0][1][:12]}… and {target[:12]}…)"
            )
    if combine == "average":
        return Team({"average": average_drafts(drafts, [1 / len(drafts)] * len(drafts))})
    return Team(drafts, Combine(combine))
