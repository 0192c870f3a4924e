"""τ of drafts on recorded answers, as chains of 5 and as trees of 60, greedy, without decoding again."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from experiments.pool.pool import AHEAD, MAX_NEW_TOKENS
from jsfdd.decoding.settings import TreeShape, decode_setup
from jsfdd.evaluation.replay import Recorded, make_judge, walk
from jsfdd.evaluation.replay_trees import make_tree_replay
from jsfdd.hidden.store import HiddenStore
from jsfdd.models.draft import DraftConfig
from jsfdd.weights.target import Target

TREE = TreeShape(AHEAD, 10, 60)


class Judge:
    """Counts by prompt, by programs that are compiled once for each shape of draft."""

    def __init__(self, target: Target, mesh: Mesh, recorded: Recorded, states: HiddenStore):
        self.target, self.mesh, self.recorded, self.states, self.compiled = target, mesh, recorded, states, {}

    def __call__(self, draft: DraftConfig, params: dict) -> dict:
        target, mesh, recorded = self.target, self.mesh, self.recorded
        if draft not in self.compiled:
            setup = decode_setup(target, [draft], num_draft_tokens=AHEAD, max_new_tokens=MAX_NEW_TOKENS, tree=TREE)
            self.compiled[draft] = (
                make_judge(target, self.states, recorded, draft, mesh, num_draft_tokens=AHEAD),
                make_tree_replay(target, self.states, recorded, setup, mesh),
            )
        chains, trees = self.compiled[draft]
        of_chains, (of_trees, _) = walk(recorded, chains(params)), trees([params])
        return {
            name: {
                "emitted": np.round(counts.emitted, 6).tolist(), "steps": np.round(counts.steps, 6).tolist(),
                "reached": counts.reached.sum(axis=0).tolist(), "accepted": counts.accepted.sum(axis=0).tolist(),
            }
            for name, counts in (("chain", of_chains), ("tree", of_trees))
        }  # fmt: skip
