"""What each of several drafts that decode together had its part in.

    verified_share   of the draft tokens that the target verified, those that the draft proposed. A routed step verifies one
                     draft's tree, so this is the share of the steps that were given to it.
    accepted_share   of the draft tokens that were accepted, the same

A token that several drafts propose is counted for the one that found its path most probable (`decoding/merge.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jsfdd.base.records import DraftShares
from jsfdd.decoding.ensemble import Ensemble
from jsfdd.decoding.tree import TreeShape


def no_shares(num_prompts: int, num_drafts: int) -> DraftShares:
    """Zeros, int64[N, E] each."""
    return DraftShares(*(np.zeros((num_prompts, num_drafts), np.int64) for _ in DraftShares._fields))


def with_shares(report: dict, sources: Sequence[str], shares: DraftShares, ensemble: Ensemble, tree: TreeShape) -> dict:
    """A report with how its drafts were combined, and each draft's shares, over all prompts and by source.

    Args:
      report: of `evaluate`.
      sources: of each prompt.
      shares: [N, E] each, by prompt.
    """
    by_source = {
        source: figures | {"drafts": _of_each(ensemble, shares, [own == source for own in sources])}
        for source, figures in report["per_source"].items()
    }
    return report | {
        "combined": dataclasses.asdict(ensemble.combine) | {"tree_nodes": tree.nodes},
        "drafts": _of_each(ensemble, shares, [True] * len(sources)),
        "per_source": by_source,
    }


def _of_each(ensemble: Ensemble, shares: DraftShares, rows: Sequence[bool]) -> dict[str, dict]:
    offered, accepted = (counts[np.array(rows)].sum(axis=0) for counts in shares)
    return {
        name: {"verified_share": _share(offered, i), "accepted_share": _share(accepted, i)}
        for i, name in enumerate(ensemble.drafts)
    }


def _share(counts: np.ndarray, i: int) -> float | None:
    return float(counts[i] / counts.sum()) if counts.sum() else None
