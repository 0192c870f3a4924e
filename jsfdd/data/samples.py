"""A sequence of samples on disk, whose memory does not grow with the number of tokens.

    writer = SampleWriter()
    writer.append(sample)                    # one after the other, or with `extend` several
    samples = writer.finish()                # samples[i], len(samples), samples.lengths

Tokens and masks lie in temporary files, which vanish with the process; what is kept for each sample is its id, its source and
where its tokens begin. A `Sample` is made when it is asked for, its arrays being views of the mapped files.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from jsfdd.base.disk import writing
from jsfdd.base.records import Sample

_CHUNK = 4096  # the number of ids that become one Arrow array


class SampleTable(Sequence[Sample]):
    """What `SampleWriter.finish` gives: a sequence of samples, read-only."""

    def __init__(self, ids: _Texts, sources: Sequence[int], names: Sequence[str], starts, tokens, mask):
        self._ids, self._sources, self._names = ids, sources, names
        self._starts, self._tokens, self._mask = starts, tokens, mask

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each sample."""
        return np.diff(self._starts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # as in a list: negative numbers count from the end, IndexError beyond it
        part = slice(self._starts[index], self._starts[index + 1])
        return Sample(self._ids[index], self._names[self._sources[index]], self._tokens[part], self._mask[part])

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


class SampleWriter:
    """Takes samples one after the other."""

    def __init__(self):
        self._tokens, self._mask = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self._ids = _Texts()
        self._names: dict[str, int] = {}
        self._sources = array("i")
        self._starts = array("q", [0])

    def append(self, sample: Sample) -> None:
        self.extend([sample.id], [sample.source], [len(sample.tokens)], sample.tokens, sample.assistant_mask)

    def extend(
        self,
        ids: Sequence[str],
        sources: Sequence[str],
        lengths: Sequence[int],
        tokens: Int[np.ndarray, " T"],
        masks: Bool[np.ndarray, " T"],
    ) -> None:
        """Append samples; `tokens` and `masks` are those of all, one after the other."""
        self._ids.extend(ids)
        self._sources.extend(self._names.setdefault(source, len(self._names)) for source in sources)
        self._starts.frombytes((self._starts[-1] + np.cumsum(lengths, dtype=np.int64)).tobytes())
        with writing(tempfile.gettempdir(), 5 * len(tokens)):
            self._tokens.write(np.ascontiguousarray(tokens, np.int32))
            self._mask.write(np.ascontiguousarray(masks, bool))

    def finish(self) -> SampleTable:
        """The samples so far; nothing can be appended afterwards."""
        self._ids.finish()
        starts = np.frombuffer(self._starts, np.int64)
        with writing(tempfile.gettempdir()):
            self._tokens.flush()
            self._mask.flush()
        tokens, mask = _mapped(self._tokens, np.int32), _mapped(self._mask, np.bool_)
        return SampleTable(self._ids, self._sources, list(self._names), starts, tokens, mask)


class _Texts:
    """Strings in Arrow arrays of one length: a few bytes more than the text for each, where a str takes fifty."""

    def __init__(self):
        self._chunks: list[pa.Array] = []
        self._open: list[str] = []

    def extend(self, texts: Sequence[str]) -> None:
        self._open += texts
        while len(self._open) >= _CHUNK:
            self._chunks.append(pa.array(self._open[:_CHUNK], pa.string()))
            del self._open[:_CHUNK]

    def finish(self) -> None:
        self._chunks.append(pa.array(self._open, pa.string()))
        self._open = []

    def __getitem__(self, index: int) -> str:
        return self._chunks[index // _CHUNK][index % _CHUNK].as_py()


def _mapped(file, dtype) -> np.ndarray:
    if not file.tell():  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(file, dtype, mode="r"))
