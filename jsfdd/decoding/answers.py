"""Answer prompts in one call, for a notebook: render, pad, decode, and turn the tokens back into text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jsfdd.base.mesh import make_mesh, round_up_to_shards, shard_rows, to_host
from jsfdd.base.records import Prompt
from jsfdd.decoding import generate as loop
from jsfdd.decoding.conversation_log import Answer
from jsfdd.decoding.conversations import PromptGroup, by_width, hold, read_answer
from jsfdd.decoding.prompts import prompt_batch, questions_in
from jsfdd.decoding.settings import EVERY_TOKEN, Cutoff, Team, TreeShape, check_temperature, decode_setup
from jsfdd.models.draft import Draft
from jsfdd.models.foreign import ForeignTarget
from jsfdd.weights.draft import check_draft
from jsfdd.weights.target import Target


class Answers(NamedTuple):
    """A target's answers to a list of prompts.

    Attributes:
      text: each answer's text.
      tokens: each answer's int32 ids, the stop token included.
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
    """Answer messages with a target, speculatively if there is a draft. A draft does not change the text (arXiv 2211.17192).

    Args:
      target: from `load_target`.
      prompts: one user message each; the target's chat template is applied to it.
      draft: from `load_draft`; without one, each step emits one token.
      max_new_tokens: the longest answer.
      temperature: 0 is greedy.
      num_draft_tokens: how many tokens the draft proposes per verification.
      tree: verify a tree of this shape, of depth `num_draft_tokens`, instead of a chain.
      cutoff: top-k and top-p, above temperature 0.
      batch_size: the most prompts decoded together; their lengths must round up to the same power of two.
      seed: for sampling. An answer depends on the seed and on the prompt's place in the list, not on other prompts.
      mesh: devices that share the rows; all devices by default.

    Raises:
      TypeError: `prompts` is a string.
      ValueError: a prompt with its answer is longer than the target's context, or the draft belongs to another target.

    Example:
      >>> answers = jsfdd.generate(target, ["Why is the sky blue?"], draft=draft, max_new_tokens=8)
      >>> answers.text == jsfdd.generate(target, ["Why is the sky blue?"], max_new_tokens=8).text
      True
      >>> answers.tau >= 1
      True
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is one string; give a list of them: [prompt]")
    if isinstance(target, ForeignTarget):
        raise ValueError(f"{target.name} is a foreign target: decoding needs its layers; load it with `load_target`")
    check_temperature(temperature)
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
    decode = loop.make_generate(setup, mesh)
    params = loop.prepare_params(target.params, team.params, mesh)
    tokens: dict[int, np.ndarray] = {}
    accept_counts = np.zeros(setup.num_draft_tokens + 1, np.int64)

    def answer(group: PromptGroup) -> list[Answer]:
        nonlocal accept_counts
        batch = prompt_batch(group.prompts, group.numbers, rows, seed=seed)
        out = to_host(decode(params, shard_rows(batch, mesh), temperature))
        answers = [ids[:length] for ids, length, _ in zip(out.tokens, out.lengths, group.rows)]
        tokens.update(zip(group.rows, answers))
        accept_counts += out.stats.accept_counts.sum(axis=0)
        return [read_answer(target, ids, max_new_tokens) for ids in answers]

    questions = questions_in([Prompt(f"prompts[{i}]", "", (text,)) for i, text in enumerate(prompts)])
    held = hold(target, questions, answer, by_width(rows), max_new_tokens=max_new_tokens) if questions else []
    steps, emitted = accept_counts.sum(), accept_counts @ np.arange(1, len(accept_counts) + 1)
    return Answers(
        text=[conversation.answers[0].text for conversation in held],
        tokens=[tokens[i] for i in range(len(prompts))],
        tau=float(emitted / steps) if team.drafts and steps else None,
    )
