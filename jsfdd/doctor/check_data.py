"""The doctor's checks of template, loss mask and tokenizer: is what a draft is trained on what a server will read?

A server renders the conversation so far with a generation prompt and lets the target write from there. Training renders
the whole conversation. Both agree where the first rendering is the beginning of the second, and where the loss mask
begins at its end: `check_template` and `check_mask` look at just that, answer by answer.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import transformers
from transformers import AutoTokenizer

from jsfdd.base.numbers import percent
from jsfdd.base.records import Sample
from jsfdd.data.chat import Chat
from jsfdd.data.template import TokenizeSummary, render_prompt
from jsfdd.doctor.findings import Finding, spread_over

_LOOKED_AT = 200  # conversations; a fault of the template is in all of them
# Digits, spaces, line breaks, contractions, accents, emoji: where classes of tokenizers split text differently.
_PROBE = "In 2024, 1234567 people paid $3.14 — it's 50% off!\n\n  def f(x1):\treturn x1**2  # naïve café 日本語 🙂"
_FEW_SUPERVISED = 0.02
_MANY_SKIPPED = 0.1


class _Answer(NamedTuple):
    """One assistant turn, as trained and as served.

    Attributes:
      chat, sample: where it is.
      content, truncated: of the message; a truncated answer has no end.
      prompt: ids up to which a server would render; None where the template refuses to.
    """

    chat: Chat
    sample: Sample
    content: str
    truncated: bool
    prompt: list[int] | None

    @property
    def continues(self) -> bool:
        """Whether the training sample begins with the served prompt, as far as the sample goes."""
        if self.prompt is None:
            return False
        tokens = self.sample.tokens
        return tokens[: len(self.prompt)].tolist() == self.prompt[: len(tokens)]


def check_data(
    tokenizer, chats: Sequence[Chat], samples: Sequence[Sample], summary: TokenizeSummary, stop_tokens: Sequence[int]
) -> list[Finding]:
    """Template, mask, share of supervised tokens and skipped conversations.

    Args:
      tokenizer: the target's, with its chat template.
      chats, samples, summary: what `tokenize_chats` was given and gave.
      stop_tokens: ids after which the target's answers are over.
    """
    sample_of = {sample.id: sample for sample in samples}
    pairs = spread_over([(chat, sample_of[chat.id]) for chat in chats if chat.id in sample_of], _LOOKED_AT)
    answers = [answer for chat, sample in pairs for answer in _answers(tokenizer, chat, sample)]
    return [
        check_template(answers, len(pairs)),
        check_mask(answers, tokenizer),
        _check_end_of_turn(answers, stop_tokens, tokenizer),
        _check_share(samples),
        _check_skipped(summary),
    ]


def check_template(answers: Sequence[_Answer], conversations: int) -> Finding:
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
        n = min(len(first.prompt), len(first.sample.tokens))
        at = int(np.flatnonzero(first.sample.tokens[:n] != np.asarray(first.prompt[:n]))[0])
        how = f"they part at token {at}"
    return Finding(
        "template-prefix",
        "error" if 2 * len(broken) > len(answers) else "warning",
        f"For {len(broken)} of {len(answers)} answers the prompt that a server renders is not the beginning of the training "
        f"sample (first {first.chat.id}: {how}), so there the draft learns on other text than it is served on.",
        "use the chat template that is served; it must write a finished conversation as it writes the same conversation "
        "with add_generation_prompt (templates that drop earlier thoughts do not: split such chats into one per answer)",
        figures,
    )


def check_mask(answers: Sequence[_Answer], tokenizer) -> Finding:
    """Whether the supervised tokens are each answer's own: they begin where a server lets it begin, hold its text, and end
    with the token that ends the turn."""
    added = tokenizer.added_tokens_decoder
    wrong, elsewhere, looked_at = [], [], 0
    for answer in answers:
        tokens, mask = answer.sample.tokens, answer.sample.assistant_mask
        if not answer.continues or len(answer.prompt) >= len(tokens):
            continue
        looked_at += 1
        begin, end = _run_near(mask, len(answer.prompt))
        run = tokens[begin:end].tolist()
        closed = not run or run[-1] in added
        stray = any(t in added for t in run) or end < len(tokens) and int(tokens[end]) in added
        open_end = not closed and not answer.truncated and stray
        text, content = _plain(tokenizer.decode([t for t in run if t not in added])), _plain(answer.content)
        # Without an end to look for, a cut answer's text must be there whole, unless the conversation was cut as well.
        incomplete = answer.truncated and end < len(tokens) and text != content
        if (not run and content) or open_end or incomplete or text not in content:
            wrong.append((answer, begin))
        elif run and begin != len(answer.prompt):
            elsewhere.append((answer, begin))
    figures = {"answers": looked_at, "wrong": len(wrong), "begin_elsewhere": len(elsewhere)}
    if not looked_at:
        return Finding("loss-mask", "note", "No mask could be compared with a served prompt, see template-prefix.", "", figures)
    for found, severity in ((wrong, "error"), (elsewhere, "warning")):
        if found:
            answer, begin = found[0]
            return Finding(
                "loss-mask",
                severity,
                f"The loss mask is not on the answers: in {len(found)} of {looked_at} it does not begin or end with the "
                f"answer (first {answer.chat.id}: supervised from token {begin}, while the answer begins at token "
                f"{len(answer.prompt)}). The draft is trained on other positions than it is used at.",
                "look at the sample above; use a chat template that keeps answers as they are, and report a template that "
                "jsfdd masks wrongly",
                figures,
            )
    return Finding(
        "loss-mask",
        "ok",
        f"In all {looked_at} answers the supervised tokens begin where the served prompt ends and hold the answer's text.",
        figures=figures,
    )


def check_tokenizer(location: Path, tokenizer, chats: Sequence[Chat]) -> Finding:
    """Whether those who load the directory by its class name read the same tokens."""
    if not location.is_dir():
        return Finding(
            "tokenizer-reload",
            "note",
            "The target is a GGUF file; a server reads a Hugging Face directory, whose tokenizer is not here to compare.",
            "run the doctor on the directory that is served as well",
        )
    try:
        # The very class that the tokenizer files name, as servers load it.
        other = AutoTokenizer.from_pretrained(location, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
        return Finding(
            "tokenizer-reload",
            "warning",
            f"AutoTokenizer of transformers {transformers.__version__} cannot load this directory ({error}).",
            "make the directory load with AutoTokenizer.from_pretrained, as most servers load it",
        )
    texts = [_PROBE, *(m["content"] for chat in spread_over(chats, _LOOKED_AT) for m in chat.messages)]
    different = [text for text in texts if tokenizer.encode(text) != other.encode(text)]
    kind = type(other).__name__
    figures = {"texts": len(texts), "different": len(different), "class": kind, "transformers": transformers.__version__}
    if not different:
        return Finding(
            "tokenizer-reload", "ok", f"AutoTokenizer ({kind}) reads the same tokens in {len(texts)} texts.", figures=figures
        )
    text = different[0]
    ours, theirs = (t.convert_ids_to_tokens(t.encode(text)) for t in (tokenizer, other))
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    return Finding(
        "tokenizer-reload",
        "error",
        f"AutoTokenizer of transformers {transformers.__version__} loads this directory as {kind} and reads other tokens than "
        f"its tokenizer.json says in {len(different)} of {len(texts)} texts: {theirs[at : at + 4]} instead of "
        f"{ours[at : at + 4]}. A server that loads it so gives target and draft other text than was trained on.",
        'set "tokenizer_class" to "PreTrainedTokenizerFast" in tokenizer_config.json of the directory that is served',
        figures,
    )


def _answers(tokenizer, chat: Chat, sample: Sample) -> Iterator[_Answer]:
    for number, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            try:
                prompt = render_prompt(tokenizer, chat.messages[:number])
            except ValueError:  # a template may refuse part of a conversation that it takes as a whole
                prompt = None
            yield _Answer(chat, sample, message["content"], message.get("truncated", False), prompt)


def _run_near(mask: np.ndarray, position: int) -> tuple[int, int]:
    """First and one past last of the supervised run that holds `position` or a token next to it; empty if there is none."""
    inside = next((t for t in (position, position + 1, position - 1) if 0 <= t < len(mask) and mask[t]), None)
    if inside is None:
        return position, position
    off = np.flatnonzero(~mask)
    before, after = off[off < inside], off[off > inside]
    return int(before[-1]) + 1 if len(before) else 0, int(after[0]) if len(after) else len(mask)


def _plain(text: str) -> str:
    """Text as tokenizers that normalize it may give it back."""
    return unicodedata.normalize("NFKC", text).strip()


def _check_end_of_turn(answers: Sequence[_Answer], stop_tokens: Sequence[int], tokenizer) -> Finding:
    """Whether supervised answers end with a token that ends generation."""
    stops = set(stop_tokens)
    samples = {answer.sample.id: answer.sample for answer in answers}.values()
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
    few = share < _FEW_SUPERVISED
    return Finding(
        "supervised-share",
        "warning" if few else "ok",
        f"{counted:,} of {total:,} tokens ({percent(share)}) of {len(samples)} conversations count in the loss.",
        "most of the computing is spent on prompts; check that the data holds whole answers" if few else "",
        {"counted": counted, "tokens": total, "share": share},
    )


def _check_skipped(summary: TokenizeSummary) -> Finding:
    skipped = summary.read - summary.kept
    severity = "ok" if not skipped else "note" if skipped <= _MANY_SKIPPED * summary.read else "warning"
    return Finding(
        "skipped-conversations",
        severity,
        f"{summary}.",
        "drop or repair the conversations that are skipped" if skipped else "",
        {"read": summary.read, "kept": summary.kept, "no_counted": len(summary.no_counted)},
    )
