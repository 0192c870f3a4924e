"""Progress on stderr: on a terminal a bar with rate and remaining time, elsewhere an occasional plain line.

    with progress("score", "batches", total=40) as bar:
        bar.update(1, figures="1,234 tokens/s")

NO_COLOR removes the colours, TERM=dumb the bar.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jsfdd.base.compiling import compile_seconds
from jsfdd.base.numbers import duration
from jsfdd.base.text import printable


class _Stderr(Console):
    """Shows plain text alone."""

    def print(self, *objects, **options) -> None:
        super().print(*(printable(text) if isinstance(text, str) else text for text in objects), **options)


console = _Stderr(stderr=True, highlight=False, markup=False)

# Without a terminal, a line is due after `_LINE_SECONDS`; or after `_SHARE_SECONDS`, if `_LINE_SHARE` of the work was done.
_LINE_SECONDS, _LINE_SHARE, _SHARE_SECONDS = 10.0, 0.1, 1.0


class Bar:
    """The progress of one stage; `progress` makes it."""

    def __init__(self, label: str, unit: str, total: int | None, finished: int, bar: Progress | None, lines: bool = True):
        self._label, self._unit, self._total, self._bar, self._lines = label, unit, total, bar, lines
        self._first, self._done, self._figures = finished, finished, ""
        self._started = self._shown_at = time.monotonic()
        self._compiled = compile_seconds()
        self._shown_done = finished
        self._task = None if bar is None else bar.add_task(label, total=total, completed=finished, unit=unit, figures="")

    def update(self, done: int, total: int | None = None, figures: str | None = None) -> None:
        """Show how many units are done in all. `total` and `figures` keep their previous values if None."""
        self._done, self._total = done, total or self._total
        self._figures = self._figures if figures is None else figures
        if self._bar is not None:
            shown = ", ".join(filter(None, (self._rate(), self._figures)))
            self._bar.update(self._task, completed=done, total=self._total, figures=shown)
        elif self._lines and self._line_is_due():
            self._shown_at, self._shown_done = time.monotonic(), done
            console.print(self._line(), soft_wrap=True)

    def _line_is_due(self) -> bool:
        waited, total = time.monotonic() - self._shown_at, self._total or 0
        if self._done == total:
            return self._shown_done != total
        return waited >= _LINE_SECONDS or waited >= _SHARE_SECONDS and self._done - self._shown_done >= _LINE_SHARE * total

    def _rate(self) -> str:
        """Units per second since this call began, or seconds per unit below one; compiling is not in it."""
        seconds, done = self._worked(), self._done - self._first
        if not done or not seconds:
            return ""
        rate = done / seconds
        return f"{rate:,.1f} {self._unit}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"

    def _worked(self) -> float:
        """Seconds since this call began, without compiling, which the units to come need not wait for again."""
        return time.monotonic() - self._started - (compile_seconds() - self._compiled)

    def _line(self) -> str:
        done, total = self._done - self._first, self._total or 0
        left = ""
        if done and total > self._done:
            left = f"{duration(self._worked() / done * (total - self._done))} left"
        elif total == self._done:
            left = f"done in {duration(time.monotonic() - self._started)}"
        count = f"{self._label}: {self._done:,}/{total:,} {self._unit} ({self._done / max(total, 1):.0%})"
        return ", ".join(filter(None, (count, self._rate(), self._figures, left)))


@contextlib.contextmanager
def progress(label: str, unit: str, total: int | None = None, *, finished: int = 0, shown: bool = True) -> Iterator[Bar]:
    """Show the progress of a stage.

    Args:
      label: the stage's name.
      unit: what is counted, in the plural.
      total: units in all, if known.
      finished: how many an earlier call did.
      shown: False shows nothing.
    """
    if not shown:
        yield Bar(label, unit, total, finished, None, lines=False)
    elif console.is_terminal and not console.is_dumb_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            yield Bar(label, unit, total, finished, bar)
    else:
        yield Bar(label, unit, total, finished, None)
