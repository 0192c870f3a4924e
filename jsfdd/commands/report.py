"""`jsfdd report`: draw a run as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from jsfdd.commands.options import OptionalPath
from jsfdd.commands.outcome import Outcome, described

EXAMPLES = """
jsfdd report demo-run
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw one self-contained HTML page from a run's artifacts."""

    run: tyro.conf.Positional[Path]
    """Directory of `jsfdd run` or `jsfdd demo`."""
    out: OptionalPath = None
    """File to write. Default: report.html in the run's directory."""


def prepare(config: ReportConfig) -> None:
    """Nothing to prepare: `run` reads and checks the run's files before it writes."""


def run(config: ReportConfig, _: None) -> Outcome:
    from jsfdd.report.report import write_report

    page = write_report(config.run, config.out)
    return Outcome({"command": "report", "report": page}, str(page))


def describe(config: ReportConfig, _: None) -> Outcome:
    from jsfdd.report.run_files import read_run

    read_run(config.run)
    page = config.out or config.run / "report.html"
    return described("report", {"would_write": [str(page)]}, [f"write {page}"])
