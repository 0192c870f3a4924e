"""The doctor's checks of acceptance: the draft on the target's own greedy text, unchanged and with changes.

A fault between training and serving is found by undoing it: if the draft predicts far more of the target's tokens with the two
halves of fc swapped, they are the wrong way round. All comparisons are paired, position by position (McNemar's test).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jsfdd.base.numbers import percent
from jsfdd.doctor.check_draft import describe_rope, ropes_agree
from jsfdd.doctor.findings import Finding
from jsfdd.doctor.reader import Choices, DecodedText, Reader, WholeText
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import Draft, DraftConfig

_CLEAR = 4.0  # standard deviations between two ways of reading, over the positions where they differ
_WORTH_IT = 0.03  # and at least so many more of all positions
TARGET_ROPE = "target's rope"


class Readings(NamedTuple):
    """The draft's choices on true prefixes, by text.

    Attributes:
      given: as the draft is.
      variants: the same with one thing changed, by the name of the change.
    """

    given: list[Choices]
    variants: dict[str, list[Choices]]


class Fault(NamedTuple):
    """A fault between training and serving, and how it is undone.

    Attributes:
      name: of the finding.
      undone: (draft, text) -> the draft, embeddings and states that it would need.
      how, says, remedy: words of the finding.
      layers: those whose inputs the undoing reads, beside the draft's own.
    """

    name: str
    undone: Callable[[Draft, WholeText], tuple[Draft, Array, Array]]
    how: str
    says: str
    remedy: str
    layers: tuple[int, ...] = ()


def faults_of(target: DecoderConfig, draft: DraftConfig) -> list[Fault]:
    """The faults that are known of a draft of this kind."""
    layers = draft.target_layers
    off_by_one = Fault(
        "pairing", lambda draft, text: (draft, text.embedding, text.states(layers)),
        "with the embedding of x_t in place of x_{t+1}",
        "The draft was trained on pairs that are off by one: h_t goes with the embedding of x_{t+1}, the token after it",
        "shift the tokens against the hidden states by one and train again",
    )  # fmt: skip
    if draft.kind == "eagle":
        return [
            Fault(
                "fc-halves", lambda draft, text: (_fc_exchanged(draft), _following(text), text.hidden),
                "with the two halves of fc's input exchanged",
                "The fc inputs are swapped: its first half must read the embedding and its second the hidden state",
                "exchange the halves of fc.weight's input (columns 0 to D−1 with D to 2D−1)",
            ),
            Fault(
                "final-norm", lambda draft, text: (draft, _following(text), text.stream),
                "on hidden states from before the target's final norm",
                "The draft was trained on hidden states from before the target's final norm, and is served those after it",
                "take hidden states after the final norm (`jsfdd train` does) and train again",
            ),
            off_by_one,
        ]  # fmt: skip
    listed = f"the draft's config says that it reads the inputs of layers {_numbers(layers)}"
    streams = [
        (
            "stream-order", layers[::-1], "in the opposite order", "fc reads its streams in the opposite order",
            f"{listed}, in this order: exchange the parts of fc.weight's input",
        ),
        *(
            (
                f"stream-layers-{way}", tuple(n + shift for n in layers), f"of one layer {than}",
                f"its streams are those of one layer {than}; engines number layers in two ways",
                f"{listed}: write {_numbers(n + shift for n in layers)}",
            )
            for way, than, shift in (("up", "later", 1), ("down", "earlier", -1))
        ),
    ]  # fmt: skip
    return [
        *(
            Fault(
                name, lambda draft, text, read=read: (draft, _following(text), text.states(read)),
                f"with streams {how}", f"The draft is served other streams than it was trained on: {says}", remedy, read,
            )
            for name, read, how, says, remedy in streams
            if min(read) >= 0 and max(read) < target.num_layers
        ),
        off_by_one,
    ]  # fmt: skip


def _numbers(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))


def read_with_draft(reader: Reader, draft: Draft, texts: Sequence[DecodedText]) -> Readings:
    """The draft over the true pairs of each text, as it is and with each fault undone."""
    target, layers = reader.target.config, draft.config.target_layers
    faults = faults_of(target, draft.config)
    rotated = dataclasses.replace(draft.config, decoder=dataclasses.replace(draft.config.decoder, rope=target.rope))
    given: list[Choices] = []
    variants: dict[str, list[Choices]] = {fault.name: [] for fault in faults}
    if not ropes_agree(target, draft.config.decoder):
        variants[TARGET_ROPE] = []
    entered = tuple(sorted({*layers, *(layer for fault in faults for layer in fault.layers)}))
    for text in texts:
        whole = reader.read(text.tokens, entered=entered)
        true_pairs = _following(whole), whole.states(layers)
        given.append(reader.draft_choices(draft, text.tokens, *true_pairs))
        inputs = {fault.name: fault.undone(draft, whole) for fault in faults}
        inputs[TARGET_ROPE] = draft._replace(config=rotated), *true_pairs
        for name, choices in variants.items():
            variant, embedding, states = inputs[name]
            choices.append(reader.draft_choices(variant, text.tokens, embedding, states))
    return Readings(given, variants)


def _following(text: WholeText) -> Array:
    return jnp.roll(text.embedding, -1, axis=0)


def _fc_exchanged(draft: Draft) -> Draft:
    kernel = draft.params["fc"]["kernel"]
    width = kernel.shape[0] // 2
    fc = {**draft.params["fc"], "kernel": jnp.concatenate([kernel[width:], kernel[:width]])}
    return draft._replace(params={**draft.params, "fc": fc})


def check_agreement(readings: Readings, texts: Sequence[DecodedText]) -> Finding:
    """How often the draft's likeliest token is the target's, over all answer tokens except each answer's first."""
    right = _right(readings.given, texts)
    wanted = np.concatenate([text.tokens[text.prompt_length + 1 :] for text in texts])
    commonest = float(np.bincount(wanted).max() / len(wanted))
    figures = {"agreement": float(right.mean()), "commonest_token": commonest, "positions": len(right)}
    says = (
        f"On the target's true hidden states the draft names the target's next token at {percent(right.mean())} of "
        f"{len(right)} positions"
    )
    if right.mean() > commonest:
        return Finding("draft-agreement", "ok", f"{says}.", figures=figures)
    return Finding(
        "draft-agreement",
        "warning",
        f"{says}, no more than always naming the commonest token would ({percent(commonest)}).",
        "see the findings below for a fault that explains it; if there is none, the draft is not trained enough or was trained "
        "for another target",
        figures,
    )


