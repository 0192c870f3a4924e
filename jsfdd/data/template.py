"""Turn chats into token ids and the exact assistant mask, with a tokenizer's own chat template.

The ids are those of `tokenizer.apply_chat_template` on the whole conversation. Characters map to tokens by the fast
tokenizer's offsets; where the answers lie in the text is found in `data.answers`.

The mask (records.Sample.assistant_mask) holds
  - every token with a character of an answer, as the template renders it (many templates trim it);
  - the answer's end-of-turn token: the added token (one outside the tokenizer's ordinary vocabulary) that the template
    writes next, white space aside. A template that ends answers with plain text or with nothing has none, and so has an
    answer that was cut short ("truncated"): a draft should not learn to end there;
and it does not hold any token of an answer with weight 0, or with a character of a span that `mask_spans` names
(`data.spans`).

The assistant's tool calls are part of its answer. A template that knows none would drop them without a word, so for such
a one they are written into the content, as `data.messages.text_of_calls` does. Thoughts and definitions of tools that a
template does not write are counted (`TokenizeSummary.left_out`).

Special tokens come from templates only. A tokenizer reads "<|im_end|>" inside a content as the token itself, which
would end a turn in mid-sentence; such conversations are skipped and counted (`special_text`).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jsfdd.base.records import Sample
from jsfdd.data.answers import AnswerSpan, Frames, Rewritten, Span, find_answers, find_marked_answers
from jsfdd.data.chat import Chat
from jsfdd.data.marks import any_of, learn_marks
from jsfdd.data.mask import AskedOffsets, KnownOffsets, assistant_mask
from jsfdd.data.messages import Message, text_of_calls
from jsfdd.data.pieces import piece_tokenizer
from jsfdd.data.render import RefusedByTemplate, check_tokenizer, render, render_prompt, render_together
from jsfdd.data.skipped import MEANINGS, BadRow, nothing_left
from jsfdd.data.spans import MaskSpan, excluded_spans

__all__ = ["RefusedByTemplate", "TokenizeSummary", "render_prompt", "special_text_of", "tokenize_chats"]

_WRITTEN = ("content", "reasoning_content", "name", "tool_call_id")  # texts of a message
_CHUNK = 256  # conversations per tokenizer call, which spreads them over the cores
_SKIPS = ("no_counted", "special_text", "refused", "rewritten", "unknown_token")
# Added tokens that an answer may well hold: its own marks of thoughts and calls.
_ANSWER_MARKS = re.compile(r"</?(think|thinking|tool_call|function_call)>|\[TOOL_CALLS\]|<\|python_tag\|>")


@dataclasses.dataclass(frozen=True)
class TokenizeSummary:
    """Counts of the conversations.

    Attributes:
      read: conversations in all.
      kept: conversations that became samples.
      truncated: ids of the samples that were cut to the maximal length.
      skipped: ids by reason (`data.skipped.MEANINGS`): no_counted (empty answers, or all answers lie beyond the cut),
        special_text, refused, rewritten, unknown_token.
      first: of each reason that there is, what is wrong with the first one, and where.
      left_out: "thoughts", "tools" -> how many conversations have some that the template does not write.
    """

    read: int
    kept: int
    truncated: tuple[str, ...] = ()
    skipped: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    first: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.skipped.get(reason, ())):,} {MEANINGS[reason]}" for reason in _SKIPS[:3])
        more = "".join(f", {len(ids):,} {MEANINGS[reason]}" for reason in _SKIPS[3:] if (ids := self.skipped.get(reason)))
        cut = f"{len(self.truncated)} of them cut to the maximal length"
        return f"{self.read:,} conversations: {self.kept:,} kept ({cut}); skipped: {counts}{more}"

    def left_out_words(self) -> str:
        """What the template does not write of the conversations, in a sentence; empty if it writes all."""
        parts = [f"{count:,} conversations have {what}" for what, count in self.left_out.items()]
        if not parts:
            return ""
        remedy = "; --split-answers gives every answer its own sample" if "thoughts" in self.left_out else ""
        return f"not written by the chat template: {' and '.join(parts)} that it leaves out{remedy}"

    def to_json(self) -> dict:
        """Counts, and ids by reason."""
        ids = {reason: list(self.skipped.get(reason, ())) for reason in _SKIPS}
        return {"read": self.read, "kept": self.kept, "truncated": list(self.truncated)} | ids | {"left_out": self.left_out}


class Rendered(NamedTuple):
    """A sample before it is tokenized.

    Attributes:
      id, chat: its own id, and the conversation that it is made of.
      text: what the template wrote; empty if the conversation came tokenized.
      spans: the parts that count.
      closed: ends of answers whose end-of-turn token counts.
      excluded: parts of the spans that do not count.
    """

    id: str
    chat: Chat
    text: str
    spans: list[Span]
    closed: list[int]
    excluded: list[Span]


def special_text_of(tokenizer) -> re.Pattern:
    """Finds the text of a special token; a message that holds one cannot be told from the template."""
    return any_of(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


class ChatTokenizer:
    """Renders and tokenizes conversations for one tokenizer; a process has one.

    Args:
      tokenizer: a fast transformers tokenizer with a chat template.
      max_length: samples are cut after this many tokens.
      mask_spans: parts of answers that do not count.
      vocab_size: rows of the target's embedding, if they are known: an id beyond them has no meaning.
      split_answers: where the template leaves out earlier answers' thoughts, make a sample of every answer.

    Raises ValueError if the tokenizer is slow or has no template.
    """

    def __init__(
        self,
        tokenizer,
        max_length: int,
        mask_spans: Collection[MaskSpan] = (),
        *,
        vocab_size: int | None = None,
        split_answers: bool = False,
    ):
        check_tokenizer(tokenizer)
        self.tokenizer, self.max_length, self.mask_spans = tokenizer, max_length, mask_spans
        self.vocab_size, self.split_answers = vocab_size, split_answers
        self.marks, self.frames = learn_marks(tokenizer), Frames(tokenizer)
        self.backend = _offset_backend(tokenizer)
        self.pieces = piece_tokenizer(self.backend)
        self.added_tokens = tokenizer.added_tokens_decoder
        special = {token.content for token in self.added_tokens.values() if token.special}
        of_turns = {text for text in self.marks.control if not _ANSWER_MARKS.fullmatch(text)}
        in_answers = {text for text in special if not _ANSWER_MARKS.fullmatch(text)}
        self.special_text = dict.fromkeys(("system", "user", "tool"), any_of(special | of_turns))
        self.special_text["assistant"] = any_of(in_answers | of_turns)
        self.knows_calls = "tool_calls" in tokenizer.chat_template
        self.left_out = {"thoughts": 0, "tools": 0}

    def texts(self, chats: Sequence[Chat]) -> list[str | None]:
        """What the template writes of each, rendered together; None where `render` has to do it."""
        plain = [bool(chat.messages) and not chat.tools for chat in chats]
        made = iter(render_together(self.tokenizer, [self._messages(chat) for chat in itertools.compress(chats, plain)]))
        return [next(made) if is_plain else None for is_plain in plain]

    def render(self, chat: Chat, text: str | None = None) -> list[Rendered]:
        """The samples of a conversation, nearly always one; `text` is what the template writes, if known. Raises BadRow."""
        if chat.tokens:
            return [Rendered(chat.id, chat, "", [], [], [])]
        try:
            if chat.text:
                answers = find_marked_answers(self.marks, chat.text)
                if not answers:
                    raise Rewritten("the text has no answer between marks of the target's chat template")
                return [Rendered(chat.id, chat, chat.text, [a[:2] for a in answers], [a.end for a in answers], [])]
            messages = self._messages(chat)
            self._check_special_text(chat, messages)
            return self._samples(chat, messages, text)
        except RefusedByTemplate as error:
            raise BadRow("refused", chat.place, f"the chat template refuses the conversation: {error}") from error
        except Rewritten as error:
            raise BadRow(
                "rewritten",
                chat.place,
                f"the chat template rewrites an answer: {error}; use one that keeps contents as they are, or drop the row",
            ) from error

    def samples(self, rendered: Sequence[Rendered]) -> Iterator[tuple[Rendered, Sample | BadRow, bool]]:
        """What each makes: a sample, or why there is none; and whether it was cut."""
        encoded = iter(self.encoded([row.text for row in rendered if not row.chat.tokens]))
        for row in rendered:
            if row.chat.tokens:
                ids, mask = row.chat.tokens, np.asarray(row.chat.mask, bool)
            else:
                ids, offsets = next(encoded)
                mask = assistant_mask(ids, offsets, *row[2:], self.added_tokens)
            tokens = np.asarray(ids[: self.max_length], np.int32)
            sample = Sample(row.id, row.chat.source, tokens, mask[: self.max_length])
            if self.vocab_size is not None and tokens.max(initial=0) >= self.vocab_size:
                yield row, self._beyond(row.chat, int(tokens.max())), False
            elif not sample.counted.any():
                yield row, BadRow("no_counted", row.chat.place, "no token of an answer counts"), False
            else:
                yield row, sample, len(ids) > self.max_length

    def encoded(self, texts: Sequence[str]) -> Iterator[tuple[Sequence[int], KnownOffsets | AskedOffsets]]:
        """Ids and offsets of every text: from its pieces where it has some, else from the library, of several together."""
        known = [self.pieces and self.pieces.encode(text) for text in texts]
        others = [text for text, tokens in zip(texts, known) if tokens is None]
        encodings = iter(self.backend.encode_batch(others, add_special_tokens=False))
        for text, tokens in zip(texts, known):
            if tokens is None:
                encoding = next(encodings)
                ids = encoding.ids  # the property builds the list at every access
                tokens = ids, AskedOffsets(encoding, len(ids), len(text))
            yield tokens

    def _messages(self, chat: Chat) -> Sequence[Message]:
        return chat.messages if self.knows_calls else tuple(map(_with_written_calls, chat.messages))

    def _samples(self, chat: Chat, messages: Sequence[Message], text: str | None) -> list[Rendered]:
        text = render(self.tokenizer, messages, chat.tools) if text is None else text
        answers = find_answers(self.frames, self.marks, messages, chat.tools, text)
        self.left_out["tools"] += bool(chat.tools) and not self.marks.writes_tools
        if any(answer.thought_left_out for answer in answers):
            if self.split_answers:
                return list(self._one_sample_an_answer(chat, messages))
            self.left_out["thoughts"] += 1
        return [self._rendered(chat.id, chat, messages, text, answers)]

    def _one_sample_an_answer(self, chat: Chat, messages: Sequence[Message]) -> Iterator[Rendered]:
        """Each answer as the target gives it: after what the template shows it of the conversation so far."""
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for count, number in enumerate(numbers, 1):
            if messages[number].get("weight") == 0:
                continue
            part = messages[: number + 1]
            text = render(self.tokenizer, part, chat.tools)
            answer = find_answers(self.frames, self.marks, part, chat.tools, text)[-1]
            if answer.thought_left_out:
                text, answer = self._with_thought(part, chat.tools, text, answer)
            context = [Message(**message | {"weight": 0}) for message in part[:-1]]
            spans = [AnswerSpan(0, 0, 0, False)] * (count - 1)
            yield self._rendered(f"{chat.id}/{count}", chat, [*context, part[-1]], text, [*spans, answer])

    def _with_thought(self, messages: Sequence[Message], tools, text: str, answer: AnswerSpan) -> tuple[str, AnswerSpan]:
        """The last answer after the prompt that opens its thought, for a template that never writes one."""
        prompt = render(self.tokenizer, messages[:-1], tools, prompt=True)
        opened = re.search(r"<(think(?:ing)?)>\s*$", prompt)
        if not opened:
            self.left_out["thoughts"] += 1
            return text, answer
        content, thought = messages[-1]["content"], messages[-1].get("reasoning_content")
        if thought is None:
            thought, _, content = content.rpartition(f"</{opened[1]}>")
            thought = thought.partition(f"<{opened[1]}>")[2] or thought
        written = f"{thought.strip()}\n</{opened[1]}>\n\n{content.lstrip()}"
        begin, end = len(prompt), len(prompt) + len(written)
        return prompt + written + text[answer.end :], AnswerSpan(begin, end, end - len(content.lstrip()), False)

    def _rendered(
        self, sample_id: str, chat: Chat, messages: Sequence[Message], text: str, answers: Sequence[AnswerSpan]
    ) -> Rendered:
        spans, closed, excluded = [], [], []
        for message, answer in zip((m for m in messages if m["role"] == "assistant"), answers, strict=True):
            if message.get("weight") == 0:
                continue
            spans.append(answer[:2])
            if not message.get("truncated"):
                closed.append(answer.end)
            if "thinking" in self.mask_spans and answer.begin < answer.content:
                excluded.append((answer.begin, answer.content))
            excluded += [
                (answer.begin + first, answer.begin + last)
                for first, last in excluded_spans(text[answer.begin : answer.end], message, self.mask_spans)
            ]
        return Rendered(sample_id, chat, text, spans, closed, excluded)

    def _check_special_text(self, chat: Chat, messages: Iterable[Message]) -> None:
        tools = json.dumps(chat.tools, ensure_ascii=False)
        texts = [("the tools", "system", tools)] if chat.tools else []
        texts += [(f"message {i}", m["role"], text) for i, m in enumerate(messages, 1) for text in _texts(m)]
        for where, role, text in texts:
            if found := self.special_text[role].search(text):
                raise BadRow(
                    "special_text",
                    f"{chat.place}: {where}",
                    f"it holds the text of the special token {found.group()!r}, which would be read as the token",
                )

    def _beyond(self, chat: Chat, token: int) -> BadRow:
        name = self.tokenizer.convert_ids_to_tokens(token) if token < len(self.tokenizer) else None
        named = f"token {name} ({token})" if name else f"token id {token}"
        return BadRow(
            "unknown_token",
            chat.place,
            f"{named}, which the model of {self.vocab_size} rows does not embed; use the model's own tokenizer and template, "
            "resize the model's embedding and train it, or remove the token",
        )


def tokenize_chats(
    chats: Iterable[Chat],
    tokenizer,
    max_length: int,
    mask_spans: Collection[MaskSpan] = (),
    *,
    vocab_size: int | None = None,
    split_answers: bool = False,
    strict: bool = False,
) -> tuple[list[Sample], TokenizeSummary]:
    """Tokenize conversations and mark the assistant's tokens, as the module's docstring describes.

    Args:
      chats: the conversations; the samples keep their order.
      tokenizer, max_length, mask_spans, vocab_size, split_answers: as `ChatTokenizer` takes them.
      strict: whether a conversation that cannot be learned from is an error; else it is skipped and counted.

    Returns:
      The samples (tokens int32[T], assistant_mask bool[T], T ≤ max_length, at least one counted token each) and what
      was cut or skipped.

    Raises ValueError if the tokenizer is slow or has no template, or if every conversation had to be skipped.
    """
    tokenize = ChatTokenizer(tokenizer, max_length, mask_spans, vocab_size=vocab_size, split_answers=split_answers)
    samples: list[Sample] = []
    tally = Tally()
    for chunk in _batched(chats, _CHUNK):
        for chat_id, outcome, cut in tokenize_chunk(tokenize, chunk):
            if isinstance(outcome, BadRow) and strict and outcome.reason != "no_counted":
                raise outcome
            if isinstance(outcome, Sample):
                samples.append(outcome)
            tally.add(chat_id, outcome.id if isinstance(outcome, Sample) else outcome, cut)
    summary = tally.summary(tokenize.left_out)
    if summary.read and not samples:
        raise ValueError(nothing_left(summary.read, {name: len(ids) for name, ids in summary.skipped.items()}, summary.first))
    return samples, summary


def tokenize_chunk(tokenize: ChatTokenizer, chats: Sequence[Chat]) -> Iterator[tuple[str, Sample | BadRow, bool]]:
    """(chat id, sample or why there is none, whether it was cut) of some conversations, in their order."""
    rendered: list[Rendered | tuple[str, BadRow]] = []
    for chat, text in zip(chats, tokenize.texts(chats)):
        try:
            rendered += tokenize.render(chat, text)
        except BadRow as error:
            rendered.append((chat.id, error))
    made = tokenize.samples([row for row in rendered if isinstance(row, Rendered)])
    for row in rendered:
        if isinstance(row, Rendered):
            _, outcome, cut = next(made)
            yield row.chat.id, outcome, cut
        else:
            yield *row, False


class Tally:
    """Counts what becomes of conversations whose samples come one after the other.

    A conversation is skipped if no sample is made of it; of one that is split, answers may be lost beyond the cut.
    """

    def __init__(self):
        self.read, self.kept, self.lost = 0, 0, 0
        self.truncated: list[str] = []
        self.skipped: dict[str, list[str]] = {reason: [] for reason in _SKIPS}
        self.first: dict[str, str] = {}
        self.by_file: dict[tuple[str, str], int] = {}  # of a reason, or "truncated"
        self._id: str | None = None  # of the conversation whose samples come
        self._samples, self._bad, self._file = 0, [], ""

    def add(self, chat_id: str, outcome: str | BadRow, cut: bool, file: str = "") -> None:
        """Count a sample, by its id, or why there is none."""
        if chat_id != self._id:
            self._settle()
            self._id, self._file = chat_id, file
            self.read += 1
        if isinstance(outcome, BadRow):
            self._bad.append(outcome)
            return
        self._samples += 1
        if cut:
            self.truncated.append(outcome)
            self._count(file, "truncated")

    def _settle(self) -> None:
        """Count the conversation whose samples have come."""
        if self._samples:
            self.kept += 1
            self.lost += len(self._bad)
        elif self._bad:
            reason = self._bad[0].reason
            self.skipped[reason].append(self._id)
            self.first.setdefault(reason, str(self._bad[0]))
            self._count(self._file, reason)
        self._id, self._samples, self._bad = None, 0, []

    def _count(self, file: str, what: str) -> None:
        self.by_file[file, what] = self.by_file.get((file, what), 0) + 1

    def summary(self, left_out: dict[str, int]) -> TokenizeSummary:
        self._settle()
        skipped = {reason: tuple(ids) for reason, ids in self.skipped.items()}
        left = {what: count for what, count in left_out.items() if count}
        return TokenizeSummary(self.read, self.kept, tuple(self.truncated), skipped, self.first, left)


def _offset_backend(tokenizer):
    """A tokenizer whose encodings have exact offsets.

    A copy works without the post-processor: that one only adds special tokens, which rendered chats already have, and
    (byte-level ones) takes white space out of the offsets, where an answer's spaces would get lost.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return backend


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
    return [*(message[key] for key in _WRITTEN if key in message), *calls]


def _batched(items: Iterable, size: int) -> Iterator[tuple]:
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk
