"""Find the assistant's answers in a rendered conversation, and the thoughts that the template dropped.

The conversation is rendered a second time, with a placeholder word for every thought, content and called name of the assistant
(`_stand_ins`). The text around these words comes from the template, and is the same in the real rendering, so the text between
is what the template made of the answers. Two renderings find all answers. For plain messages the second rendering is kept, and
reused for every conversation with the same roles.

An answer is the text that the target writes after the generation prompt, up to the token that ends its turn: its thought, if
the template writes it, its content and its calls. Text that the template itself puts before a content (an empty block of
thoughts, a channel's name) is not part of the answer.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from jsfdd.data.marks import TemplateMarks, any_of
from jsfdd.data.messages import Message
from jsfdd.data.render import RefusedByTemplate, render

Span = tuple[int, int]  # first character, one past the last
Kind = Literal["reasoning", "thought", "content", "name"]  # "reasoning": a thought beside the content

_STAND_IN = "jsfddstandin"  # letters only, so that no template trims, splits or interprets it
_KEPT_FRAMES = 256
_THOUGHTS = ("reasoning", "thought")
_THOUGHT_MARK = re.compile(r"(</?think(?:ing)?>)")
_OPENED = re.compile(r"(<think(?:ing)?>\s*)?$")


class AnswerSpan(NamedTuple):
    """One answer in the rendered text.

    Attributes:
      begin, end: its characters, without the token that ends the turn.
      content: where the thought ends that the message has beside its content; `begin` if there is none.
      thought_left_out: whether the row gives a thought that the template does not write.
    """

    begin: int
    end: int
    content: int
    thought_left_out: bool


class Rewritten(ValueError):
    """The template changed an answer, so that it cannot be found in the rendered text."""


class _Leaf(NamedTuple):
    """A piece of an answer that stands alone in the text.

    Attributes:
      answer: the number of its message.
      kind, value: what it is.
      before, after: what surrounds it in the row's content; empty for what is not in the content.
    """

    answer: int
    kind: Kind
    value: str
    before: str = ""
    after: str = ""


class Frames:
    """What a template writes around plain messages of some roles, kept: most conversations of a file are alike in that.

    In these frames all contents are stand-ins, not the assistant's alone. Where the template does not write all of them, or
    not as they are, the frame does not fit and another is made for the conversation.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pieces = functools.lru_cache(_KEPT_FRAMES)(self._pieces)

    def fit(self, messages: Sequence[Message], text: str) -> tuple[list[_Leaf], list[list[Span]]] | None:
        """The contents' leaves and their spans in the text, if the messages are plain and their frame fits."""
        if _STAND_IN in text or not all(map(_is_plain, messages)):
            return None
        pieces = self.pieces(tuple(message["role"] for message in messages))
        leaves = [_Leaf(number, "content", message["content"]) for number, message in enumerate(messages)]
        spans = pieces and _fit(pieces[0::2], [int(number) for number in pieces[1::2]], leaves, text)
        return (leaves, spans) if spans else None

    def _pieces(self, roles: tuple[str, ...]) -> list[str] | None:
        messages = [Message(role=role, content=f"{_STAND_IN}{number:06d}") for number, role in enumerate(roles)]
        try:
            return re.split(rf"{_STAND_IN}(\d{{6}})", render(self.tokenizer, messages))
        except RefusedByTemplate:
            return None


def find_answers(
    frames: Frames, marks: TemplateMarks, messages: Sequence[Message], tools: Sequence[dict], text: str
) -> list[AnswerSpan]:
    """The answers of a conversation in its rendered `text`, in their order.

    Raises Rewritten where the template does not write an answer as it is, white space and dropped thoughts aside.
    """
    fit = None if tools else frames.fit(messages, text)
    leaves, spans = fit or _own_frame(frames.tokenizer, messages, tools, text)
    by_answer = defaultdict(list)
    for number, leaf in enumerate(leaves):
        by_answer[leaf.answer].append((leaf, spans[number]))
    answers, position = [], 0
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            answer = _answer(number, by_answer[number], marks, text, position)
            position = answer.end
            answers.append(answer)
    return answers


