"""Answers to prompts in one call, for a notebook: rendered, padded, decoded, and turned into text again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jsfdd.base.mesh import make_mesh, round_up_to_shards, shard_rows, to_host
from jsfdd.base.records import Prompt
from jsfdd.decoding import generate as loop
from jsfdd.decoding.conversation_log import Answer
from jsfdd.decoding.conversations import Asked, by_width, hold, read_answer
from jsfdd.decoding.prompts import prompt_batch, questions_in
from jsfdd.decoding.settings import EVERY_TOKEN, Cutoff, Team, TreeShape, decode_setup
from jsfdd.models.draft import Draft
from jsfdd.weights.draft import check_draft
from jsfdd.weights.target import Target

# A notebook asks again and again with the same settings: their programs are compiled once.
_make_generate = functools.lru_cache(maxsize=4)(loop.make_generate)


class Answers(NamedTuple):
    """What a target answered.

    Attributes:
      text: of each prompt's answer.
      tokens: the same as int32 ids, the stop token included.
      tau: tokens emitted per verification by the target, over all answers; None without a draft.
    """

    text: list[str]
    tokens: list[Int[np.ndarray, " n"]]
    tau: float | None


def generate(
    target: Target,
    prompts: Sequence[str],
    *,
    draft: Draft | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    num_draft_tokens: int = 4,
    tree: TreeShape | None = None,
    cutoff: Cutoff = EVERY_TOKEN,
    batch_size: int = 8,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Answers:
    """Let a target answer messages, speculatively if there is a draft: the text is the target's own (arXiv 2211.17192).

    Args:
      target: from `load_target`.
      prompts: one user's message each, which the target's chat template surrounds.
      draft: from `load_draft`; without one, each step gives one token.
      max_new_tokens: longest answer.
      temperature: 0 is greedy.
      num_draft_tokens: how many the draft proposes for each verification.
      tree: verify a tree of this shape, of depth `num_draft_tokens`, in place of a chain.
      cutoff: top-k and top-p, above temperature 0.
      batch_size: prompts decoded together; only rows of a similar length are.
      seed: of what is sampled. An answer depends on it and on the prompt's place in the list, not on other prompts.
      mesh: devices that share the rows; all by default.

    Raises:
      ValueError: a prompt with its answer is longer than the target's context, or the draft is of another target.

    Example:
      >>> answers = jsfdd.generate(target, ["Why is the sky blue?"], draft=draft, max_new_tokens=8)
      >>> answers.text == jsfdd.generate(target, ["Why is the sky blue?"], max_new_tokens=8).text
      True
      >>> answers.tau >= 1
      True
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is one string; give a list of them: [prompt]")
    if draft is not None:
        check_draft(target, draft.config, "draft")
    team = Team({} if draft is None else {"draft": draft})
    mesh = mesh or make_mesh()
    rows = round_up_to_shards(max(min(batch_size, len(prompts)), 1), mesh)
    setup = decode_setup(
        target,
        team.configs,
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=max_new_tokens,
        tree=tree,
        cutoff=cutoff,
    )
    decode = _make_generate(setup, mesh)
    params = loop.prepare_params(target.params, team.params, mesh)
    tokens: dict[int, np.ndarray] = {}
    accept_counts = np.zeros(setup.num_draft_tokens + 1, np.int64)

    def answer(asked: Asked) -> list[Answer]:
        nonlocal accept_counts
        batch = prompt_batch(asked.prompts, asked.numbers, rows, seed=seed)
        out = to_host(decode(params, shard_rows(batch, mesh), temperature))
        answers = [ids[:length] for ids, length, _ in zip(out.tokens, out.lengths, asked.rows)]
        tokens.update(zip(asked.rows, answers))
        accept_counts += out.stats.accept_counts.sum(axis=0)
        return [read_answer(target, ids, max_new_tokens) for ids in answers]

    asked = questions_in([Prompt(f"prompts[{i}]", "", (text,)) for i, text in enumerate(prompts)])
    held = hold(target, asked, answer, by_width(rows), max_new_tokens=max_new_tokens) if asked else []
    steps, emitted = accept_counts.sum(), accept_counts @ np.arange(1, len(accept_counts) + 1)
    return Answers(
        text=[conversation.answers[0].text for conversation in held],
        tokens=[tokens[i] for i in range(len(prompts))],
        tau=float(emitted / steps) if team.drafts and steps else None,
    )
