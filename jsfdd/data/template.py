"""Chats to token ids with the exact assistant mask, through a tokenizer's own chat template.

Templates seldom mark what the assistant says, so it is found: the conversation is rendered a second time with
stand-ins for the contents, and what surrounds them is the template's. Characters map to tokens by the fast tokenizer's
offsets, so the ids are those of `tokenizer.apply_chat_template` on the whole conversation.

The mask (records.Sample.assistant_mask) holds
  - every token with a character of an answer's content, as the template renders it (many templates trim it);
  - the answer's end-of-turn token: the added token (one outside the tokenizer's ordinary vocabulary) that the template
    writes next, white space aside. A template that ends answers with plain text or with nothing has none, and so has an
    answer that was cut short ("truncated"): a draft should not learn to end there;
and it does not hold any token with a character of a span that `mask_spans` names (`data.spans`).

The assistant's tool calls are part of its answer. A template that knows none would drop them without a word, so for such
a one they are written into the content, as `data.forms.text_of_calls` does.

Special tokens come from templates only. A tokenizer reads "<|im_end|>" inside a content as the token itself, which
would end a turn in mid-sentence; such conversations are skipped and counted (`TokenizeSummary.special_text`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Collection, Container, Iterable, Sequence

import jinja2
import numpy as np
from jaxtyping import Bool

from jsfdd.base.records import Sample
from jsfdd.data.chat import Chat, Message
from jsfdd.data.forms import text_of_calls
from jsfdd.data.spans import MaskSpan, excluded_spans

_CHUNK = 256  # conversations per tokenizer call, which spreads them over the cores
_STAND_IN = "jsfddstandin"  # letters only, so that no template trims, splits or reads anything into it

_Span = tuple[int, int]  # first character, one past the last


@dataclasses.dataclass(frozen=True)
class TokenizeSummary:
    """What became of the conversations: read = kept + no_counted + special_text + refused.

    Attributes:
      read: conversations given.
      kept: samples returned.
      truncated: ids of the kept samples that were cut to the maximal length.
      no_counted: ids skipped because no token counts (empty answers, or all answers lie beyond the cut).
      special_text: ids skipped because a content holds the text of a special token.
      refused: ids skipped because the template rejects them (usually for the order of the roles).
    """

    read: int
    kept: int
    truncated: tuple[str, ...]
    no_counted: tuple[str, ...]
    special_text: tuple[str, ...]
    refused: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.read} conversations: {self.kept} kept ({len(self.truncated)} of them cut to the maximal length); "
            f"skipped: {len(self.no_counted)} without a counted token, {len(self.special_text)} with a special token's "
            f"text in a message, {len(self.refused)} that the chat template refuses"
        )


class RefusedByTemplate(ValueError):
    """A conversation that a chat template does not take, usually for the order of its roles."""


def special_text_of(tokenizer) -> re.Pattern:
    """Finds the text of a special token; a message that holds one cannot be told from the template."""
    return _any_of(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def tokenize_chats(
    chats: Sequence[Chat], tokenizer, max_length: int, mask_spans: Collection[MaskSpan] = ()
) -> tuple[list[Sample], TokenizeSummary]:
    """Tokenizes conversations and marks the assistant's tokens, as the module's docstring says.

    Args:
      chats: the conversations; the samples keep their order.
      tokenizer: a fast transformers tokenizer with a chat template.
      max_length: samples are cut after this many tokens.
      mask_spans: parts of answers that do not count.

    Returns:
      The samples (tokens int32[T], assistant_mask bool[T], T ≤ max_length, at least one counted token each) and what
      was cut or skipped.

    Raises ValueError if the tokenizer is slow or has no template, if the template rewrites an answer so that it cannot
    be found again (with its file and line), or if every conversation had to be skipped.
    """
    _check_tokenizer(tokenizer)
    encode = _offset_encoder(tokenizer)
    added_tokens = tokenizer.added_tokens_decoder
    special_text = special_text_of(tokenizer)
    frame_of = functools.cache(functools.partial(_frame, tokenizer))
    knows_calls = "tool_calls" in tokenizer.chat_template

    samples, skipped, truncated, refusal = [], {"no_counted": [], "special_text": [], "refused": []}, [], ""
    for begin in range(0, len(chats), _CHUNK):
        rendered = []
        for chat in chats[begin : begin + _CHUNK]:
            if not knows_calls:
                chat = dataclasses.replace(chat, messages=tuple(map(_with_written_calls, chat.messages)))
            if any(special_text.search(text) for message in chat.messages for text in _texts(message)):
                skipped["special_text"].append(chat.id)
                continue
            try:
                text = _render(tokenizer, chat.messages)
            except jinja2.TemplateError as error:
                skipped["refused"].append(chat.id)
                refusal = refusal or f"; the template refuses {chat.place}: {error}"
                continue
            spans = _answer_spans(tokenizer, frame_of, chat, text)
            answers = [message for message in chat.messages if message["role"] == "assistant"]
            closed = [end for (_, end), answer in zip(spans, answers, strict=True) if not answer.get("truncated")]
            rendered.append((chat, text, spans, closed, _excluded(answers, text, spans, mask_spans)))
        for (chat, text, spans, closed, excluded), encoding in zip(rendered, encode([row[1] for row in rendered])):
            ids = encoding.ids  # builds the list at every access
            mask = _assistant_mask(ids, encoding.offsets, text, spans, closed, excluded, added_tokens)
            tokens = np.asarray(ids[:max_length], np.int32)
            sample = Sample(chat.id, chat.source, tokens, mask[:max_length])
            if not sample.counted.any():
                skipped["no_counted"].append(chat.id)
                continue
            samples.append(sample)
            if len(ids) > max_length:
                truncated.append(chat.id)

    lists = {reason: tuple(ids) for reason, ids in skipped.items()}
    summary = TokenizeSummary(read=len(chats), kept=len(samples), truncated=tuple(truncated), **lists)
    if chats and not samples:
        raise ValueError(f"{summary}{refusal}; nothing is left: raise max_length ({max_length}) or give other chats")
    return samples, summary


def render_prompt(tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation so far, up to where the assistant's answer begins.

    The ids are those of `apply_chat_template(messages, add_generation_prompt=True)`, as servers compute them: text of a
    special token in a message becomes that token. Raises RefusedByTemplate if the template refuses the messages.
    """
    _check_tokenizer(tokenizer)
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise RefusedByTemplate(f"the chat template refuses a prompt with the roles {roles}: {error}") from error


