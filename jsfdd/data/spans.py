"""Parts of answers that --mask-spans leaves out of the assistant mask: thoughts, and calls of tools.

The target and the draft still read them, but scores and losses skip them. The rules apply to the text that the chat template
rendered:

    thinking      <think> … </think> and <thinking> … </thinking>. A closing mark without an opening one ends what began
                  with the answer, as where a template writes the opening mark into the generation prompt.
    tool_calls    <tool_call> … </tool_call>, <function_call> … </function_call>, and what follows [TOOL_CALLS] or
                  <|python_tag|>; of a message with `tool_calls`, all that follows its content.

The marks belong to their span. A span that is never closed lasts to the end of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jsfdd.data.forms import Message

MaskSpan = Literal["thinking", "tool_calls"]

_MARKS: dict[MaskSpan, tuple[tuple[str, str | None], ...]] = {
    "thinking": (("<think>", "</think>"), ("<thinking>", "</thinking>")),
    "tool_calls": (
        ("<tool_call>", "</tool_call>"),
        ("<function_call>", "</function_call>"),
        ("[TOOL_CALLS]", None),
        ("<|python_tag|>", None),
    ),
}


def excluded_spans(answer: str, message: Message, kinds: Collection[MaskSpan]) -> list[tuple[int, int]]:
    """Spans (first character, one past the last) of an answer's text that do not count; they may overlap.

    Args:
      answer: the message as the template rendered it, without what closes the turn.
      message: the assistant's message.
      kinds: which spans.
    """
    spans = []
    for kind in kinds:
        for opening, closing in _MARKS[kind]:
            spans += _marked(answer, opening, closing)
        if kind == "tool_calls" and "tool_calls" in message:
            content = message["content"].strip()
            spans.append((answer.find(content) + len(content), len(answer)))
    return [span for span in spans if span[0] < span[1]]


def _marked(text: str, opening: str, closing: str | None) -> list[tuple[int, int]]:
    end = re.escape(closing) + r"|\Z" if closing else r"\Z"
    spans = [match.span() for match in re.finditer(rf"{re.escape(opening)}.*?(?:{end})", text, re.DOTALL)]
    first = text.find(closing) if closing else -1
    if first >= 0 and not any(begin <= first < end for begin, end in spans):
        spans.append((0, first + len(closing)))
    return spans