def _own_frame(
    tokenizer, messages: Sequence[Message], tools: Sequence[dict], text: str
) -> tuple[list[_Leaf], list[list[Span]]]:
    """The leaves of a conversation's answers and their spans, from a second rendering of it."""
    base = _STAND_IN
    while base in text:
        base += "x"
    replaced, leaves = _stand_ins(messages, base)
    try:
        pieces = re.split(rf"{base}(\d{{6}})", render(tokenizer, replaced, tools))
    except RefusedByTemplate as error:  # the template takes the conversation, but not this part of it
        raise Rewritten(f"it refuses other words in the answers' place: {error}") from error
    spans = _fit(pieces[0::2], [int(number) for number in pieces[1::2]], leaves, text)
    if spans is None:
        raise Rewritten("the text around the answers depends on what they say")
    return leaves, spans


def _is_plain(message: Message) -> bool:
    return message.keys() == {"role", "content"} and "<think" not in message["content"] and "</think" not in message["content"]


def find_marked_answers(marks: TemplateMarks, text: str) -> list[AnswerSpan]:
    """Find the answers in text from elsewhere: from each generation prompt to the next token that ends a turn."""
    if not marks.prompt.strip() or not marks.closers:
        raise Rewritten("the target's chat template puts no marks around answers by which they could be found in a text")
    header = re.sub(r"\s*<think(?:ing)?>\s*$", "", marks.prompt)
    opening = re.compile(f"{re.escape(marks.prompt)}|{re.escape(header)}")
    ends = any_of(marks.closers | marks.call_closers - marks.call_marks)
    answers, match = [], opening.search(text)
    while match:
        end = ends.search(text, match.end())
        last = end.start() if end else len(text)
        answers.append(AnswerSpan(match.end(), last, match.end(), False))
        match = opening.search(text, last)
    return answers


def _stand_ins(messages: Sequence[Message], base: str) -> tuple[list[Message], list[_Leaf]]:
    """The conversation with stand-ins for the answers' pieces, and what they stand for.

    A content that is blank beside a call or a thought stays: templates ask whether there is one. So do the marks around
    thoughts inside a content, by which templates split it.
    """
    leaves: list[_Leaf] = []

    def stand_in(leaf: _Leaf) -> str:
        leaves.append(leaf)
        return f"{base}{len(leaves) - 1:06d}"

    replaced = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            replaced.append(message)
            continue
        new = Message(**message)
        thought, calls = message.get("reasoning_content", ""), message.get("tool_calls", [])
        if thought.strip():
            new["reasoning_content"] = stand_in(_Leaf(number, "reasoning", thought))
        if message["content"].strip() or not (calls or thought.strip()):
            pieces = _pieces(message["content"], number)
            new["content"] = "".join(piece if isinstance(piece, str) else stand_in(piece) for piece in pieces)
        if calls:
            names = [_Leaf(number, "name", call["function"]["name"]) for call in calls]
            new["tool_calls"] = [
                call | {"function": call["function"] | {"name": stand_in(name)}} for call, name in zip(calls, names)
            ]
        replaced.append(new)
    return replaced, leaves


def _pieces(content: str, number: int) -> Iterator[str | _Leaf]:
    """A content as leaves and the marks between them; what a closing mark follows is a thought."""
    parts = _THOUGHT_MARK.split(content)  # every second part is a mark
    last_mark = max((i for i, part in enumerate(parts) if part.startswith("</think")), default=-1)
    for i, part in enumerate(parts):
        if i % 2 or (len(parts) > 1 and not part.strip()):
            yield part
        else:
            kind: Kind = "thought" if i < last_mark else "content"
            yield _Leaf(number, kind, part, "".join(parts[:i]), "".join(parts[i + 1 :]))


def _fit(pieces: Sequence[str], order: Sequence[int], leaves: Sequence[_Leaf], text: str) -> list[list[Span]] | None:
    """The spans of every leaf if the text is exactly these pieces with the leaves between them."""
    if not text.startswith(pieces[0]):
        return None
    spans: list[list[Span]] = [[] for _ in leaves]
    position = len(pieces[0])
    for number, piece, last in zip(order, pieces[1:], [False] * (len(order) - 1) + [True]):
        end = _end_of(leaves[number].value, piece, text, position, last)
        if end is None:
            return None
        spans[number].append((position, end))
        position = end + len(piece)
    return spans if position == len(text) else None


