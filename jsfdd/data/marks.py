"""The text that a chat template writes around the assistant's answers, learned by rendering a few short conversations.

A rendered text does not show which parts come from the template. So the template renders unique words, with a thought, with a
call, in the middle and at the end of a conversation; the text around these words comes from the template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jsfdd.data.messages import Message
from jsfdd.data.render import RefusedByTemplate, render

_QUESTION, _ANSWER, _THOUGHT, _NAME = "jsfddquestion", "jsfddanswer", "jsfddthought", "jsfddname"
# A mark such as <think>, white space, a word, or one other character: where two texts may be said to part.
_UNITS = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\s|\w+|.", re.DOTALL)


class TemplateMarks(NamedTuple):
    """What a template writes around answers.

    Attributes:
      prompt: what add_generation_prompt adds to a conversation; empty if that adds nothing of its own.
      thought_opening, thought_closing: between the prompt and a thought (`reasoning_content`), and between it and the
        content, white space at the end aside; None if the template writes no thoughts.
      call_opening: between the prompt and the name of a called tool; None if the template writes no calls.
      closers: texts of added tokens that close an answer.
      call_closers: texts of added tokens that close an answer which ends with a call, or those of `call_marks`.
      call_marks: texts of added tokens that end a call and belong to it; what closes the answer comes behind them.
      control: texts of added tokens that the template writes around plain messages: a message must not contain them.
      writes_tools: whether the template writes definitions of tools.
    """

    prompt: str
    thought_opening: str | None
    thought_closing: str
    call_opening: str | None
    closers: frozenset[str]
    call_closers: frozenset[str]
    call_marks: frozenset[str]
    control: frozenset[str]
    writes_tools: bool


def learn_marks(tokenizer) -> TemplateMarks:
    """The marks of the tokenizer's chat template; those that it does not show are empty or None."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    find_added = any_of(added)

    def write(*messages: Message, prompt: bool = False) -> str:
        try:
            return render(tokenizer, messages, prompt=prompt)
        except RefusedByTemplate:
            return ""

    question = Message(role="user", content=_QUESTION)
    answer = Message(role="assistant", content=_ANSWER)
    asked, prompted = write(question), write(question, prompt=True)
    plain, twice = write(question, answer), write(question, answer, question, answer)
    served, closed = prompted.partition(_QUESTION)[2], asked.partition(_QUESTION)[2]

    after_answers = [text for whole in (plain, twice) for text in whole.split(_ANSWER)[1:]]
    closers = frozenset(filter(None, (_next_added(text, find_added) for text in after_answers)))

    thinking = write(question, Message(role="assistant", content=_ANSWER, reasoning_content=_THOUGHT))
    thought_opening = _opening(thinking, _THOUGHT, served)
    thought_closing = thinking.partition(_THOUGHT)[2].partition(_ANSWER)[0].rstrip() if thought_opening is not None else ""

    calling = write(question, Message(role="assistant", content="", tool_calls=[_call()]))
    call_opening, call_closers, call_marks = _opening(calling, _NAME, served), closers, frozenset()
    if call_opening is not None:
        # An empty block of thoughts is written before any answer that has none.
        call_opening = call_opening[shared_beginning(call_opening, _opening(plain, _ANSWER, served) or "") :]
        after_call = [match.group() for match in find_added.finditer(calling.partition(_NAME)[2])]
        at_end = {match.group() for match in find_added.finditer(plain.partition(_ANSWER)[2])}
        closing = [token for token in after_call if token in closers | at_end] or after_call[-1:]
        call_closers = frozenset(closing[:1]) or closers
        call_marks = call_closers - closers - at_end - special
        if call_marks:
            result = Message(role="tool", content=_ANSWER, tool_call_id="call00001", name=_NAME)
            behind = any_of(call_marks).split(
                write(question, Message(role="assistant", content="", tool_calls=[_call()]), result)
            )
            call_closers |= frozenset(filter(None, [_next_added(behind[-1], find_added)]))
    return TemplateMarks(
        prompt=served[shared_beginning(served, closed) :],
        thought_opening=thought_opening,
        thought_closing=thought_closing,
        call_opening=call_opening,
        closers=closers,
        call_closers=call_closers,
        call_marks=call_marks,
        control=frozenset(
            match.group() for text in (prompted, plain, twice) for match in find_added.finditer(text) if _is_mark(match.group())
        ),
        writes_tools=_writes_tools(tokenizer, question),
    )


def any_of(words: Iterable[str]) -> re.Pattern:
    """Matches any of the words, the longest that fits; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def shared_beginning(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning, in whole words and marks."""
    length = 0
    for a_unit, b_unit in zip(_units(a), _units(b)):
        if a_unit != b_unit:
            break
        length += len(a_unit)
    return length


def _units(text: str) -> Iterator[str]:
    return (match.group() for match in _UNITS.finditer(text))


def _is_mark(text: str) -> bool:
    """Whether an added token is a mark rather than a word or white space, which any message may hold."""
    return bool(text.strip()) and not text[0].isalnum() and not text[-1].isalnum()


def _opening(text: str, word: str, served: str) -> str | None:
    """What stands between the end of the served prompt and the word."""
    if text.count(_QUESTION) != 1 or word not in text:
        return None
    before = text.partition(_QUESTION)[2].partition(word)[0]
    return before[shared_beginning(before, served) :]


def _next_added(text: str, find_added: re.Pattern) -> str | None:
    """The added token that comes first, white space aside."""
    match = find_added.match(text, len(text) - len(text.lstrip()))
    return match and match.group()


def _call() -> dict:
    return {"type": "function", "id": "call00001", "function": {"name": _NAME, "arguments": {}}}


def _writes_tools(tokenizer, question: Message) -> bool:
    function = {"name": _NAME, "description": "", "parameters": {"type": "object", "properties": {}}}
    try:
        return _NAME in render(tokenizer, [question], [{"type": "function", "function": function}])
    except RefusedByTemplate:
        return "tools" in tokenizer.chat_template