def _check_tokenizer(tokenizer) -> None:
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer, without offsets; load it with use_fast=True")
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; use an instruction-tuned model's tokenizer or set its chat_template"
        )


def _render(tokenizer, messages: Iterable[Message], **options) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


def _offset_encoder(tokenizer) -> Callable[[list[str]], list]:
    """texts -> encodings with .ids and exact .offsets.

    A copy of the tokenizer works without the post-processor: that one only adds special tokens, which rendered chats
    already have, and (byte-level ones) takes white space out of the offsets, where an answer's spaces would get lost.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return functools.partial(backend.encode_batch, add_special_tokens=False)


def _with_written_calls(message: Message) -> Message:
    """The message with its tool calls, if it has any, as text at the end of its content."""
    if "tool_calls" not in message:
        return message
    parts = [part for part in (message["content"], text_of_calls(message["tool_calls"])) if part]
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return Message(**others | {"content": "\n".join(parts)})


def _texts(message: Message) -> list[str]:
    """Everything in a message that a template may write."""
    calls = [json.dumps(message["tool_calls"], ensure_ascii=False)] if "tool_calls" in message else []
    return [message["content"], *calls]


def _any_of(words: Iterable[str]) -> re.Pattern:
    """Matches any of the words; nothing where there are none."""
    return re.compile("|".join(map(re.escape, words)) or r"(?!)")


def _frame(tokenizer, roles: tuple[str, ...]) -> tuple[list[str], list[int]] | None:
    """What the template writes around the contents of such a conversation.

    Returns:
      pieces, order: the text is pieces[0], content of message order[0], pieces[1], content of order[1], … pieces[-1].
      None if the template does not write every answer exactly once, or refuses the stand-ins.
    """
    stand_ins = [Message(role=role, content=f"{_STAND_IN}{i:06d}") for i, role in enumerate(roles)]
    try:
        parts = re.split(rf"{_STAND_IN}(\d{{6}})", _render(tokenizer, stand_ins))
    except jinja2.TemplateError:
        return None
    order = [int(number) for number in parts[1::2]]
    if any(order.count(i) != 1 for i, role in enumerate(roles) if role == "assistant"):
        return None
    return parts[0::2], order


def _answer_spans(tokenizer, frame_of, chat: Chat, text: str) -> list[_Span]:
    """Where each answer's content lies in the rendered conversation."""
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    frame = None
    if not any("tool_calls" in message for message in chat.messages):
        frame = frame_of(tuple(message["role"] for message in chat.messages))
    span_of = frame and _fit_frame(*frame, chat.messages, text)
    if span_of:
        return [span_of[i] for i in answers]
    return [_find_answer(tokenizer, chat, i, text) for i in answers]