def check_variants(faults: Sequence[Fault], readings: Readings, texts: Sequence[DecodedText]) -> list[Finding]:
    """Whether the draft does far better with one thing changed."""
    right = _right(readings.given, texts)
    return [
        _compare(fault.name, right, _right(readings.variants[fault.name], texts), fault.how, fault.says, fault.remedy)
        for fault in faults
    ]


def check_rope(target: DecoderConfig, draft: DecoderConfig, readings: Readings | None, texts: Sequence[DecodedText]) -> Finding:
    """Whether the draft rotates as the target does, and if not, which rotation its weights were trained with."""
    if ropes_agree(target, draft):
        return Finding("rope", "ok", f"Target and draft rotate alike: {describe_rope(target.rope)}.")
    says = f"The target's rope is {describe_rope(target.rope)}; the draft's config says {describe_rope(draft.rope)}."
    remedy = "write the target's rope_theta and rope_scaling into the draft's config.json, as they were in training"
    figures: dict = {"target": dataclasses.asdict(target.rope), "draft": dataclasses.asdict(draft.rope)}
    if readings is None:
        return Finding("rope", "error", says, remedy, figures)
    given, other = _right(readings.given, texts), _right(readings.variants[TARGET_ROPE], texts)
    figures |= {"agreement": float(given.mean()), "agreement_with_targets_rope": float(other.mean())}
    rates = (
        f"The draft agrees with the target at {percent(given.mean())} of {len(given)} positions, and with the target's rope at "
        f"{percent(other.mean())}"
    )
    if _clearly_better(given, other):
        return Finding("rope", "note", f"{says} {rates}: it was trained with a rope of its own.", "", figures)
    if _clearly_better(other, given):
        return Finding("rope", "error", f"{says} {rates}: it was trained with the target's.", remedy, figures)
    return Finding("rope", "error", f"{says} {rates}: too little difference to tell on texts this short.", remedy, figures)


