"""The share of each draft in the work of drafts that decode together.

    verified_share   share of the verified draft tokens that the draft proposed. With routing, a step verifies one draft's
                     tree, so this is the share of the steps that were routed to the draft.
    accepted_share   share of the accepted draft tokens that the draft proposed

A token that several drafts propose counts for the draft that gives its path the highest probability (`decoding/merge.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from jsfdd.base.records import DraftShares
from jsfdd.decoding.settings import Combine, TreeShape


def no_shares(num_prompts: int, num_drafts: int) -> DraftShares:
    """Zero counts, int64[N, E] each."""
    return DraftShares(*(np.zeros((num_prompts, num_drafts), np.int64) for _ in DraftShares._fields))


def with_shares(
    report: dict, sources: Sequence[str], shares: DraftShares, names: Sequence[str], combine: Combine, tree: TreeShape
) -> dict:
    """Add to a report how its drafts were combined, and each draft's shares, over all prompts and by source.

    Args:
      report: from `evaluate`.
      sources: the source of each prompt.
      shares: [N, E] each, by prompt.
      names: the drafts' names.
      combine, tree: how the drafts decoded together.
    """
    sources = np.array(sources)
    by_source = {
        source: figures | {"drafts": _by_draft(names, shares, sources == source)}
        for source, figures in report["per_source"].items()
    }
    return report | {
        "combined": dataclasses.asdict(combine) | {"tree_nodes": tree.nodes},
        "drafts": _by_draft(names, shares, np.ones(len(sources), bool)),
        "per_source": by_source,
    }


def _by_draft(names: Sequence[str], shares: DraftShares, rows: Bool[np.ndarray, " N"]) -> dict[str, dict]:
    offered, accepted = (counts[rows].sum(axis=0) for counts in shares)
    return {name: {"verified_share": _share(offered, i), "accepted_share": _share(accepted, i)} for i, name in enumerate(names)}


def _share(counts: Int[np.ndarray, " E"], i: int) -> float | None:
    return float(counts[i] / counts.sum()) if counts.sum() else None
