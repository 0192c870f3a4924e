"""What a scoring pass has finished: parts on disk that survive an interruption, and tables that no part holds yet.

part-00000.parquet    the scores of some batches
given.parquet         scores that did not come from the pass, but with the answers (`decoding/kept.py`)

parts = Parts(out / "scores.parts", identity)
if parts.lack(batch):
    parts.add(table)                                   # on disk within `seconds`
table = parts.whole([sample.id for sample in samples])
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import jax

from jsfdd.base.files import differences, plain
from jsfdd.base.processes import agree, several, wait_until_seen
from jsfdd.base.records import Sample
from jsfdd.scoring.table import ScoreTable, join, read_scores, write_part

GIVEN = "given.parquet"


class Parts:
    """Scores by batch, of this call and of the earlier ones that a directory remembers.

    Args:
      directory: where the parts are, each process writing its own; None keeps everything in memory.
      identity: JSON-ready: what the scores depend on.
      seconds: about how much work an interruption may lose.

    Raises:
      ValueError: the directory holds parts of another identity.
    """

    def __init__(self, directory: Path | None, identity: dict, seconds: float = 20.0):
        self._directory, self._identity, self._seconds = directory, identity, seconds
        self._written = {} if directory is None else _read(directory, identity)
        self._given = None if directory is None else _read_one(directory / GIVEN, identity)
        self._scored = {name for part in self.tables for name in part.ids}
        self._fresh: list[ScoreTable] = []
        self._last_write = time.monotonic()
        agree({"the scores that an earlier call left": sorted(self._scored)})  # nobody writes before all have read

    @property
    def tables(self) -> list[ScoreTable]:
        """The parts on disk, and what was given."""
        return [*([] if self._given is None else [self._given]), *self._written.values()]

    @property
    def given(self) -> frozenset[str]:
        """The samples whose scores were given."""
        return frozenset() if self._given is None else frozenset(self._given.ids)

    def lack(self, samples: Sequence[Sample]) -> bool:
        """Whether an earlier call left no score of any of these samples."""
        return not self._scored.issuperset(sample.id for sample in samples)

    def add(self, table: ScoreTable) -> None:
        """Take in the scores of a batch, and write a part if it is time."""
        self._fresh.append(table)
        if time.monotonic() - self._last_write >= self._seconds:
            self.save()

    def whole(self, ids: Sequence[str]) -> ScoreTable:
        """The scores of all samples, in this order, once every batch was added. Several processes wait for the last of them."""
        self.save()
        if several():
            wait_until_seen(_path(self._directory, number) for number in self._written)
            self._written = _read(self._directory, self._identity)
        return join([*self.tables, *self._fresh], ids)

    def save(self) -> None:
        """Write what no part holds yet."""
        if self._directory is None or not self._fresh:
            return
        # Process i of n uses numbers congruent to i modulo n, so no two processes use the same.
        number = max(self._written, default=-1) + 1
        number += (jax.process_index() - number) % jax.process_count()
        self._written[number] = join(self._fresh, [name for table in self._fresh for name in table.ids])
        write_part(_path(self._directory, number), self._written[number])
        self._fresh, self._last_write = [], time.monotonic()


def _path(directory: Path, number: int) -> Path:
    return directory / f"part-{number:05d}.parquet"


def _read(directory: Path, identity: dict) -> dict[int, ScoreTable]:
    """The parts of earlier calls, by number."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = {}
    for path in sorted(directory.glob("part-*.parquet")):
        parts[int(path.stem.removeprefix("part-"))] = _read_one(path, identity)
    return parts


def _read_one(path: Path, identity: dict) -> ScoreTable | None:
    """A part, or None if there is no such file."""
    if not path.exists():
        return None
    part = read_scores(path, prompt_states=True)
    _check_same(path, part.identity, identity)
    return part


def check_parts(directory: Path, known: dict) -> None:
    """Check, before the weights are loaded, that a directory holds no parts of other inputs or options.

    Args:
      directory: of the parts; need not exist.
      known: the part of their identity that is known by now, JSON-ready.

    Raises:
      ValueError: it does; names what changed.
    """
    for path in sorted(directory.glob("*.parquet"))[:1]:  # all parts are of one run
        saved = read_scores(path).identity
        _check_same(path, {name: saved.get(name) for name in known}, plain(known))


def _check_same(path: Path, saved: dict, present: dict) -> None:
    if changed := differences(saved, present):
        raise ValueError(f"{path}: scores of another run ({changed}); delete {path.parent} or choose another --out")
