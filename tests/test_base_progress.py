"""Progress: plain lines without a terminal, one now and then; a bar with one; nothing where none is wanted."""

import io
import re

import pytest
from rich.console import Console

from jsfdd.base import progress as module
from jsfdd.base.compiling import Spans
from jsfdd.base.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved: `clock[0] += 1`."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def _console(monkeypatch, **options):
    stream = io.StringIO()
    monkeypatch.setattr(module, "console", Console(**dict(file=stream, width=100, highlight=False, markup=False) | options))
    return stream


def test_a_slow_stage_says_a_line_every_ten_seconds(monkeypatch, clock):
    stream = _console(monkeypatch)
    with progress("score", "batches", 1000) as bar:
        for done in range(1, 61):
            clock[0] += 1
            bar.update(done, figures=f"{done} tokens/s")
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/1,000" for n in (10, 20, 30, 40, 50, 60)]
    assert lines[1] == "score: 20/1,000 batches (2%), 1.0 batches/s, 20 tokens/s, 16 min 20 s left"


def test_a_quick_stage_says_a_line_every_tenth_and_the_last(monkeypatch, clock):
    stream = _console(monkeypatch)
    with progress("train", "steps", 40) as bar:
        for done in range(1, 41):
            clock[0] += 0.5
            bar.update(done)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [f"{n}/40" for n in range(4, 41, 4)]
    assert stream.getvalue().splitlines()[-1] == "train: 40/40 steps (100%), 2.0 steps/s, done in 20 s"


def test_what_is_done_in_no_time_says_one_line(monkeypatch, clock):
    stream = _console(monkeypatch)
    with progress("decode", "batches") as bar:
        for done in range(1, 31):
            bar.update(done, 30)
    assert stream.getvalue().splitlines() == ["decode: 30/30 batches (100%), done in 0 s"]


def test_a_continued_stage_counts_its_rate_from_where_it_starts(monkeypatch, clock):
    stream = _console(monkeypatch)
    with progress("train", "steps", 1000, finished=900) as bar:
        clock[0] += 20
        bar.update(904)
    assert stream.getvalue() == "train: 904/1,000 steps (90%), 5.0 s each, 8 min 00 s left\n"


def test_a_terminal_gets_a_bar_and_no_colour_none(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for no_color, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        stream = _console(monkeypatch, force_terminal=True, width=60)
        with progress("score", "batches", 3) as bar:
            bar.update(3, figures="9 tokens/s")
        assert "━" in stream.getvalue() and "9 tokens/s" in stream.getvalue()
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
        assert max(map(len, re.split(r"[\r\n]", shown))) <= 60
        assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", stream.getvalue())) == coloured
    monkeypatch.setenv("TERM", "dumb")
    stream = _console(monkeypatch, force_terminal=True)
    with progress("score", "batches", 1) as bar:
        bar.update(1)
    assert stream.getvalue().startswith("score: 1/1 batches (100%)")


def test_nothing_is_shown_where_none_is_wanted(monkeypatch):
    for terminal in (True, False):
        stream = _console(monkeypatch, force_terminal=terminal)
        with progress("score", "batches", 3, shown=False) as bar:
            bar.update(3)
        assert stream.getvalue() == ""


def test_compiling_is_not_in_the_pace(monkeypatch, clock):
    stream = _console(monkeypatch)
    compiled = [0.0]
    monkeypatch.setattr(module, "compile_seconds", lambda: compiled[0])
    with progress("score", "batches", 100) as bar:
        clock[0], compiled[0] = clock[0] + 30, 25.0
        bar.update(5)
    assert stream.getvalue() == "score: 5/100 batches (5%), 1.0 batches/s, 1 min 35 s left\n"


def test_spans_within_others_count_once():
    spans = Spans()
    for end, seconds in ((1.0, 0.5), (3.0, 0.5), (4.0, 0.25), (5.0, 3.0)):  # the second and third lie in the last
        spans.add(end, seconds)
    assert spans.total == 3.5
