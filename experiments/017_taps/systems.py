"""What experiment 017 compares: its drafts alone, averaged, routed and merged."""

from __future__ import annotations

from typing import NamedTuple

from experiments.pool.pool import SMOKE, Pool, trained_draft
from jsfdd.decoding.ensemble import Combine, average_drafts

NODES = 60
# Spec-Bench's chat part is MT-Bench, prompt for prompt.
PROMPTS = {"gsm8k": 2} if SMOKE else {"mt_bench": 10, "gsm8k": 14, "spec_bench/math_reasoning": 10}
SINGLE = ("maths", "chat", "mixed small", "mixed large")


class System(NamedTuple):
    """One or several drafts, as they decode: shapes, parameters, how they are combined, nodes that are verified."""

    shapes: object
    params: object
    combine: Combine | None = None
    nodes: int = NODES


def systems(pool: Pool, training: str, seed: int, chosen: str = "", other_seed: int | None = None) -> dict[str, System]:
    """The drafts alone and together; `chosen` is what drafts' names have behind their subject.

    Drafts of one seed start from the same weights. With `other_seed` the maths draft is also averaged with a chat draft that
    started elsewhere.
    """
    drafts = {name: trained_draft(pool, f"{training} {name}{chosen} seed {seed}") for name in SINGLE}
    found = {f"{name}{chosen}": System(draft.config, draft.params) for name, draft in drafts.items()}
    both = {name: drafts[name] for name in ("maths", "chat")}
    found[f"mixed large at 120{chosen}"] = found[f"mixed large{chosen}"]._replace(nodes=2 * NODES)
    found[f"averaged{chosen}"] = System(*average_drafts(both, (0.5, 0.5))[:2])
    if other_seed is not None:
        unlike = both | {"chat": trained_draft(pool, f"{training} chat{chosen} seed {other_seed}")}
        found[f"averaged, of two starts{chosen}"] = System(*average_drafts(unlike, (0.5, 0.5))[:2])
    shapes, params = (tuple(part) for part in zip(*(draft[:2] for draft in both.values())))
    found[f"routed{chosen}"] = System(shapes, params, Combine("route"))
    found[f"routed by entropy{chosen}"] = System(shapes, params, Combine("route", "entropy"))
    found[f"routed per prompt{chosen}"] = System(shapes, params, Combine("route", "confidence", 5))
    found[f"merged at 60{chosen}"] = System(shapes, params, Combine("merge"))
    found[f"merged at 120{chosen}"] = System(shapes, params, Combine("merge"), 2 * NODES)
    return found
