"""Acceptance counts, and the figures that a report derives from them (`evaluate.py` defines τ and α)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Num

from jsfdd.evaluation.intervals import interval, resample_ratios


class AcceptanceCounts(NamedTuple):
    """`records.DecodeStats` per prompt, summed over its turns: integers from decoding, expectations from `replay.py`."""

    accept_counts: Num[np.ndarray, "N G1"]
    reached: Num[np.ndarray, "N G"]
    accepted: Num[np.ndarray, "N G"]

    @property
    def steps(self) -> Num[np.ndarray, " N"]:
        """Target verifications."""
        return self.accept_counts.sum(axis=1)

    @property
    def emitted(self) -> Num[np.ndarray, " N"]:
        """Tokens that those verifications emitted."""
        return self.accept_counts @ np.arange(1, self.accept_counts.shape[1] + 1)


def no_counts(num_prompts: int, depth: int, dtype: type = np.int64) -> AcceptanceCounts:
    """Zero counts, for drafts that propose up to `depth` tokens in a row."""
    return AcceptanceCounts(*(np.zeros((num_prompts, columns), dtype) for columns in (depth + 1, depth, depth)))


def acceptance_figures(counts: AcceptanceCounts, rows: Bool[np.ndarray, " N"], seed: int) -> dict:
    """All acceptance figures of a report over the prompts in `rows`, with 95% intervals over prompts."""
    emitted, steps = counts.emitted[rows], counts.steps[rows]
    reached, accepted = counts.reached[rows], counts.accepted[rows]
    # A prompt whose answer ended with its first token had no verification, so it has no τ.
    verified = steps > 0
    per_prompt = emitted[verified] / steps[verified]
    once = np.ones((len(per_prompt), 1))
    tau = resample_ratios(emitted[:, None], steps[:, None], seed)[:, 0]
    tau_macro = resample_ratios(per_prompt[:, None], once, seed)[:, 0] if len(per_prompt) else np.array([np.nan])
    alpha = resample_ratios(accepted, reached, seed)
    depths = range(reached.shape[1])
    return {
        **with_interval("tau", _share(emitted.sum(), steps.sum()), tau),
        **with_interval("tau_macro", float(per_prompt.mean()) if len(per_prompt) else None, tau_macro),
        "l": float(emitted.sum() / steps.sum() - 1) if steps.sum() else None,
        "alpha": [_share(accepted[:, i].sum(), reached[:, i].sum()) for i in depths],
        "alpha_low": [interval(alpha[:, i])[0] for i in depths],
        "alpha_high": [interval(alpha[:, i])[1] for i in depths],
        "accept_counts": counts.accept_counts[rows].sum(axis=0).tolist(),
        "n_prompts": int(rows.sum()),
        "n_steps": steps.sum().item(),
    }


def with_interval(name: str, value: float | None, resampled: Num[np.ndarray, " R"]) -> dict:
    """A figure and the bounds of its 95% interval, under the names that a report uses."""
    low, high = interval(resampled)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _share(part, whole) -> float | None:
    return float(part / whole) if whole else None
