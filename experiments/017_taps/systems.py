"""What experiment 017 compares: its drafts alone, averaged, routed and merged."""

from __future__ import annotations

from typing import NamedTuple

from experiments.pool.pool import SMOKE, Pool, trained_draft
from jsfdd.decoding.ensemble import average_drafts
from jsfdd.decoding.settings import Combine, Team

NODES = 60
# Spec-Bench's chat part is MT-Bench, prompt for prompt.
PROMPTS = {"gsm8k": 2} if SMOKE else {"mt_bench": 10, "gsm8k": 14, "spec_bench/math_reasoning": 10}
SINGLE = ("maths", "chat", "mixed small", "mixed large")


class System(NamedTuple):
    """One or several drafts as they decode, and the nodes that are verified."""

    team: Team
    nodes: int = NODES


def systems(pool: Pool, training: str, seed: int, chosen: str = "", other_seed: int | None = None) -> dict[str, System]:
    """The drafts alone and together; `chosen` is what drafts' names have behind their subject.

    Drafts of one seed start from the same weights. With `other_seed` the maths draft is also averaged with a chat draft that
    started elsewhere.
    """
    drafts = {name: trained_draft(pool, f"{training} {name}{chosen} seed {seed}") for name in SINGLE}
    teams = {name: Team({name: draft}) for name, draft in drafts.items()}
    pair = {name: drafts[name] for name in ("maths", "chat")}
    teams["averaged"] = Team({"averaged": average_drafts(pair, (0.5, 0.5))})
    if other_seed is not None:
        unlike = pair | {"chat": trained_draft(pool, f"{training} chat{chosen} seed {other_seed}")}
        teams["averaged, of two starts"] = Team({"averaged": average_drafts(unlike, (0.5, 0.5))})
    teams["routed"] = Team(pair, Combine("route"))
    teams["routed by entropy"] = Team(pair, Combine("route", "entropy"))
    teams["routed per prompt"] = Team(pair, Combine("route", "confidence", 5))
    teams["merged at 60"] = Team(pair, Combine("merge"))
    at_60 = {name: System(team) for name, team in teams.items()}
    at_120 = {
        "mixed large at 120": System(teams["mixed large"], 2 * NODES),
        "merged at 120": System(teams["merged at 60"], 2 * NODES),
    }
    return {f"{name}{chosen}": system for name, system in (at_60 | at_120).items()}
