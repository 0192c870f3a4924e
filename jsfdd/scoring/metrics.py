"""The metrics of a sample, by name."""

from __future__ import annotations

from typing import Literal

Metric = Literal["flatness", "flatness_median", "entropy", "top1", "margin", "energy", "ppl", "random"]
