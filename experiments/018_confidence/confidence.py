"""Does a draft know when it is right? Acceptance against the draft's own confidence, and τ predicted from confidence alone.

    drafted = proposed(recorded, judge(draft_params))          # replay: every token that the draft would propose, and its fate
    bins = reliability(drafted, drafted.probability, seed=0)   # accepted share by confidence
    calibration_error(bins), auroc(drafted, -drafted.entropy, seed=0)
    predicted_tau(elsewhere, thresholds(drafted), seed=0)      # of a workload whose acceptance is not looked at

A step is taken to begin at every position of the target's answers, each as likely as any other, so that all of a text
speaks; a decoder begins where its last step ended, and its τ (`replay.walk`) differs by that. An entry weighs as much as it
is likely to be reached: at temperature 0 that is 0 or 1. Intervals are over prompts (`intervals.py`).

Average thresholded confidence (ATC, Garg et al., arXiv 2201.04234, section 4): where labels are known, find the threshold above
which lies as large a share as is right; elsewhere, predict that the share above it is right. Here what is right is a draft
token up to which all of its step is accepted, its confidence is the probability of that path, and each depth has its threshold;
τ is 1 and the sum of those shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jsfdd.base.records import Sample
from jsfdd.evaluation.acceptance import with_interval
from jsfdd.evaluation.intervals import interval, resample_ratios, resample_times
from jsfdd.evaluation.replay import Judged, Recorded


class DraftTokens(NamedTuple):
    """Draft tokens, one entry each, in steps that begin at every position.

    Attributes:
      accepted: chance that the target accepts it, given that it is reached. Above temperature 0 that is of the text's token in
        its place, whose mean over texts is the draft token's own.
      probability: the draft's own, of its likeliest token.
      entropy: of the draft's distribution, nats.
      reached: chance that all draft tokens before it in its step are accepted.
      path: product of their probabilities and its own.
      depth: from 1.
      prompt: number of the prompt that it answers.
    """

    accepted: Float[np.ndarray, " n"]
    probability: Float[np.ndarray, " n"]
    entropy: Float[np.ndarray, " n"]
    reached: Float[np.ndarray, " n"]
    path: Float[np.ndarray, " n"]
    depth: Int[np.ndarray, " n"]
    prompt: Int[np.ndarray, " n"]


class Bin(NamedTuple):
    """Draft tokens of similar confidence.

    Attributes:
      confidence: their mean.
      accepted, accepted_low, accepted_high: share of them that is accepted, with its 95% interval over prompts.
      count: how many are reached; above temperature 0 the expectation.
    """

    confidence: float
    accepted: float
    accepted_low: float
    accepted_high: float
    count: float


def proposed(recorded: Recorded, judged: Sequence[Judged]) -> DraftTokens:
    """What a draft would propose in a step that begins at any position of the answers, of `replay.make_judge`'s verdicts."""
    texts = zip(recorded.samples, recorded.prompts, judged, strict=True)
    per_text = [_in_text(sample, number, verdicts, recorded.max_new_tokens) for sample, number, verdicts in texts]
    return DraftTokens(*(np.concatenate(fields) for fields in zip(*per_text, strict=True)))


def _in_text(sample: Sample, prompt: int, judged: Judged, max_new_tokens: int) -> DraftTokens:
    start = int(np.argmax(sample.assistant_mask))
    length = len(sample.tokens) - start
    depth = np.arange(1, len(judged.accept) + 1)
    begin = np.arange(1, min(max_new_tokens, length))[:, None]  # tokens that are there when a step begins
    # At depth i a step proposes the answer's token begin + i − 1, counted from 0; nothing behind the answer's end.
    proposed = begin + depth <= length
    at = np.where(proposed, start + begin + depth - 3, 0)
    accepted, probability, entropy = (np.where(proposed, field[depth - 1, at], 0.0).astype(float) for field in judged)
    reached = np.cumprod(np.pad(accepted[:, :-1], ((0, 0), (1, 0)), constant_values=1.0), axis=1)
    path = np.cumprod(probability, axis=1)
    wide = (
        accepted,
        probability,
        entropy,
        reached,
        path,
        np.broadcast_to(depth, proposed.shape),
        np.full(proposed.shape, prompt),
    )
    return DraftTokens(*(field[proposed] for field in wide))


def rows_of(drafted: DraftTokens, rows: Bool[np.ndarray, " n"]) -> DraftTokens:
    """The entries that `rows` picks: those of one depth, or of some prompts."""
    return DraftTokens(*(field[rows] for field in drafted))


# --- Is it calibrated, and does it tell right from wrong? ----------------------------------------------------------


