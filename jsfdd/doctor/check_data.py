"""The doctor's checks of template, loss mask and tokenizer: is what a draft is trained on what a server will read?

A server renders the conversation so far with a generation prompt and lets the target write from there. Training renders
the whole conversation. Here both are made again with nothing but transformers' `apply_chat_template`, message by message,
and held against the samples: their token ids, where each answer begins, and which tokens count. None of it uses the code
that found the answers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jsfdd.base.numbers import percent
from jsfdd.base.records import Sample
from jsfdd.data.chat import Chat
from jsfdd.data.messages import Message, text_of_calls
from jsfdd.data.render import TEMPLATE_ERRORS, BoundlessTemplate, with_text_arguments, within_limits
from jsfdd.data.skipped import MEANINGS
from jsfdd.data.template import TokenizeSummary
from jsfdd.doctor.findings import Finding, spread_over

EXAMINED = 200  # conversations whose template and masks are checked; a fault of the template shows in all of them
_ANSWERS = 8  # of one conversation
# Digits, spaces, line breaks, contractions, accents, emoji: where classes of tokenizers split text differently.
_PROBE = "In 2024, 1234567 people paid $3.14 — it's 50% off!\n\n  def f(x1):\treturn x1**2  # naïve café 日本語 🙂"
_WORD = "xyzzy"
_FEW_SUPERVISED = 0.02
_MANY_SKIPPED = 0.1


class Conversation(NamedTuple):
    """A conversation as its row has it, and the sample that was made of it.

    Attributes:
      id: of the sample.
      messages: the row's own; calls are written into the content where the template knows none.
      tools: definitions of tools.
      sample: what is trained on.
      last_only: the sample is of the last answer alone (--split-answers).
    """

    id: str
    messages: list[Message]
    tools: list[dict] | None
    sample: Sample
    last_only: bool


class Answer(NamedTuple):
    """One assistant turn, as trained and as served.

    Attributes:
      conversation: where it is.
      message: as the row has it.
      first: whether no other answer comes before it.
      prompt: ids up to which a server would render; None where the template refuses to.
      begin: where the answer begins in the sample: where its prompt ends, or where the sample parts from it because nothing but
        the opening of a thought is left of the prompt; None where they part earlier.
      preamble: what the template writes between that and any content, squeezed: an empty block of thoughts, a channel.
      end: where what is said next can begin at the latest: where the next answer begins, or the sample ends; None where nobody
        can say.
      said_next: what is said between this answer and the next.
    """

    conversation: Conversation
    message: Message
    first: bool
    prompt: list[int] | None
    begin: int | None
    preamble: str
    end: int | None
    said_next: list[str]

    @property
    def continues(self) -> bool:
        """Whether the training sample begins with the served prompt, as far as the sample goes."""
        if self.prompt is None:
            return False
        tokens = self.conversation.sample.tokens
        return tokens[: len(self.prompt)].tolist() == self.prompt[: len(tokens)]


def check_data(
    tokenizer, chats: Sequence[Chat], samples: Sequence[Sample], summary: TokenizeSummary, stop_tokens: Sequence[int],
    masks_spans: bool = False,
) -> list[Finding]:  # fmt: skip
    """Ids, template, mask, share of supervised tokens, skipped conversations and what the template left out.

    Args:
      tokenizer: the target's, with its chat template.
      chats: those of the samples that are looked at.
      samples, summary: what reading them all gave.
      stop_tokens: ids after which the target's answers are over.
      masks_spans: whether parts of answers were left out of the mask on purpose.
    """
    pairs = spread_over(list(_conversations(tokenizer, chats, samples)), EXAMINED)
    answers = [answer for conversation in pairs for answer in _answers(tokenizer, conversation)]
    return [
        check_ids(pairs, tokenizer, set(summary.truncated)),
        check_template(answers, len(pairs)),
        check_mask(answers, tokenizer, masks_spans),
        _check_end_of_turn(answers, stop_tokens, tokenizer),
        _check_share(samples),
        _check_skipped(summary),
        _check_left_out(summary),
    ]


def check_ids(conversations: Sequence[Conversation], tokenizer, cut: set[str]) -> Finding:
    """Whether the samples are what `apply_chat_template` makes of the rows' own messages."""
    compared = [conversation for conversation in conversations if not conversation.last_only]
    different = []
    for conversation in compared:
        expected = _render(tokenizer, conversation.messages, conversation.tools)
        tokens = conversation.sample.tokens.tolist()
        if expected is None or expected[: len(tokens)] != tokens or (len(expected) > len(tokens)) != (conversation.id in cut):
            different.append(conversation)
    figures = {"conversations": len(compared), "different": len(different)}
    if not compared:
        return Finding("token-ids", "note", "No conversation was rendered by the chat template whole.", "", figures)
    if different:
        return Finding(
            "token-ids",
            "error",
            f"In {len(different)} of {len(compared)} conversations (first {different[0].id}) the token ids are not those of "
            "transformers' apply_chat_template on the row's own messages.",
            "compare the two, and report a template that jsfdd reads wrongly",
            figures,
        )
    return Finding(
        "token-ids",
        "ok",
        f"In all {len(compared)} conversations the token ids are those of apply_chat_template on the row's own messages.",
        figures=figures,
    )


