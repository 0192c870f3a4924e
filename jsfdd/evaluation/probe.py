"""Measure τ during training by decoding a few prompts, since the held-out loss only approximates it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from jsfdd.base.mesh import round_up_to_shards, shard_rows, to_host
from jsfdd.base.records import Prompt
from jsfdd.decoding.generate import make_generate, prepare_drafts, prepare_params
from jsfdd.decoding.prompts import first_prompts, prompt_batch
from jsfdd.decoding.settings import decode_setup
from jsfdd.models.draft import DraftConfig
from jsfdd.weights.target import Target


def make_probe(
    target: Target, draft: DraftConfig, prompts: Sequence[Prompt], mesh: Mesh, *, num_draft_tokens: int, max_new_tokens: int
) -> Callable[[dict], dict]:
    """Make `probe(draft_params) -> {"tau", "alpha", "n_steps", "n_tokens"}`: greedy chains over every prompt's first turn.

    All prompts form one batch, compiled once. The same parameters give the same figures. Use few prompts and short answers.

    Raises:
      ValueError: a prompt with its answer is longer than the target's context; at a call, every answer is one token long.
    """
    rendered = first_prompts(target, prompts, max_new_tokens)
    rows = round_up_to_shards(len(rendered), mesh)
    batch = shard_rows(prompt_batch(rendered, range(len(rendered)), rows, seed=0), mesh)
    decode = make_generate(
        decode_setup(target, [draft], num_draft_tokens=num_draft_tokens, max_new_tokens=max_new_tokens), mesh
    )
    params = prepare_params(target.params, mesh=mesh)

    def probe(draft_params: dict) -> dict:
        out = to_host(decode(params._replace(drafts=prepare_drafts([draft_params], params.target, mesh)), batch, 0.0))
        counts = out.stats.accept_counts.sum(axis=0, dtype=np.int64)
        steps = int(counts.sum())
        if not steps:
            raise ValueError("--probe-prompts: every answer ends with its first token; take prompts with longer answers")
        reached, accepted = (x.sum(axis=0).tolist() for x in (out.stats.reached, out.stats.accepted))
        return {
            "tau": float(counts @ np.arange(1, len(counts) + 1) / steps),
            "alpha": [a / r if r else None for a, r in zip(accepted, reached, strict=True)],
            "n_steps": steps,
            "n_tokens": int(out.lengths.sum()),
        }

    return probe
