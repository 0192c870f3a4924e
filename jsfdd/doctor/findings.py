"""The doctor's findings, a sample with its loss mask, and their output on a terminal.

A finding's name never changes, so that scripts can use it; everything else is for people.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.text import Text

from jsfdd.base.records import Sample
from jsfdd.base.text import printable

Severity = Literal["ok", "note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning", "error")  # mildest first
_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
_SUPERVISED = "black on green"
_SHOWN_TOKENS = 240


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
      name: stable, kebab-case.
      severity: ok: as it should be; note: worth knowing, or could not be examined; warning: acceptance may suffer, or
        the check cannot be trusted; error: served acceptance will differ from what was trained.
      seen: plain sentences.
      remedy: what to do; empty where nothing is to be done.
      figures: JSON-ready, what `seen` is based on.
    """

    name: str
    severity: Severity
    seen: str
    remedy: str = ""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of a sample's text, all of whose tokens are supervised, or none."""

    text: str
    supervised: bool


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All findings, in the order of the checks, and one sample to look at."""

    findings: tuple[Finding, ...]
    sample_id: str
    spans: tuple[Span, ...]

    @property
    def worst(self) -> Severity:
        """The highest severity found."""
        return max((finding.severity for finding in self.findings), key=SEVERITIES.index, default="ok")

    def to_json(self) -> dict:
        """What doctor.json holds, apart from the config."""
        return {
            "worst": self.worst,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "sample": {"id": self.sample_id, "spans": [dataclasses.asdict(span) for span in self.spans]},
        }


def supervised_spans(sample: Sample, tokenizer) -> tuple[Span, ...]:
    """The first tokens of a sample as text, cut where the loss mask changes; decoded together, so that no character breaks."""
    mask = sample.assistant_mask[:_SHOWN_TOKENS]
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    spans = [Span(tokenizer.decode(sample.tokens[a:b]), bool(mask[a])) for a, b in zip(edges, edges[1:])]
    left = len(sample.tokens) - len(mask)
    return (*spans, Span(f" … ({left} more tokens)", False)) if left else tuple(spans)


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """The sample, the findings, one line each with its remedy below, and the verdict."""
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    how = "coloured" if coloured else "in ⟦ ⟧"
    sample = printable(diagnosis.sample_id)
    console.print(f"sample {sample}; the tokens that are trained on are {how}:\n", markup=False, soft_wrap=True)
    console.print(_marked(diagnosis.spans, coloured), soft_wrap=True)
    console.print()
    width = max(len(severity) for severity in SEVERITIES)
    for finding in diagnosis.findings:
        line = Text(finding.severity.ljust(width), style=_STYLES[finding.severity])
        line.append(f"  {finding.name}: {printable(finding.seen)}", style="not bold default")
        console.print(line, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{' ' * width}  → {printable(finding.remedy)}"), soft_wrap=True)
    counts = ((s, sum(finding.severity == s for finding in diagnosis.findings)) for s in reversed(SEVERITIES))
    console.print("\n" + ", ".join(f"{n} {severity}" for severity, n in counts if n), markup=False, soft_wrap=True)


def spread_over(items: Sequence, count: int) -> list:
    """Up to `count` of the items, evenly spaced, the first included."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _marked(spans: Sequence[Span], coloured: bool) -> Text:
    text = Text()
    for span in spans:
        words = printable(span.text)
        if coloured:
            text.append(words, style=_SUPERVISED if span.supervised else "")
        else:
            text.append(f"⟦{words}⟧" if span.supervised else words)
    return text