def check_template(answers: Sequence[Answer], conversations: int) -> Finding:
    """Whether the served prompt is the beginning of the training sample, for every answer."""
    broken = [answer for answer in answers if not answer.continues]
    figures = {"answers": len(answers), "conversations": conversations, "not_continued": len(broken)}
    if not broken:
        return Finding(
            "template-prefix",
            "ok",
            f"For all {len(answers)} answers of {conversations} conversations the prompt that a server renders is the "
            "beginning of the training sample.",
            figures=figures,
        )
    first = broken[0]
    if first.prompt is None:
        how = "the template refuses the conversation up to an answer"
    else:
        tokens = first.conversation.sample.tokens
        n = min(len(first.prompt), len(tokens))
        how = f"they part at token {int(np.flatnonzero(tokens[:n] != np.asarray(first.prompt[:n]))[0])}"
    return Finding(
        "template-prefix",
        "error" if 2 * len(broken) > len(answers) else "warning",
        f"For {len(broken)} of {len(answers)} answers the prompt that a server renders is not the beginning of the training "
        f"sample (first {first.conversation.id}: {how}), so there the draft learns on other text than it is served on.",
        "use the chat template that is served; it must write a finished conversation as it writes the same conversation "
        "with add_generation_prompt. Templates that drop thoughts do not: give rows with thoughts, and --split-answers",
        figures,
    )


def check_mask(answers: Sequence[Answer], tokenizer, masks_spans: bool = False) -> Finding:
    """Whether the supervised tokens are each answer's own: they hold its text and calls and nothing of what is said before and
    after, and end with the token that ends the turn."""
    faults, later, looked_at = [], 0, 0
    for answer in answers:
        tokens = answer.conversation.sample.tokens
        if answer.begin is None or answer.end is None or answer.begin >= len(tokens):
            continue
        looked_at += 1
        fault, begins_later = _fault_of_mask(answer, tokenizer, masks_spans)
        later += begins_later
        if fault:
            faults.append((answer, fault))
    figures = {"answers": looked_at, "wrong": len(faults), "begin_later": later}
    if not looked_at:
        return Finding("loss-mask", "note", "No mask could be compared with a served prompt, see template-prefix.", "", figures)
    if faults:
        answer, fault = faults[0]
        return Finding(
            "loss-mask",
            "error",
            f"The loss mask is not on the answers: in {len(faults)} of {looked_at} it is wrong (first "
            f"{answer.conversation.id}, whose answer begins at token {answer.begin}: {fault}). The draft is trained on "
            "other positions than it is used at.",
            "look at the sample above; use a chat template that keeps answers as they are, and report a template that "
            "jsfdd masks wrongly",
            figures,
        )
    words = f" In {later} of them the template writes marks of its own first, which do not count." if later else ""
    return Finding(
        "loss-mask",
        "ok",
        f"In all {looked_at} answers the tokens that count are the answer and the token that ends it, no others.{words}",
        figures=figures,
    )


