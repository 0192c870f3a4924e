"""`examine`: run all checks for faults that make a draft accept less when served than in training.

    data       template, loss mask, tokenizer                      is what is trained on what is served?
    hidden     the target's text, the data, stored hidden states   are the features those that the head reads?
    draft      widths, heads, norm, context; the training's record  do draft and target belong together?
    decoded    agreement, faults undone, rope, decoder's verdicts   does the draft do when served what it does in training?

If a check needs something that an earlier check found missing, it is skipped, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jsfdd.base.records import Sample
from jsfdd.data.chat import Chat
from jsfdd.data.render import RefusedByTemplate, render_prompt
from jsfdd.data.template import TokenizeSummary
from jsfdd.doctor.check_acceptance import check_agreement, check_decoded, check_rope, check_variants, faults_of, read_with_draft
from jsfdd.doctor.check_data import check_data, check_tokenizer
from jsfdd.doctor.check_draft import check_architecture, check_record
from jsfdd.doctor.check_hidden import check_data_choices, check_stored, check_target_text
from jsfdd.doctor.findings import Diagnosis, Finding, spread_over, supervised_spans
from jsfdd.doctor.reader import Reader, decode_texts
from jsfdd.models.draft import Draft
from jsfdd.weights.target import Target

_LONGEST_READ = 512  # tokens of a conversation that the target reads: faults show early, and time is short


def examine(
    target: Target,
    location: Path,
    chats: Sequence[Chat],
    samples: Sequence[Sample],
    summary: TokenizeSummary,
    identity: dict,
    draft: Draft | None,
    store: Mapping[str, np.ndarray] | None,
    *,
    conversations: int,
    num_draft_tokens: int,
    max_new_tokens: int,
    masks_spans: bool = False,
    progress: Callable[[str], None] = lambda doing: None,
) -> Diagnosis:
    """Run every check that the inputs allow.

    Args:
      target: from `load_target`.
      location: its directory or .gguf file.
      chats: those of the samples whose template and mask are looked at.
      samples, summary: what reading them all gave; at least one sample.
      identity: of target, template and data, as the pipeline records it.
      draft: None without one.
      store: hidden states of the training run, if there are any.
      conversations: so many samples are read by the target, and so many prompts decoded.
      masks_spans: whether parts of answers were left out of the mask on purpose.
      progress: called with what is being done.
    """
    kept = {sample.id for sample in samples} | {sample.id.rpartition("/")[0] for sample in samples}
    chats = [chat for chat in chats if chat.id in kept]
    progress("looking at template, mask and tokenizer")
    findings = check_data(target.tokenizer, chats, samples, summary, target.stop_tokens, masks_spans)
    findings.append(check_tokenizer(location, target.tokenizer, chats))

    progress("reading conversations with the target")
    read = spread_over(samples, conversations)
    in_store = [i for i, sample in enumerate(samples) if store and sample.id in store] or range(len(samples))
    stored = [samples[i] for i in spread_over(in_store, conversations)]
    longest = max(len(sample.tokens) for sample in [*read, *stored])
    reader = Reader(target, min(longest, _LONGEST_READ))
    findings.append(check_data_choices(reader, read))
    if store is not None:
        findings.append(check_stored(reader, stored, store))
    if draft is not None:
        findings += check_architecture(target.config, draft.config.decoder) + check_record(draft.record, identity, samples)
        findings += _check_draft(target, draft, chats, conversations, num_draft_tokens, max_new_tokens, progress)
    return Diagnosis(tuple(findings), samples[0].id, supervised_spans(samples[0], target.tokenizer))


def _check_draft(target, draft, chats, conversations, num_draft_tokens, max_new_tokens, progress) -> list[Finding]:
    """The checks that run the draft, if it can run on this target at all."""
    config = draft.config
    fits = (config.decoder.hidden_size, config.decoder.vocab_size) == (target.config.hidden_size, target.config.vocab_size)
    fits &= max(config.target_layers, default=0) < target.config.num_layers
    prompts = _prompts(target, chats, conversations, max_new_tokens) if fits else []
    if not prompts:
        why = f"no conversation's prompt leaves room for an answer of {max_new_tokens} tokens in the target's context"
        if not fits:
            why = "the draft cannot run on this target"
        left_out = Finding("decoded-acceptance", "note", f"Agreement and decoding were not examined: {why}.")
        return [check_rope(target.config, config.decoder, None, []), left_out]

    progress(f"decoding {len(prompts)} prompts")
    texts = decode_texts(target, draft, prompts, num_draft_tokens, max_new_tokens)
    progress("reading the decoded text whole")
    reader = Reader(target, max(len(text.tokens) for text in texts))
    findings = [check_target_text(reader, texts, target.tokenizer)]
    texts = [text for text in texts if text.step_tokens]
    if not texts:
        left_out = Finding("decoded-acceptance", "note", "Every answer ended with its first token, so nothing was drafted.")
        return [*findings, check_rope(target.config, config.decoder, None, []), left_out]
    readings = read_with_draft(reader, draft, texts)
    return [
        *findings,
        check_agreement(readings, texts),
        *check_variants(faults_of(target.config, config), readings, texts),
        check_rope(target.config, config.decoder, readings, texts),
        check_decoded(reader, readings, texts, target.tokenizer),
    ]


def _prompts(target: Target, chats: Sequence[Chat], count: int, max_new_tokens: int) -> list[tuple[str, list[int]]]:
    """(id, token ids) of conversations up to their first answer, of those that leave room for the target's own."""
    prompts = []
    for chat in spread_over([chat for chat in chats if chat.messages], 4 * count):  # some may be too long
        first = next(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")
        try:
            ids = render_prompt(target.tokenizer, chat.messages[:first], chat.tools) if first else []
        except RefusedByTemplate:
            continue
        if ids and len(ids) + max_new_tokens <= min(target.config.max_position, _LONGEST_READ + max_new_tokens):
            prompts.append((chat.id, ids))
    return spread_over(prompts, count)
