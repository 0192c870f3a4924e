"""Mixtures: a given share of each source in the training data, as TAPS mixes data for its drafts (arXiv 2603.27027, section 3).

    mixed = mixture(samples, {"chat": 0.5, "math": 0.5}, unit="samples", total=2000, seed=0)

All mixtures of the same samples, weights, unit and seed are prefixes of one sequence. A larger mixture therefore contains
every smaller one, so drafts trained on more or less data differ in nothing else. A hash orders the samples of each source; a
sample's place in the sequence is the position of its middle in that order, divided by the source's weight. In every prefix,
each source is then within half a sample of its share. (With unit="samples" this is Sainte-Laguë's apportionment, which never
takes a seat away when the house grows.)
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jsfdd.base.records import Sample

MixUnit = Literal["samples", "tokens"]


class _Placed(NamedTuple):
    place: float
    source: str
    size: int
    id: str


def mixture(
    samples: Sequence[Sample], weights: Mapping[str, float], unit: MixUnit, total: int | None, seed: int
) -> list[Sample]:
    """Choose the samples of a mixture. The choice does not depend on the order of `samples`, which the result keeps.

    Args:
      samples: the candidates; each is taken at most once.
      weights: source -> share, up to a common factor; above 0. Samples of other sources are left out.
      unit: what the shares count: samples or counted tokens.
      total: the number of samples, or the largest number of tokens. None: as many as keep the shares.
      seed: decides which samples of a source come first.

    Raises:
      ValueError: a source in `weights` has no sample, or `total` is more than there is or less than the first sample.
    """
    sizes = Counter(sample.source for sample in samples)
    if unknown := sorted(weights.keys() - sizes.keys()):
        names = ", ".join(f"{source} ({count:,})" for source, count in sorted(sizes.items()))
        raise ValueError(f"--mix: no sample to train on is of source {unknown[0]!r}; choose from {names}")
    by_source: dict[str, list[Sample]] = {source: [] for source in sizes}
    for sample in samples:
        by_source[sample.source].append(sample)
    queues = {source: _queue(by_source[source], weight, unit, seed) for source, weight in weights.items()}
    # The sequence ends where the first source runs out: at the place that its next sample would have.
    available = {source: sum(placed.size for placed in queue) for source, queue in queues.items()}
    limit, scarce = min(((available[source] + 0.5) / weight, source) for source, weight in weights.items())
    sequence = sorted(itertools.chain.from_iterable(queues.values()), key=lambda placed: placed[:2])
    sequence = [placed for placed in sequence if placed.place < limit]
    until = np.cumsum([placed.size for placed in sequence])
    if total is not None and total > until[-1]:
        share = weights[scarce] / sum(weights.values())
        raise ValueError(
            f"--mix-total {total}: without repeating any, the mixture has at most {until[-1]} {unit}: {scarce} is to be "
            f"{share:.3g} of it and has {available[scarce]} to train on; take --mix-total {until[-1]} or less, give {scarce} a "
            "smaller weight, or add data of it"
        )
    if total is not None and total < until[0]:
        raise ValueError(f"--mix-total {total}: the mixture's first sample alone has {until[0]} {unit}; take more")
    taken = {placed.id for placed, end in zip(sequence, until) if total is None or end <= total}
    return [sample for sample in samples if sample.id in taken]


def contents(samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """{source: {"samples", "counted_tokens"}}, in the order of the sources' names."""
    counts = {source: {"samples": 0, "counted_tokens": 0} for source in sorted({sample.source for sample in samples})}
    for sample in samples:
        counts[sample.source]["samples"] += 1
        counts[sample.source]["counted_tokens"] += int(sample.counted.sum())
    return counts


def in_words(counts: Mapping[str, Mapping[str, int]]) -> str:
    """The counts of `contents` as a sentence."""
    parts = [f"{count['samples']:,} of {name} ({count['counted_tokens']:,} counted tokens)" for name, count in counts.items()]
    return f"samples: {', '.join(parts)}"


def _queue(samples: Sequence[Sample], weight: float, unit: MixUnit, seed: int) -> list[_Placed]:
    """The samples of one source in the order of their hashes, with their places in the sequence."""
    ordered = sorted(samples, key=lambda sample: _rank(sample, seed))
    sizes = [int(sample.counted.sum()) if unit == "tokens" else 1 for sample in ordered]
    ends = itertools.accumulate(sizes)
    return [
        _Placed((end - size / 2) / weight, sample.source, size, sample.id) for sample, size, end in zip(ordered, sizes, ends)
    ]


def _rank(sample: Sample, seed: int) -> bytes:
    return hashlib.sha256(f"jsfdd mixture: {seed}: {sample.id}".encode()).digest()