def _fault_of_mask(answer: Answer, tokenizer, masks_spans: bool) -> tuple[str, bool]:
    """What is wrong with the mask of one answer (empty if nothing is), and whether the mask begins behind the prompt."""
    tokens, mask = answer.conversation.sample.tokens, answer.conversation.sample.assistant_mask
    begin = answer.begin
    if answer.first and mask[:begin].any():
        return f"token {np.flatnonzero(mask)[0]} before it counts", False
    inside = np.flatnonzero(mask[begin : answer.end]) + begin
    if answer.message.get("weight") == 0:
        return ("it counts, though its weight is 0" if len(inside) else ""), False
    whole = _squeezed(tokenizer.decode(tokens[begin : answer.end]))
    due = [text for text in _texts_of(answer.message) if text in whole]  # of a conversation that was cut, not all
    if not len(inside):
        return ("no token of it counts" if due and not masks_spans else ""), False
    first, last = int(inside[0]), int(inside[-1]) + 1
    head, run, behind = (
        _squeezed(tokenizer.decode(tokens[a:b])) for a, b in ((begin, first), (first, last), (last, answer.end))
    )
    if not masks_spans:
        gaps = [t for t in range(first, last) if not mask[t]]
        if tokenizer.decode(tokens[gaps]).strip():
            return f"token {gaps[0]} within it does not count", False
        if any(text not in run for text in due) or head not in ("", answer.preamble):
            return f"tokens {first} to {last} are not all of it", False
    if any(text in whole and text not in behind for text in map(_squeezed, answer.said_next) if text):
        return f"tokens {first} to {last} hold what is said next", False
    return _fault_of_end(answer, tokenizer, first, last), head != ""


def _fault_of_end(answer: Answer, tokenizer, first: int, last: int) -> str:
    """What is wrong with the end of an answer's mask, which begins at `first` and ends before `last`."""
    tokens = answer.conversation.sample.tokens

    def blank(t: int) -> bool:
        return not tokenizer.decode(tokens[t : t + 1]).strip()

    ended = _closes(tokenizer, int(tokens[last - 1]))
    if answer.message.get("truncated"):
        return "its end counts, though it was cut short" if ended else ""
    following = next((t for t in range(last, answer.end) if not blank(t)), None)
    if not ended and following is not None and _closes(tokenizer, int(tokens[following])):
        return f"the token that ends the turn, {following}, does not count"
    words = next((t for t in range(last - 1, first - 1, -1) if not blank(t)), first)
    if words < last - 1 and _closes(tokenizer, int(tokens[words])):
        return f"tokens behind its end count, up to {last}"
    return ""


def _closes(tokenizer, token: int) -> bool:
    """Whether a token can end a turn: a special one can; marks of thoughts and calls are added tokens as well."""
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and (added.special or token == tokenizer.eos_token_id)


def _texts_of(message: Message) -> list[str]:
    """What an answer says, squeezed: its thought, its content (of one with marks around a thought, what follows them) and the
    names that it calls."""
    content = message["content"]
    texts = [content if _squeezed(content) else "", content.rpartition("</think>")[2], message.get("reasoning_content", "")]
    texts += [call["function"]["name"] for call in message.get("tool_calls", [])]
    return [_squeezed(text) for text in texts if _squeezed(text)]