def _end_of(value: str, piece: str, text: str, position: int, last: bool) -> int | None:
    """Where what the template made of `value` ends: whole or trimmed, or else different in white space only."""
    for written in (value, value.strip(), value.strip("\n"), value.lstrip(), value.lstrip("\n"), value.rstrip()):
        end = position + len(written)
        if text.startswith(written, position) and text.startswith(piece, end) and (not last or end + len(piece) == len(text)):
            return end
    end = len(text) - len(piece) if last and text.endswith(piece) else text.find(piece, position) if piece else -1
    return end if end >= position and text[position:end].split() == value.split() else None


def _answer(number: int, leaves: Sequence[tuple[_Leaf, list[Span]]], marks: TemplateMarks, text: str, after: int) -> AnswerSpan:
    """Make one answer from its leaves' spans; `after` is the end of the answer before it."""
    for leaf, spans in leaves:
        if leaf.kind == "content" and len(spans) != 1:
            raise Rewritten(f"it writes the content of message {number + 1} {_times(len(spans))}")
        if leaf.kind == "name" and not spans:
            raise Rewritten(f"it leaves out a call in message {number + 1}")
    written = [(leaf, spans[0]) for leaf, spans in leaves if spans]
    if not written:
        raise Rewritten(f"it leaves out message {number + 1}")
    first, (begin, _) = min(written, key=lambda item: item[1][0])
    last, (_, end) = max(written, key=lambda item: item[1][1])
    if first.kind != "name":
        opening = marks.thought_opening if first.kind in _THOUGHTS else None
        if first.kind == "reasoning" and opening is None:  # of a template that drops thoughts in short conversations
            opening = _OPENED.search(text[:begin])[0]
        begin = _step_back(text, begin, first.before, opening)
    else:
        begin = _call_begin(text, begin, marks.call_opening, after)
    begin = _behind_prompt(text, begin, marks.prompt)
    if last.kind == "name":
        closing = any_of(marks.call_closers).search(text, end)
        if closing is None:
            raise Rewritten(f"nothing ends the call in message {number + 1}")
        end = closing.end() if closing.group() in marks.call_marks else closing.start()
    else:
        end = _step_on(text, end, last.after, marks.thought_closing if last.kind in _THOUGHTS else "")
    left_out = any(leaf.kind in _THOUGHTS and not spans for leaf, spans in leaves)
    others = [span[0] for leaf, span in written if leaf is not first]
    return AnswerSpan(begin, end, (others or [end])[0] if first.kind == "reasoning" else begin, left_out)


def _step_back(text: str, begin: int, before: str, opening: str | None) -> int:
    """Where the answer begins whose first leaf begins at `begin`: the marks before that are its own as well, if they are in the
    row's content, or if they are what the template writes before a thought."""
    for mark in (opening, before):
        if mark and text.startswith(mark, begin - len(mark)):
            return begin - len(mark)
    position, wanted = begin, before.split()
    for word in reversed(wanted):
        position = len(text[:position].rstrip())
        if not text.endswith(word, 0, position):
            return begin
        position -= len(word)
    return position


def _step_on(text: str, end: int, rest: str, closing: str) -> int:
    """Where the answer ends whose last leaf ends at `end`."""
    for mark in (closing, rest):
        if mark and text.startswith(mark, end):
            return end + len(mark)
    position = end
    for word in rest.split():
        position += len(text) - position - len(text[position:].lstrip())
        if not text.startswith(word, position):
            return end
        position += len(word)
    return position


def _call_begin(text: str, name: int, opening: str | None, after: int) -> int:
    """Where an answer without text before its first call begins."""
    if opening is not None and text.startswith(opening, name - len(opening)):
        return name - len(opening)
    head = opening.split(maxsplit=1)[0] if opening and opening.strip() else ""
    begin = text.rfind(head, after, name) if head else -1
    if begin < 0:
        raise Rewritten("the beginning of a call cannot be told from the template")
    return begin


def _behind_prompt(text: str, begin: int, prompt: str) -> int:
    """`begin`, or the end of the generation prompt if that ends later: one may open a thought that the row opens as well."""
    at = text.rfind(prompt, max(begin - len(prompt), 0), begin + len(prompt)) if prompt else -1
    return max(begin, at + len(prompt)) if at >= 0 and at < begin else begin


def _times(count: int) -> str:
    return "not once" if not count else f"{count} times"
