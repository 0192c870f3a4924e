"""`jsfdd generate`: print one answer on the terminal as it is decoded.

Only the text goes to stdout, for pipes. τ, tokens/s and the accepted tokens of each draft go to stderr, and what a speculative
step costs beside a plain one, for which a few plain steps are timed after the answer.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.commands.combine import check_combine, check_one_team, one_team
from jsfdd.commands.inputs import describe_target, load_weights, setup_of, tree_shape
from jsfdd.commands.options import DecodingOptions, DraftOptions, Flag, ModelOptions, OptionalPath
from jsfdd.commands.outcome import Outcome, described, many

if TYPE_CHECKING:
    from jsfdd.decoding.settings import Team
    from jsfdd.decoding.state import DecodeParams
    from jsfdd.weights.target import Target

_PLAIN_TOKENS = 12  # of an answer without a draft, whose steps are timed
_COLOURS = (32, 33, 36, 35, 34)  # ANSI codes of green, yellow, cyan, magenta, blue

EXAMPLES = """
jsfdd generate --target smollm2 --draft draft --prompt "Why is the sky blue?"
jsfdd generate --target smollm2 --draft draft --show-accepted --prompt "Write a limerick."
jsfdd generate --target DIR --draft a b --combine merge --tree-nodes 60 --prompt "What is 2 + 2?"
jsfdd generate --target smollm2 --prompt "Why is the sky blue?" > answer.txt
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Answer one prompt and print the text as it is decoded."""

    model: ModelOptions
    decoding: DecodingOptions = DecodingOptions()
    drafts: DraftOptions = DraftOptions()
    prompt: str
    """The user's message."""
    system: str = ""
    """A system message before it."""
    tools: OptionalPath = None
    """A JSON file with tool definitions, like the "tools" of a chat, for the chat template."""
    show_accepted: Flag = False
    """Mark the tokens that the draft proposed: green on a terminal, in [brackets] elsewhere. Several drafts have different
    colours, or numbers: [1:…] [2:…]."""
    seed: int = 0
    """Seed of every random choice of the command."""

    def __post_init__(self):
        check_one_team(self.drafts)
        check_combine(self.drafts, self.decoding)
        if self.show_accepted and not self.drafts.draft:
            raise ValueError("--show-accepted marks a draft's tokens; give --draft DIR or leave it out")
        if not self.prompt.strip():
            raise ValueError("--prompt is empty; give the user's message")


class Prepared(NamedTuple):
    """The drafts, and the prompt's tokens."""

    team: Team
    tokens: list[int]


def prepare(config: GenerateConfig) -> Prepared:
    from jsfdd.base.records import Prompt
    from jsfdd.data.forms import read_tools
    from jsfdd.decoding.prompts import first_prompts
    from jsfdd.weights.draft import check_draft

    tree_shape(config.decoding)
    target = describe_target(config.model)
    team = one_team(config.drafts, target.config.num_layers)
    for name, draft in team.drafts.items():
        check_draft(target, draft.config, name)
    tools = () if config.tools is None else read_tools(config.tools)
    prompt = Prompt("--prompt", "", (config.prompt,), config.system, tools)
    (tokens,) = first_prompts(target, [prompt], config.decoding.max_new_tokens)
    return Prepared(team, tokens)


def run(config: GenerateConfig, prepared: Prepared) -> Outcome:
    """Decode the answer to `config.prompt` and print it meanwhile; the outcome has no words left to print."""
    from jsfdd.base.mesh import make_mesh
    from jsfdd.decoding.generate import prepare_params
    from jsfdd.decoding.stream import stream_answer
    from jsfdd.evaluation.step_cost import memory_ratio, step_cost_words

    team, tokens = prepared
    mesh = make_mesh(data=1, model=config.model.model_shards)
    target = load_weights(config.model, mesh)
    marks = _marks(len(team.drafts)) if config.show_accepted else [("", "")] * len(team.drafts)
    writer = _Writer(target.tokenizer, marks)
    params = prepare_params(target.params, team.params, mesh)
    setup, temperature = setup_of(target, team, config.decoding), config.decoding.temperature
    result = stream_answer(setup, params, tokens, config.seed, temperature, writer.show)
    writer.finish()
    tau = f"τ {result.tau:.2f}, " if team.drafts and result.tau is not None else ""
    rate = len(result.tokens) / result.seconds
    print(f"{tau}{len(result.tokens)} tokens, {rate:.1f} tokens/s", file=sys.stderr)
    if len(team.drafts) > 1:
        named = enumerate(zip(team.drafts, marks))
        counts = [f"{before}{name}{after} {result.accepted[number]}" for number, (name, (before, after)) in named]
        print(f"draft tokens accepted: {', '.join(counts)}", file=sys.stderr)
    values = {"command": "generate", "tau": result.tau, "tokens": len(result.tokens), "seconds": result.seconds}
    if team.drafts and result.step_seconds is not None:
        plain = _plain_step_seconds(config, target, params, tokens)
        if plain is not None:
            ratio = result.step_seconds / plain
            from_memory = memory_ratio(target.config, setup.drafts, config.decoding.num_draft_tokens)
            print(step_cost_words(result.tau, ratio, from_memory), file=sys.stderr)
            values |= {"cost_ratio": ratio, "memory_cost_ratio": from_memory}
    return Outcome(values, "")


def describe(config: GenerateConfig, prepared: Prepared) -> Outcome:
    team, tokens = prepared
    how = f"drafted by {' and '.join(team.drafts)}" if team.drafts else "without a draft"
    words = f"answer a prompt of {many(len(tokens), 'token')} with up to {config.decoding.max_new_tokens:,}, {how}"
    return described("generate", {"drafts": list(team.drafts), "prompt_tokens": len(tokens)}, [words])


def _plain_step_seconds(config: GenerateConfig, target: Target, params: DecodeParams, tokens: list[int]) -> float | None:
    """Seconds of a step without a draft, over the first few of the same answer; None if it has too few to time."""
    from jsfdd.decoding.settings import Team
    from jsfdd.decoding.stream import stream_answer

    few = min(_PLAIN_TOKENS, config.decoding.max_new_tokens)
    alone = setup_of(target, Team({}), dataclasses.replace(config.decoding, max_new_tokens=few, tree_nodes=0))
    without_drafts = params._replace(drafts=())
    return stream_answer(alone, without_drafts, tokens, config.seed, config.decoding.temperature, lambda *_: None).step_seconds


class _Writer:
    """Prints the text of tokens that come in groups, and puts marks around a draft's tokens.

    A character can span several tokens, so a group that ends inside a character is printed together with the next group.
    """

    def __init__(self, tokenizer, marks: Sequence[tuple[str, str]]):
        self.tokenizer, self.marks = tokenizer, marks
        self.tokens: list[int] = []
        self.written = ""

    def show(self, tokens: list[int], proposers: list[int]) -> None:
        """Print tokens, of which the first len(proposers) were proposed by the drafts of those numbers."""
        for proposer, pairs in itertools.groupby(zip(proposers, tokens), key=lambda pair: pair[0]):
            self._group([token for _, token in pairs], *self.marks[proposer])
        self._group(tokens[len(proposers) :], "", "")

    def finish(self) -> None:
        """Print the remaining text, and end the line."""
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
    """The marks around each draft's tokens: colours on a terminal that shows them, else brackets, numbered if several drafts
    decode."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    if coloured:
        return [(f"\x1b[{_COLOURS[number % len(_COLOURS)]}m", "\x1b[0m") for number in range(drafts)]
    return [("[", "]")] if drafts == 1 else [(f"[{number}:", "]") for number in range(1, drafts + 1)]