def check_decoded(reader: Reader, readings: Readings, texts: Sequence[DecodedText], tokenizer) -> Finding:
    """Whether the decoder's verdicts on first draft tokens are those of reading the text whole.

    They are one function computed in two ways, so a difference beyond rounding is a fault of cache, mask, positions or
    pairing.
    """
    decoded, whole, parted, ties = [], [], [], 0
    for text, choices in zip(texts, readings.given):
        for i, accepted in zip(text.step_tokens, text.step_accepted):
            gap, lead = choices.gap[i - 2], choices.lead[i - 2]
            agrees = bool(gap == 0)
            decoded.append(accepted)
            whole.append(agrees)
            if agrees != accepted:
                if (lead if agrees else gap) <= reader.tie:
                    ties += 1
                else:
                    parted.append((text, i, accepted, int(choices.token[i - 2])))
    everywhere = _right(readings.given, texts)
    figures = {
        "steps": len(decoded),
        "decoded": float(np.mean(decoded)),
        "teacher_forced": float(np.mean(whole)),
        "teacher_forced_everywhere": float(everywhere.mean()),
        "parted": len(parted),
        "ties": ties,
    }
    rates = (
        f"In {len(decoded)} steps the decoder accepted {percent(np.mean(decoded))} of the first draft tokens; reading the same "
        f"text whole, the draft names {percent(np.mean(whole))} of them"
    )
    if not parted:
        tied = f", {ties} ties within rounding apart" if ties else ""
        return Finding("decoded-acceptance", "ok", f"{rates}, step by step the same{tied}.", figures=figures)
    text, i, accepted, token = parted[0]
    figures |= {"prompt": text.id, "position": int(i), "target_token": int(text.tokens[i]), "draft_token": token}
    return Finding(
        "decoded-acceptance",
        "error",
        f"{rates}. They part in {len(parted)} steps; first in {text.id} at token {i}, where the target says "
        f"{tokenizer.decode([text.tokens[i]])!r}: the decoder {'accepted' if accepted else 'rejected'} the draft's token, and "
        f"read whole the draft says {tokenizer.decode([token])!r}.",
        "this is a fault of cache, mask, positions or pairing in the decoder: report it with this draft's config.json",
        figures,
    )


def _compare(name: str, given: np.ndarray, changed: np.ndarray, how: str, fault: str, remedy: str) -> Finding:
    figures = {"agreement": float(given.mean()), "changed": float(changed.mean()), "positions": len(given)}
    rates = (
        f"The draft agrees with the target at {percent(given.mean())} of {len(given)} positions, and {how} at "
        f"{percent(changed.mean())}"
    )
    if _clearly_better(changed, given):
        return Finding(name, "error", f"{rates}. {fault}.", remedy, figures)
    if _clearly_better(given, changed):
        return Finding(name, "ok", f"{rates}: it is fed as it was trained.", figures=figures)
    return Finding(name, "note", f"{rates}: too little difference to tell.", "", figures)


def _right(choices: Sequence[Choices], texts: Sequence[DecodedText]) -> np.ndarray:
    """bool over all answer tokens except each answer's first: entry i of a text's choices is about token i + 2."""
    return np.concatenate([c.gap[text.prompt_length - 1 :] == 0 for c, text in zip(choices, texts)])


def _clearly_better(a: np.ndarray, b: np.ndarray) -> bool:
    """McNemar's test: where exactly one is right, it is far more often a."""
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    more = only_a - only_b
    return more > _WORTH_IT * len(a) and more > _CLEAR * math.sqrt(only_a + only_b)
