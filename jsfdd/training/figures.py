"""What a run knows of its steps, as means per token: the figures of a line in metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from jsfdd.base.mesh import to_host
from jsfdd.base.records import Sample
from jsfdd.training.loss import LossSums
from jsfdd.training.schedule import Step
from jsfdd.training.step import StepMetrics

_STEPS_AHEAD = 2


class RecentSteps:
    """Steps since the last line; until `take` their figures stay on the devices, so that no step waits for them."""

    def __init__(self, samples: Sequence[Sample]):
        self._samples = samples
        self._steps: list[tuple[Step, StepMetrics]] = []

    def add(self, step: Step, metrics: StepMetrics) -> None:
        """Remember what a step reported."""
        self._steps.append((step, metrics))
        if len(self._steps) > _STEPS_AHEAD:  # otherwise batches would pile up on the devices for as long as no one looks
            jax.block_until_ready(self._steps[-_STEPS_AHEAD][1])

    def to_json(self) -> list:
        """The steps that `take` has not returned yet, for a run that goes on later. Errors as in `take`."""
        return [
            {
                "step": step.number,
                "total": float(metrics.sums.total),
                "steps": [{name: float(value) for name, value in sums.items()} for sums in metrics.sums.steps],
                "grad_norm": float(metrics.grad_norm),
            }
            for (step, _), metrics in zip(self._steps, self._fetched(), strict=True)
        ]

    def go_on(self, earlier: Sequence[dict], steps: Sequence[Step]) -> None:
        """Take in what `to_json` gave of an earlier call; `steps` are all of the run."""
        for values in earlier:
            sums = LossSums(np.float32(values["total"]), tuple(_float32(step) for step in values["steps"]))
            self._steps.append((steps[values["step"] - 1], StepMetrics(sums, np.float32(values["grad_norm"]))))

    def take(self) -> tuple[list[Step], dict]:
        """The steps and their mean figures; forgets both.

        Raises:
          FloatingPointError: a loss or gradient is not finite; names the step and the samples of its batches.
        """
        steps, fetched = [step for step, _ in self._steps], self._fetched()
        self._steps = []
        grad_norm = float(np.mean([metrics.grad_norm for metrics in fetched], dtype=np.float64))
        return steps, {**mean_figures([metrics.sums for metrics in fetched]), "grad_norm": grad_norm}

    def _fetched(self) -> list[StepMetrics]:
        fetched = to_host([metrics for _, metrics in self._steps])
        for step, metrics in zip((step for step, _ in self._steps), fetched, strict=True):
            if not (math.isfinite(metrics.sums.total) and math.isfinite(metrics.grad_norm)):
                ids = ", ".join(self._samples[i].id for plan in step.plans for i in plan.indices)
                raise FloatingPointError(
                    f"step {step.number}: loss {float(metrics.sums.total)}, gradient norm {float(metrics.grad_norm)}; look at "
                    f"the hidden states of its samples ({ids}), or lower --learning-rate"
                )
        return fetched


def mean_figures(batches: Sequence[LossSums]) -> dict[str, float | list[float]]:
    """Means per counted token over several batches' sums (host scalars); all 0 if no token counts.

    `loss` is what is minimised, over all draft steps. The others are of the first step: `hidden_loss` (SmoothL1),
    `token_loss` (the distance, with HASS's top-k loss), and what the batch's soft targets allow of `kl`, `agreement`,
    `acceptance` and `coverage` (the table in `visited_loss.py`). With several draft steps `agreement_by_step` and
    `acceptance_by_step` are lists: each step's mean over the tokens that it counts.
    """
    if not batches:
        return {}
    count = max(_total(sums.counted for sums in batches), 1.0)
    by_step = [_step_figures(sums) for sums in zip(*(sums.steps for sums in batches), strict=True)]
    figures = {"loss": _total(sums.total for sums in batches) / count, **by_step[0]}
    if len(by_step) > 1:
        names = [name for name in ("agreement", "acceptance") if name in figures]
        figures |= {f"{name}_by_step": [step[name] for step in by_step] for name in names}
    return figures


def _step_figures(batches: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One draft step's means over several batches' sums."""
    count = max(_total(sums["counted"] for sums in batches), 1.0)
    mean = {name: _total(sums[name] for sums in batches) / count for name in batches[0]}
    figures = {"hidden_loss": mean["hidden_loss"]} if "hidden_loss" in mean else {}
    figures["token_loss"] = mean["distance"]
    if "cross_entropy" in mean:
        figures["kl"] = mean["cross_entropy"] - mean["target_entropy"]
    return figures | {name: mean[name] for name in ("agreement", "acceptance", "coverage") if name in mean}


def _float32(sums: Mapping[str, float]) -> dict[str, np.float32]:
    return {name: np.float32(value) for name, value in sums.items()}


def _total(values: Iterable[float]) -> float:
    return math.fsum(float(value) for value in values)