def _fit_frame(pieces: list[str], order: list[int], messages: Sequence[Message], text: str) -> dict[int, _Span] | None:
    """Spans by message number if the text is exactly the frame filled with the contents, whole or trimmed."""
    if not text.startswith(pieces[0]):
        return None
    span_of, position = {}, len(pieces[0])
    for index, piece in zip(order, pieces[1:]):
        whole = messages[index]["content"]
        for content in (whole, whole.strip()):
            end = position + len(content)
            if text.startswith(content, position) and text.startswith(piece, end):
                break
        else:
            return None
        span_of[index] = (position, end)
        position = end + len(piece)
    return span_of if position == len(text) else None


def _find_answer(tokenizer, chat: Chat, index: int, text: str) -> _Span:
    """Where one answer lies when the template treats contents by what they are (as reasoning models' templates do).

    First with a stand-in for this content alone: what then differs from `text` is what the template made of it, and has
    to be a piece of the content (an earlier turn without its thoughts), or hold the content and the name of every tool
    that is called. Else as the model would have generated it: all that follows the generation prompt, which has to be
    the content up to white space.
    """
    before_it, message = chat.messages[:index], chat.messages[index]
    content, calls = message["content"], message.get("tool_calls")
    stand_in = _STAND_IN
    while stand_in in text:
        stand_in += "x"
    replaced = Message(role="assistant", content=stand_in)
    try:
        head, found, tail = _render(tokenizer, (*before_it, replaced, *chat.messages[index + 1 :])).partition(stand_in)
        span = _between(text, head, tail)
        if found and span and calls:
            made = text[slice(*span)]
            if content.strip() in made and all(call["function"]["name"] in made for call in calls):
                return span
        elif found and span and text[slice(*span)] in content:
            return span
        if found and before_it and not calls:
            span = _between(text, _render(tokenizer, before_it, add_generation_prompt=True), tail)
            if span and "".join(text[slice(*span)].split()) == "".join(content.split()):
                return span
    except jinja2.TemplateError:
        pass  # it takes the conversation but not this part of it: as little help as a text that does not fit
    raise ValueError(
        f"{chat.place}: the chat template rewrites message {index + 1}, so its tokens cannot be told from the "
        "template's; use a chat template that keeps contents as they are, or drop the row"
    )


def _between(text: str, head: str, tail: str) -> _Span | None:
    """The span between a beginning and an end of the text, if it has them and they do not overlap."""
    end = len(text) - len(tail)
    return (len(head), end) if len(head) <= end and text.startswith(head) and text.endswith(tail) else None


def _excluded(
    answers: Sequence[Message], text: str, spans: Sequence[_Span], kinds: Collection[MaskSpan]
) -> list[_Span]:
    """Where in the rendered conversation the parts of answers lie that do not count."""
    return [
        (begin + first, begin + last)
        for message, (begin, end) in zip(answers, spans)
        for first, last in excluded_spans(text[begin:end], message, kinds)
    ]


def _assistant_mask(
    ids: Sequence[int],
    offsets: Sequence[_Span],
    text: str,
    spans: Sequence[_Span],
    closed: Sequence[int],
    excluded: Sequence[_Span],
    added_tokens: Container[int],
) -> Bool[np.ndarray, " T"]:
    """True on the tokens of the spans without those that touch an excluded one, and on the added token that closes each
    whose end is in `closed`."""
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(ids), bool)
    for values, counts in ((spans, True), (excluded, False)):
        for begin, end in values:
            if begin < end:  # several byte-level tokens of one character all have that character's offsets
                mask[np.searchsorted(ends, begin, "right") : np.searchsorted(starts, end, "left")] = counts
    for end in closed:
        # A token may lie across the end (an end-of-turn token that takes in the spaces before it), so what counts is
        # what it covers beyond the content.
        for t in range(np.searchsorted(ends, end, "right"), len(ids)):
            if text[max(starts[t], end) : ends[t]].strip():
                mask[t] |= ids[t] in added_tokens
                break
    return mask
