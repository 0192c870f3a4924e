"""Several drafts by name, and what --combine makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsfdd.commands.options import DecodingOptions, DraftOptions
    from jsfdd.decoding.settings import Team
    from jsfdd.models.draft import Draft


def load_drafts(paths: Sequence[Path], num_layers: int) -> dict[str, Draft]:
    """The drafts of a target of so many layers, each under as much of its path's end as tells it from the others."""
    from jsfdd.weights.draft import load_draft

    return {name: load_draft(path, num_layers) for name, path in names_of(paths).items()}


def names_of(drafts: Sequence[Path]) -> dict[str, Path]:
    """Paths by names. ValueError where they cannot be told apart."""
    if not drafts:
        return {}
    if len(set(drafts)) < len(drafts):
        raise ValueError(f"--draft: one draft is given twice: {', '.join(map(str, drafts))}")
    for length in range(1, max(len(path.parts) for path in drafts) + 1):
        names = ["-".join(path.parts[-length:]).strip("/") for path in drafts]
        if len(set(names)) == len(names):
            return dict(zip(names, drafts, strict=True))
    raise ValueError(f"--draft: {', '.join(map(str, drafts))} cannot be told apart by name; rename one")


def check_combine(drafts: DraftOptions, decoding: DecodingOptions) -> None:
    """ValueError where --combine does not go with --draft or --tree-nodes."""
    combine, count = drafts.combine, len(drafts.draft)
    if combine is not None and count < 2:
        raise ValueError(f"--combine {combine}: needs two drafts or more, but --draft gives {count}")
    if decoding.tree_nodes and not count:
        raise ValueError("--tree-nodes is about a draft's tokens; give --draft DIR or leave it out")
    if combine is None:
        return
    if combine != "average" and not decoding.tree_nodes:
        raise ValueError(
            f"--combine {combine} works on trees, since a choice between sampled chains would change what is sampled; "
            "give --tree-nodes, with --tree-top-k 1 for a tree that is a chain"
        )


def one_team(options: DraftOptions, num_layers: int) -> Team:
    """What decodes together for a target of so many layers: no draft, one, or several as --combine says.

    Raises:
      ValueError: several drafts without --combine.
    """
    from jsfdd.decoding.settings import Team

    if len(options.draft) > 1 and options.combine is None:
        raise ValueError(f"--draft: got {len(options.draft)}, but without --combine one draft decodes")
    drafts = load_drafts(options.draft, num_layers)
    return Team(drafts) if options.combine is None else combined(drafts, options.combine)


def combined(drafts: Mapping[str, Draft], combine: str) -> Team:
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
    if combine == "average":
        return Team({"average": average_drafts(drafts, [1 / len(drafts)] * len(drafts))})
    return Team(drafts, Combine(combine))
