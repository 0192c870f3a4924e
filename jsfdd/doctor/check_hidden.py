"""The doctor's checks of hidden states: does the target's head, applied to them, predict the target's text?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jsfdd.base.numbers import percent
from jsfdd.base.records import Sample
from jsfdd.doctor.findings import Finding
from jsfdd.doctor.reader import DecodedText, Reader

_FAR_FROM_EXPECTED = 0.5  # of the agreement to expect; text by another author reaches about 0.8
_SAME = 0.05  # relative distance; rounding to bfloat16 alone gives 0.003, a bfloat16 target up to some 0.03


def check_data_choices(reader: Reader, samples: Sequence[Sample]) -> Finding:
    """Whether the data reads like text of this target: broken weights, norm, tokenizer or template would show here."""
    agree = probability = 0.0
    positions = 0
    for sample in samples:
        tokens = sample.tokens[: reader.width]
        counted = np.flatnonzero(sample.counted[: len(tokens)][:-1])
        choices = reader.choices(reader.read(tokens).hidden, tokens)
        agree += float(np.sum(choices.gap[counted] == 0))
        probability += float(np.sum(choices.probability[counted]))
        positions += len(counted)
    if not positions:
        return Finding("data-choices", "note", "The conversations that were read hold no supervised token in what was read.")
    rate, expected = agree / positions, probability / positions
    figures = {"agreement": rate, "expected": expected, "positions": positions}
    says = (
        f"The data's next token is the target's likeliest at {percent(rate)} of {positions} supervised positions; of text that "
        f"the target wrote itself {percent(expected)} is to be expected."
    )
    if rate >= _FAR_FROM_EXPECTED * expected:
        return Finding("data-choices", "ok", says, figures=figures)
    return Finding(
        "data-choices",
        "warning",
        f"{says} Either the answers are by a very different author, or weights, tokenizer or template do not belong together.",
        "let the target write the answers; if it has, check that tokenizer, template and weights are of one model",
        figures,
    )


def check_target_text(reader: Reader, texts: Sequence[DecodedText], tokenizer) -> Finding:
    """Whether the decoder's greedy text is the target's own: read whole, every token is the head's choice."""
    parted, ties, positions = [], 0, 0
    for text in texts:
        choices = reader.choices(reader.read(text.tokens).hidden, text.tokens)
        first = text.prompt_length - 1  # says the answer's first token
        gap = choices.gap[first:]
        parted += [(text, i, choices.token[i]) for i in np.flatnonzero(gap > reader.tie) + first]
        ties += int(np.sum((gap > 0) & (gap <= reader.tie)))
        positions += len(gap)
    figures = {"positions": positions, "parted": len(parted), "ties": ties}
    if not parted:
        return Finding(
            "target-text",
            "ok",
            f"All {positions} decoded tokens are the target's own choice when it reads the text whole"
            + (f" ({ties} of them ties within rounding)." if ties else "."),
            figures=figures,
        )
    text, i, choice = parted[0]
    figures |= {"prompt": text.id, "position": int(i) + 1, "decoded": int(text.tokens[i + 1]), "whole": int(choice)}
    return Finding(
        "target-text",
        "error",
        f"{len(parted)} of {positions} decoded tokens are not what the target chooses when it reads the text whole; first in "
        f"{text.id} at token {i + 1}: decoded {tokenizer.decode([text.tokens[i + 1]])!r}, read whole "
        f"{tokenizer.decode([choice])!r}.",
        "this is a fault in jsfdd's cache, mask or positions: report it with this target's config.json",
        figures,
    )


def check_stored(reader: Reader, samples: Sequence[Sample], store: Mapping[str, np.ndarray]) -> Finding:
    """Whether stored hidden states are those that the target computes now, and else what they are."""
    name, common = "stored-hidden-states", [sample for sample in samples if sample.id in store]
    if not common:
        return Finding(
            name,
            "note",
            "The store holds none of the conversations given, so it cannot be compared.",
            "give the --data that the draft was trained on",
        )
    lengths = [sample.id for sample in common if len(store[sample.id]) != len(sample.tokens)]
    if lengths:
        return Finding(
            name,
            "error",
            f"{len(lengths)} of {len(common)} conversations have another number of stored hidden states than of tokens (first "
            f"{lengths[0]}): they were stored with another tokenizer, template or maximal length.",
            "store the hidden states again with this tokenizer and template, and train again",
            {"conversations": len(common), "other_length": len(lengths)},
        )
    texts = [sample.tokens[: reader.width] for sample in common]
    width = reader.target.config.hidden_size  # what stands in front of the final state is an EAGLE-3 draft's
    stored = [np.asarray(store[sample.id][: reader.width, -width:], np.float32) for sample in common]
    fresh = [reader.read(tokens) for tokens in texts]
    distance = _distance(stored, [text.hidden for text in fresh])
    agree = np.concatenate([_agreement(reader, a, text.hidden, tokens) for a, text, tokens in zip(stored, fresh, texts)])
    figures = {"conversations": len(common), "relative_distance": distance, "same_choice": float(agree.mean())}
    if distance <= _SAME:
        return Finding(
            name,
            "ok",
            f"The stored hidden states of {len(common)} conversations are those that the target computes now (relative "
            f"distance {distance:.4f}); its head makes the same choice from both at {percent(agree.mean())} of {len(agree)} "
            "positions.",
            figures=figures,
        )
    explanation = _explain(reader, texts, stored, fresh)
    return Finding(
        name,
        "error",
        f"The stored hidden states are not those that the target computes now (relative distance {distance:.2f}); the head "
        f"makes the same choice from both at {percent(agree.mean())} of {len(agree)} positions. {explanation}",
        "store the hidden states again (delete the store), and train again",
        figures,
    )


def _explain(reader: Reader, texts, stored, fresh) -> str:
    """The known fault that makes the stored states, if there is one."""
    explanations = {
        "They were taken before the target's final norm.": [text.stream for text in fresh],
        "They are one position late: row t holds the state of token t + 1.": [np.roll(t.hidden, -1, axis=0) for t in fresh],
        "They are one position early: row t holds the state of token t − 1.": [np.roll(t.hidden, 1, axis=0) for t in fresh],
    }
    layers = reader.target.config.num_layers - 1
    if layers:
        earlier = [reader.read(tokens, layers) for tokens in texts]
        explanations |= {
            "They are those of the layer before the last, before the final norm.": [text.stream for text in earlier],
            "They are those of the layer before the last, with the final norm.": [text.hidden for text in earlier],
        }
    for sentence, candidate in explanations.items():
        # The first and the last row of a shifted text have no counterpart.
        if _distance([rows[1:-1] for rows in stored], [np.asarray(rows)[1:] for rows in candidate]) <= _SAME:
            return sentence
    return "They are of other weights, another tokenizer or another template."


def _distance(stored: Sequence[np.ndarray], fresh: Sequence) -> float:
    """‖stored − fresh‖ / ‖fresh‖ over all rows that are stored."""
    pairs = [(a, np.asarray(b, np.float32)[: len(a)]) for a, b in zip(stored, fresh)]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)))


def _agreement(reader: Reader, stored, hidden, tokens) -> np.ndarray:
    padded = np.zeros(hidden.shape, hidden.dtype)
    padded[: len(stored)] = stored
    return reader.choices(padded, tokens).token == reader.choices(hidden, tokens).token
