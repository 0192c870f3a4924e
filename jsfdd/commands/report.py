"""`jsfdd report`: one self-contained HTML page of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jsfdd.commands.options import _Options
from jsfdd.commands.outcome import Outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig(_Options):
    """Draw one self-contained HTML page from a run's artifacts."""

    run: Path
    """Directory of `jsfdd run` or `jsfdd demo`."""
    out: Path | None = None
    """Where to write the page; report.html in the run's directory unless given."""


def prepare(config: ReportConfig) -> None:
    """Nothing: `run` reads the run's files and checks them before it writes."""


def run(config: ReportConfig, _: None) -> Outcome:
    from jsfdd.report.report import write_report

    page = write_report(config.run, config.out)
    return Outcome({"command": "report", "report": page}, str(page))