def _squeezed(text: str) -> str:
    """Remove white space, which tokenizers that normalize text may change."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def check_tokenizer(location: Path, tokenizer, chats: Sequence[Chat]) -> Finding:
    """Whether a loader that goes by the tokenizer's class name reads the same tokens."""
    if not location.is_dir():
        return Finding(
            "tokenizer-reload",
            "note",
            "The target is a GGUF file; a server reads a Hugging Face directory, whose tokenizer is not here to compare.",
            "run the doctor on the directory that is served as well",
        )
    import transformers
    from transformers import AutoTokenizer

    try:
        # The very class that the tokenizer files name, as servers load it.
        loaded = AutoTokenizer.from_pretrained(location, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
        return Finding(
            "tokenizer-reload",
            "warning",
            f"AutoTokenizer of transformers {transformers.__version__} cannot load this directory ({error}).",
            "make the directory load with AutoTokenizer.from_pretrained, as most servers load it",
        )
    texts = [_PROBE, *(m["content"] for chat in spread_over(chats, EXAMINED) for m in chat.messages)]
    different = [text for text in texts if tokenizer.encode(text) != loaded.encode(text)]
    kind = type(loaded).__name__
    figures = {"texts": len(texts), "different": len(different), "class": kind, "transformers": transformers.__version__}
    if not different:
        return Finding(
            "tokenizer-reload", "ok", f"AutoTokenizer ({kind}) reads the same tokens in {len(texts)} texts.", figures=figures
        )
    text = different[0]
    expected, loaded_tokens = (t.convert_ids_to_tokens(t.encode(text)) for t in (tokenizer, loaded))
    at = next((i for i, (a, b) in enumerate(zip(expected, loaded_tokens)) if a != b), min(len(expected), len(loaded_tokens)))
    return Finding(
        "tokenizer-reload",
        "error",
        f"AutoTokenizer of transformers {transformers.__version__} loads this directory as {kind} and reads other tokens than "
        f"its tokenizer.json says in {len(different)} of {len(texts)} texts: {loaded_tokens[at : at + 4]} instead of "
        f"{expected[at : at + 4]}. A server that loads it so gives target and draft other text than was trained on.",
        'set "tokenizer_class" to "PreTrainedTokenizerFast" in tokenizer_config.json of the directory that is served',
        figures,
    )


def _conversations(tokenizer, chats: Sequence[Chat], samples: Sequence[Sample]) -> Iterator[Conversation]:
    """Every sample beside its row's own messages; those that came rendered or tokenized have none."""
    chat_of = {chat.id: chat for chat in chats}
    knows_calls = "tool_calls" in tokenizer.chat_template
    for sample in samples:
        chat, number = chat_of.get(sample.id), None
        if chat is None:
            name, _, number = sample.id.rpartition("/")
            chat = chat_of.get(name)
        if chat is None or not chat.messages:
            continue
        messages = list(chat.messages if knows_calls else map(_with_written_calls, chat.messages))
        if number is not None:
            ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            messages = messages[: ends[int(number) - 1] + 1]
        yield Conversation(sample.id, messages, list(chat.tools) or None, sample, number is not None)


def _with_written_calls(message: Message) -> Message:
    """Write calls into the content's text, for a template that would lose them."""
    calls = message.get("tool_calls")
    text = "\n".join(filter(None, (message["content"], text_of_calls(calls)))) if calls else message["content"]
    return Message(**{key: value for key, value in message.items() if key != "tool_calls"} | {"content": text})


def _answers(tokenizer, conversation: Conversation) -> Iterator[Answer]:
    messages = conversation.messages
    numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if conversation.last_only:
        numbers = numbers[-1:]
    prompts = {i: _render(tokenizer, messages[:i], conversation.tools, prompt=True) for i in numbers[: _ANSWERS + 1]}
    for i, following in zip(numbers[:_ANSWERS], [*numbers[1:], len(messages)]):
        contents = [message["content"] for message in messages[i + 1 : following] if message["role"] != "assistant"]
        tokens = conversation.sample.tokens
        begin, next_begin = (_begin(tokenizer, tokens, prompts.get(number)) for number in (i, following))
        end = next_begin if prompts.get(following) is not None else len(tokens)
        preamble = _preamble(tokenizer, messages[:i], conversation, begin)
        yield Answer(conversation, messages[i], i == numbers[0], prompts[i], begin, preamble, end, contents)


def _begin(tokenizer, tokens: np.ndarray, prompt: list[int] | None) -> int | None:
    if prompt is None:
        return None
    shared = min(len(tokens), len(prompt))
    different = np.flatnonzero(tokens[:shared] != np.asarray(prompt[:shared]))
    if not len(different):
        return min(len(tokens), len(prompt))
    rest = _squeezed(tokenizer.decode(prompt[different[0] :]))
    return int(different[0]) if rest in ("", "<think>", "<thinking>") else None


def _preamble(tokenizer, earlier: Sequence[Message], conversation: Conversation, begin: int | None) -> str:
    ids = _render(tokenizer, [*earlier, Message(role="assistant", content=_WORD)], conversation.tools)
    if ids is None or begin is None or ids[:begin] != conversation.sample.tokens[:begin].tolist():
        return ""
    return _squeezed(tokenizer.decode(ids[begin:])).partition(_WORD)[0]


def _render(tokenizer, messages: Sequence[Message], tools: list[dict] | None, prompt: bool = False) -> list[int] | None:
    """Ids as transformers makes them; None where the template refuses, as it may for part of a conversation.

    Arguments of calls are JSON text where the template cannot take objects.
    """
    for spelled in (list(messages), [with_text_arguments(message) for message in messages]):
        try:
            with within_limits(tokenizer.name_or_path or "the target's tokenizer"):
                return tokenizer.apply_chat_template(spelled, tools=tools, add_generation_prompt=prompt, return_dict=False)
        except TypeError:
            continue
        except BoundlessTemplate:
            raise
        except TEMPLATE_ERRORS:
            return None
    return None


def _check_end_of_turn(answers: Sequence[Answer], stop_tokens: Sequence[int], tokenizer) -> Finding:
    """Whether supervised answers end with a token that ends generation."""
    stops = set(stop_tokens)
    samples = {answer.conversation.id: answer.conversation.sample for answer in answers}.values()
    ended = sum(any(int(t) in stops for t in sample.tokens[sample.assistant_mask]) for sample in samples)
    names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(stops)))
    figures = {"conversations": len(samples), "with_stop_token": ended, "stop_tokens": sorted(stops)}
    if ended:
        return Finding(
            "end-of-turn",
            "ok",
            f"{ended} of {len(samples)} conversations supervise a token that ends generation ({names}).",
            figures=figures,
        )
    return Finding(
        "end-of-turn",
        "warning",
        f"No supervised answer holds a token that ends generation ({names or 'there is none'}), so no draft learns where "
        "answers end.",
        "use the chat template of the instruction-tuned model, and check its eos_token_id",
        figures,
    )


