"""Bootstrap intervals: how much a figure would vary over other prompts of the same kind.

Prompts are resampled, not steps, because the steps of one answer are not independent. Ratios of totals (τ, α, tokens/s) are
recomputed on every resample, so long answers weigh as much as they do in the headline figure.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Num

RESAMPLES = 2000


def resample_times(rows: int, seed: int) -> Float[np.ndarray, "R N"]:
    """How often each of N rows occurs in each of RESAMPLES resamples. With these counts, a total is a matrix product."""
    draws = np.random.default_rng(seed).integers(0, rows, (RESAMPLES, rows))
    times = np.zeros((RESAMPLES, rows))
    np.add.at(times, (np.arange(RESAMPLES)[:, None], draws), 1)
    return times


def resample_ratios(
    numerators: Num[np.ndarray, "N K"], denominators: Num[np.ndarray, "N K"], seed: int
) -> Float[np.ndarray, "R K"]:
    """Ratios of column totals, float64[RESAMPLES, K], over rows drawn with replacement.

    The same seed and N draw the same rows, so two systems that were measured on the same prompts are compared in pairs.
    0/0 is NaN: the figure does not exist on that resample.
    """
    times = resample_times(len(numerators), seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (times @ numerators) / (times @ denominators)


def interval(values: Float[np.ndarray, " R"]) -> tuple[float, float] | tuple[None, None]:
    """The central 95% of resampled values; (None, None) if the figure exists on none of the resamples."""
    values = values[~np.isnan(values)]
    return tuple(float(bound) for bound in np.percentile(values, [2.5, 97.5])) if len(values) else (None, None)


def tau_difference(
    emitted_a: Num[np.ndarray, " N"],
    steps_a: Num[np.ndarray, " N"],
    emitted_b: Num[np.ndarray, " N"],
    steps_b: Num[np.ndarray, " N"],
    seed: int,
) -> dict:
    """τ_a − τ_b over the same prompts in the same order, with its paired 95% interval: {"tau_difference", "low", "high"}.

    All three are None where one of the two never verified anything.
    """
    if not (steps_a.sum() and steps_b.sum()):
        return {"tau_difference": None, "low": None, "high": None}
    a = resample_ratios(emitted_a[:, None], steps_a[:, None], seed)
    b = resample_ratios(emitted_b[:, None], steps_b[:, None], seed)
    low, high = interval((a - b)[:, 0])
    difference = emitted_a.sum() / steps_a.sum() - emitted_b.sum() / steps_b.sum()
    return {"tau_difference": float(difference), "low": low, "high": high}
