"""`jsfdd generate`: one answer on the terminal, printed as it is decoded.

The text goes to stdout and nothing else does; τ and tokens/s go to stderr, so that a pipe gets the text alone.
"""

from __future__ import annotations

import os
import sys

import jax.numpy as jnp

from jsfdd.config import GenerateConfig
from jsfdd.decoding.generate import DecodeSetup, prepare_params
from jsfdd.decoding.stream import stream_answer
from jsfdd.decoding.verify import Cutoff
from jsfdd.evaluation.evaluate import check_draft
from jsfdd.evaluation.prompts import check_length, render_turns
from jsfdd.mesh import make_mesh, replicate
from jsfdd.pipeline import load_draft, tree_shape
from jsfdd.records import Prompt
from jsfdd.weights.load import load_target


def answer(config: GenerateConfig) -> None:
    """Decode the answer to `config.prompt`, printing as it comes."""
    tree = tree_shape(config)
    draft, draft_params = (None, None) if config.draft is None else load_draft(config.draft)
    mesh = make_mesh(data=1, model=config.model_shards)
    target = load_target(config.target, jnp.dtype(config.dtype), mesh)
    if draft is not None:
        check_draft(target, draft, str(config.draft))
    prompt = Prompt("--prompt", "", (config.prompt,))
    tokens = render_turns(target, prompt, [])
    check_length(target, prompt, len(tokens), config.max_new_tokens)
    setup = DecodeSetup(
        target.config,
        draft,
        config.num_draft_tokens if draft else 0,
        config.max_new_tokens,
        target.stop_tokens,
        tree if draft else None,
        Cutoff(config.top_k, config.top_p),
    )
    writer = _Writer(target.tokenizer, _marks() if config.show_accepted else ("", ""))
    params = prepare_params(target.params, None if draft_params is None else replicate(draft_params, mesh))
    result = stream_answer(setup, params, tokens, config.seed, config.temperature, writer.show)
    writer.finish()
    tau = f"τ {result.tau:.2f}, " if draft is not None and result.tau is not None else ""
    rate = len(result.tokens) / result.seconds
    print(f"{tau}{len(result.tokens)} tokens, {rate:.1f} tokens/s", file=sys.stderr)


class _Writer:
    """Prints text whose tokens come in groups, those of the draft between two marks.

    A character can be spread over several tokens: a group is printed as far as its text is settled, and what is left of
    it comes with the next one.
    """

    def __init__(self, tokenizer, marks: tuple[str, str]):
        self.tokenizer, self.marks = tokenizer, marks
        self.tokens: list[int] = []
        self.written = ""

    def show(self, tokens: list[int], accepted: int) -> None:
        """Print tokens of which the first `accepted` were proposed by the draft."""
        self._group(tokens[:accepted], *self.marks)
        self._group(tokens[accepted:], "", "")

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


def _marks() -> tuple[str, str]:
    """Around a draft's tokens: green where a terminal shows colours, brackets elsewhere."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return ("\x1b[32m", "\x1b[0m") if coloured else ("[", "]")
