"""`jsfdd generate`: one answer on the terminal, printed as it is decoded.

The text goes to stdout and nothing else does; τ, tokens/s and whose tokens were accepted go to stderr, so that a pipe gets
the text alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.commands.combine import answering_draft, check_combine
from jsfdd.commands.inputs import tree_shape
from jsfdd.commands.options import CombineOptions, DecodingOptions, Seeded, TargetOptions
from jsfdd.commands.outcome import Outcome

if TYPE_CHECKING:
    from jsfdd.decoding.ensemble import Ensemble
    from jsfdd.models.draft import Draft

_COLOURS = (32, 33, 36, 35, 34)  # of text on a terminal: green, yellow, cyan, magenta, blue


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(TargetOptions, DecodingOptions, CombineOptions, Seeded):
    """Answer one prompt and print the text as it is decoded."""

    prompt: str
    """The user's message."""
    draft: tuple[Path, ...] = ()
    """A training run's directory, its checkpoints/, or an exported draft; several with --combine."""
    no_draft: bool = False
    """Decode without a draft, one token a step."""
    show_accepted: bool = False
    """Mark the tokens that the draft proposed: green on a terminal, in [brackets] elsewhere. Of several drafts each has a
    colour of its own, or its number: [1:…] [2:…]."""

    def __post_init__(self):
        super().__post_init__()
        if bool(self.draft) == self.no_draft:
            raise ValueError("give either --draft DIR or --no-draft")
        check_combine(self)
        if len(self.draft) > 1 and self.combine is None:
            raise ValueError(f"--draft: got {len(self.draft)}, but without --combine one draft decodes")
        if self.no_draft and self.show_accepted:
            raise ValueError("--show-accepted marks a draft's tokens, and there are none with --no-draft")
        if not self.prompt.strip():
            raise ValueError("--prompt is empty; give the user's message")


class Prepared(NamedTuple):
    """The draft (or what several are together) and the drafts by name; the prompt's tokens."""

    draft: Draft | Ensemble | None
    members: dict[str, Draft]
    tokens: list[int]


def prepare(config: GenerateConfig) -> Prepared:
    from jsfdd.base.records import Prompt
    from jsfdd.decoding.ensemble import members_of
    from jsfdd.decoding.prompts import check_length, render_turns
    from jsfdd.evaluation.evaluate import check_draft
    from jsfdd.weights.target import describe_target

    tree_shape(config)
    draft = None if config.no_draft else answering_draft(config)
    members = {} if draft is None else members_of(str(config.draft[0]), draft)
    target = describe_target(config.target)
    for name, member in members.items():
        check_draft(target, member.config, name)
    prompt = Prompt("--prompt", "", (config.prompt,))
    tokens = render_turns(target, prompt, [])
    check_length(target, prompt, len(tokens), config.max_new_tokens)
    return Prepared(draft, members, tokens)


def run(config: GenerateConfig, prepared: Prepared) -> Outcome:
    """Decode the answer to `config.prompt`, printing as it comes: no words are left for the end."""
    import jax.numpy as jnp

    from jsfdd.base.mesh import make_mesh, replicate
    from jsfdd.decoding.ensemble import as_decoded
    from jsfdd.decoding.generate import DecodeSetup, prepare_params
    from jsfdd.decoding.stream import stream_answer
    from jsfdd.decoding.verify import Cutoff
    from jsfdd.weights.target import load_target

    draft, members, tokens = prepared
    mesh = make_mesh(data=1, model=config.model_shards)
    target = load_target(config.target, jnp.dtype(config.dtype), mesh)
    draft_config, draft_params, combine = (None, None, None) if draft is None else as_decoded(draft)
    setup = DecodeSetup(
        target.config,
        draft_config,
        config.num_draft_tokens if draft else 0,
        config.max_new_tokens,
        target.stop_tokens,
        tree_shape(config) if draft else None,
        Cutoff(config.top_k, config.top_p),
        combine,
    )
    marks = _marks(len(members)) if config.show_accepted else [("", "")] * len(members)
    writer = _Writer(target.tokenizer, marks)
    params = prepare_params(target.params, None if draft is None else replicate(draft_params, mesh))
    result = stream_answer(setup, params, tokens, config.seed, config.temperature, writer.show)
    writer.finish()
    tau = f"τ {result.tau:.2f}, " if draft is not None and result.tau is not None else ""
    rate = len(result.tokens) / result.seconds
    print(f"{tau}{len(result.tokens)} tokens, {rate:.1f} tokens/s", file=sys.stderr)
    if len(members) > 1:
        each = [f"{before}{name}{after} {result.accepted[i]}" for i, (name, (before, after)) in enumerate(zip(members, marks))]
        print(f"draft tokens accepted: {', '.join(each)}", file=sys.stderr)
    values = {"command": "generate", "tau": result.tau, "tokens": len(result.tokens), "seconds": result.seconds}
    return Outcome(values, "")


class _Writer:
    """Prints text whose tokens come in groups, those of a draft between two marks of its own.

    A character can be spread over several tokens: a group is printed as far as its text is settled, and what is left of
    it comes with the next one.
    """

    def __init__(self, tokenizer, marks: Sequence[tuple[str, str]]):
        self.tokenizer, self.marks = tokenizer, marks
        self.tokens: list[int] = []
        self.written = ""

    def show(self, tokens: list[int], proposers: list[int]) -> None:
        """Print tokens of which the first were proposed, by the drafts of these numbers."""
        for proposer, pairs in itertools.groupby(zip(proposers, tokens), key=lambda pair: pair[0]):
            self._group([token for _, token in pairs], *self.marks[proposer])
        self._group(tokens[len(proposers) :], "", "")

    def finish(self) -> None:
        """Print what was held back, and end the line."""
        print(self._text()[len(self.written) :])

    def _group(self, tokens, before, after):
        self.tokens += tokens
        text = self._text()
        new = text[len(self.written) :]
        if new and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(before + new + after, end="", flush=True)
            self.written = text

    def _text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)


def _marks(drafts: int) -> list[tuple[str, str]]:
    """Around each draft's tokens: a colour, green the first, where a terminal shows colours; elsewhere brackets, numbered if
    there are several drafts."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    if coloured:
        return [(f"\x1b[{_COLOURS[number % len(_COLOURS)]}m", "\x1b[0m") for number in range(drafts)]
    return [("[", "]")] if drafts == 1 else [(f"[{number}:", "]") for number in range(1, drafts + 1)]
