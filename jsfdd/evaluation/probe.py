"""A real decode during training: what the held-out loss only hints at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from jsfdd.base.mesh import num_data_shards, replicate, shard_rows, to_host
from jsfdd.base.records import Prompt
from jsfdd.decoding.generate import DecodeSetup, make_generate, prepare_params
from jsfdd.decoding.prompts import bucket_width, check_length, prompt_batch, render_turns
from jsfdd.models.draft import DraftConfig
from jsfdd.models.sharding import place_params
from jsfdd.weights.target import Target


def make_probe(
    target: Target, draft: DraftConfig, prompts: Sequence[Prompt], mesh: Mesh, *, num_draft_tokens: int, max_new_tokens: int
) -> Callable[[dict], dict]:
    """`probe(draft_params) -> {"tau", "alpha", "n_steps", "n_tokens"}`: greedy chains over every prompt's first turn.

    One batch, compiled once; the same parameters give the same figures. Few prompts and short answers keep it cheap.

    Raises:
      ValueError: a prompt with its answer is longer than the target's context.
    """
    ids = [render_turns(target, prompt, []) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        check_length(target, prompt, len(tokens), max_new_tokens)
    shards = num_data_shards(mesh)
    rows = -(-len(ids) // shards) * shards
    width = bucket_width(max(len(tokens) for tokens in ids))
    batch = shard_rows(prompt_batch(ids, range(len(ids)), rows, width, seed=0, turn=0), mesh)
    setup = DecodeSetup(target.config, draft, num_draft_tokens, max_new_tokens, target.stop_tokens)
    decode = make_generate(setup, mesh)
    target_params = prepare_params(place_params(target.params, mesh))

    def probe(draft_params: dict) -> dict:
        params = target_params | {"draft": replicate(draft_params, mesh)}
        out = to_host(decode((params, np.float32(0)), batch))
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