def _check_share(samples: Sequence[Sample]) -> Finding:
    total = sum(len(sample.tokens) for sample in samples)
    counted = sum(int(sample.counted.sum()) for sample in samples)
    share = counted / total
    too_few = share < _FEW_SUPERVISED
    return Finding(
        "supervised-share",
        "warning" if too_few else "ok",
        f"{counted:,} of {total:,} tokens ({percent(share)}) of {len(samples)} conversations count in the loss.",
        "most of the computing is spent on prompts; check that the data holds whole answers" if too_few else "",
        {"counted": counted, "tokens": total, "share": share},
    )


def _check_skipped(summary: TokenizeSummary) -> Finding:
    skipped = summary.read - summary.kept
    severity = "ok" if not skipped else "note" if skipped <= _MANY_SKIPPED * summary.read else "warning"
    figures = {"read": summary.read, "kept": summary.kept} | {reason: len(ids) for reason, ids in summary.skipped.items()}
    return Finding(
        "skipped-conversations",
        severity,
        f"{summary}.",
        "; ".join(f"first {MEANINGS[reason]}: {text}" for reason, text in summary.first.items()),
        figures,
    )


def _check_left_out(summary: TokenizeSummary) -> Finding:
    """Thoughts and tools that the rows have and the template does not write."""
    parts = [f"{count:,} conversations have {what}" for what, count in summary.left_out.items()]
    if not parts:
        return Finding("left-out", "ok", "The chat template writes all thoughts and tools of the conversations.")
    return Finding(
        "left-out",
        "warning",
        f"{' and '.join(parts)} that the chat template does not write, so the draft does not learn on them.",
        "--split-answers makes a sample of every answer, with its thought where the template writes those of last answers; "
        "for tools use a template that writes them (--chat-template)",
        dict(summary.left_out),
    )