def reliability(drafted: DraftTokens, confidence: Float[np.ndarray, " n"], seed: int, bins: int = 10) -> list[Bin]:
    """Accepted share by confidence in [0, 1], in so many bins of equal width; those that nothing reaches are left out."""
    bin_numbers = np.minimum((confidence * bins).astype(int), bins - 1)
    sums = (drafted.reached, drafted.reached * confidence, drafted.reached * drafted.accepted)
    count, mean, accepted = (_by_prompt(drafted, values, bin_numbers, bins) for values in sums)
    resampled = resample_ratios(accepted, count, seed)
    count, mean, accepted = (values.sum(axis=0) for values in (count, mean, accepted))
    return [
        Bin(float(mean[i] / count[i]), float(accepted[i] / count[i]), *interval(resampled[:, i]), float(count[i]))
        for i in np.flatnonzero(count)
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: the mean distance of a bin's accepted share from its confidence (Guo et al., 1706.04599)."""
    counts = [bin_.count for bin_ in bins]
    return float(np.average([abs(bin_.accepted - bin_.confidence) for bin_ in bins], weights=counts))


def auroc(drafted: DraftTokens, confidence: Float[np.ndarray, " n"], seed: int) -> dict:
    """Chance that an accepted token has more confidence than a refused one, equal ones counting half; exact.

    Returns:
      {"auroc", "auroc_low", "auroc_high"}; None where all are accepted, or none is.
    """
    _, prompt = np.unique(drafted.prompt, return_inverse=True)
    right, wrong = drafted.reached * drafted.accepted, drafted.reached * (1 - drafted.accepted)
    size = prompt.max() + 1
    # wins[a, b]: pairs of an accepted token of prompt a and a refused one of b that the former wins. A resample, in which each
    # prompt occurs so many times, is then two products.
    wins = np.empty((size, size))
    for b in range(size):
        rows = np.flatnonzero(prompt == b)
        rows = rows[np.argsort(confidence[rows], kind="stable")]
        wrong_below = np.concatenate([[0.0], np.cumsum(wrong[rows])])
        fewer, not_more = (wrong_below[np.searchsorted(confidence[rows], confidence, side)] for side in ("left", "right"))
        wins[:, b] = np.bincount(prompt, right * (fewer + not_more) / 2, size)
    right, wrong = (np.bincount(prompt, values, size) for values in (right, wrong))
    areas = []
    for times in (np.ones((1, size)), resample_times(size, seed)):
        with np.errstate(invalid="ignore"):
            areas.append(np.sum((times @ wins) * times, axis=1) / ((times @ right) * (times @ wrong)))
    value = float(areas[0][0])
    return with_interval("auroc", None if np.isnan(value) else value, areas[1])


def figures(drafted: DraftTokens, seed: int) -> dict:
    """What can be said of a draft's confidence; JSON-ready.

    Returns:
      "count": draft tokens that are reached; "accepted", "confidence": their share and their mean probability;
      "calibration_error" and "reliability" of the probability; "auroc" of the probability and "auroc_entropy" of the negative
      entropy, with their bounds.
    """
    bins = reliability(drafted, drafted.probability, seed)
    by_entropy = auroc(drafted, -drafted.entropy, seed)
    return {
        "count": float(drafted.reached.sum()),
        "accepted": float(np.average(drafted.accepted, weights=drafted.reached)),
        "confidence": float(np.average(drafted.probability, weights=drafted.reached)),
        "calibration_error": calibration_error(bins),
        **auroc(drafted, drafted.probability, seed),
        **{name.replace("auroc", "auroc_entropy"): value for name, value in by_entropy.items()},
        "reliability": [bin_._asdict() for bin_ in bins],
    }


# --- τ from confidence ---------------------------------------------------------------------------------------------


def thresholds(drafted: DraftTokens) -> Float[np.ndarray, " G"]:
    """The path's probability, at each depth, from which on there are as many draft tokens as whole paths are accepted."""
    edges = []
    for depth in range(1, drafted.depth.max() + 1):
        at_depth = drafted.depth == depth
        right = round(float(np.sum(drafted.reached[at_depth] * drafted.accepted[at_depth])))
        edges.append(np.sort(drafted.path[at_depth])[-right] if right else np.inf)
    return np.array(edges)


def measured_tau(drafted: DraftTokens, seed: int) -> dict:
    """τ of steps that begin everywhere: {"tau", "tau_low", "tau_high"}."""
    return _tau(drafted, drafted.reached * drafted.accepted, seed)


def expected_tau(drafted: DraftTokens, seed: int) -> dict:
    """The same if every path were accepted as often as its probability says; no acceptance is looked at."""
    return _tau(drafted, drafted.path, seed)


def predicted_tau(drafted: DraftTokens, at: Float[np.ndarray, " G"], seed: int) -> dict:
    """The same by ATC, if the paths from the `thresholds` on are those that are accepted; no acceptance is looked at."""
    return _tau(drafted, (drafted.path >= at[drafted.depth - 1]).astype(float), seed)


def _tau(drafted: DraftTokens, through: Float[np.ndarray, " n"], seed: int) -> dict:
    """1 and the draft tokens a step that are accepted with all before them, which is `through` of each."""
    one = np.zeros(len(through), int)
    accepted, steps = _by_prompt(drafted, through, one, 1), _by_prompt(drafted, (drafted.depth == 1).astype(float), one, 1)
    return with_interval("tau", 1 + float(accepted.sum() / steps.sum()), 1 + resample_ratios(accepted, steps, seed)[:, 0])


def _by_prompt(
    drafted: DraftTokens, values: Float[np.ndarray, " n"], column: Int[np.ndarray, " n"], columns: int
) -> Float[np.ndarray, "prompts columns"]:
    """Sums of values, a row a prompt that has entries."""
    prompts, row = np.unique(drafted.prompt, return_inverse=True)
    table = np.zeros((len(prompts), columns))
    np.add.at(table, (row, column), values)
    return table
