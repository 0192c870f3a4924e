"""Mixtures: so much of each source in what is trained on, as TAPS mixes its drafts' data (arXiv 2603.27027, section 3).

    mixed = mixture(samples, {"chat": 0.5, "math": 0.5}, unit="samples", total=2000, seed=0)

All mixtures of the same samples, weights, unit and seed are beginnings of one sequence, so a larger one contains a smaller
one, and two drafts that differ in how much they saw differ in nothing else. Each source is in an order of its own, by a hash;
a sample's place in the sequence is where its middle lies in that order, in units of the source's weight. (For samples this
is Sainte-Laguë's rule of apportionment, whose seats never fall when the house grows.) So in every beginning each source is
within half a sample of its share.
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
    """The samples of a mixture, in the order of `samples`; which they are does not depend on that order.

    Args:
      samples: what may be taken, each once.
      weights: source -> its share, up to a common factor; above 0. Samples of other sources are left out.
      unit: what the shares are of: samples, or the tokens that count.
      total: how many of the unit to take; of tokens as many as do not exceed it. None: as many as keep the shares.
      seed: decides which samples of a source come first.

    Raises:
      ValueError: no sample is of a source that is named, there are not enough for `total`, or `total` holds none.
    """
    known = Counter(sample.source for sample in samples)
    if unknown := sorted(weights.keys() - known.keys()):
        names = ", ".join(f"{source} ({count:,})" for source, count in sorted(known.items()))
        raise ValueError(f"--mix: no sample to train on is of source {unknown[0]!r}; choose from {names}")
    queues = {source: _queue(samples, source, weight, unit, seed) for source, weight in weights.items()}
    # Where the smallest next sample of a source would stand, if it had one more.
    available = {source: sum(placed.size for placed in queue) for source, queue in queues.items()}
    limit, scarce = min(((available[source] + 0.5) / weight, source) for source, weight in weights.items())
    sequence = sorted(itertools.chain.from_iterable(queues.values()), key=lambda placed: placed[:2])
    sequence = [placed for placed in sequence if placed.place < limit]
    until = np.cumsum([placed.size for placed in sequence])
    if total is not None and total > until[-1]:
        share = weights[scarce] / sum(weights.values())
        raise ValueError(
            f"--mix-total {total}: without repeating any the mixture has at most {until[-1]} {unit}, for {scarce} is to be "
            f"{share:.3g} of it and has {available[scarce]} to train on; take --mix-total {until[-1]} or less, give {scarce} a "
            "smaller weight, or add data of it"
        )
    if total is not None and total < until[0]:
        raise ValueError(f"--mix-total {total}: the mixture's first sample alone has {until[0]} {unit}; take more")
    taken = {placed.id for placed, end in zip(sequence, until) if total is None or end <= total}
    return [sample for sample in samples if sample.id in taken]


def contents(samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """By source, in the order of their names: {"samples", "counted_tokens"}."""
    found = {source: {"samples": 0, "counted_tokens": 0} for source in sorted({sample.source for sample in samples})}
    for sample in samples:
        found[sample.source]["samples"] += 1
        found[sample.source]["counted_tokens"] += int(sample.counted.sum())
    return found


def in_words(found: Mapping[str, Mapping[str, int]]) -> str:
    """What `contents` found, for a person."""
    each = (f"{own['samples']:,} of {source} ({own['counted_tokens']:,} counted tokens)" for source, own in found.items())
    return f"samples: {', '.join(each)}"


def _queue(samples: Sequence[Sample], source: str, weight: float, unit: MixUnit, seed: int) -> list[_Placed]:
    """One source's samples in their order, each with its place in the sequence of all."""
    own = sorted((sample for sample in samples if sample.source == source), key=lambda sample: _rank(sample, seed))
    sizes = [int(sample.counted.sum()) if unit == "tokens" else 1 for sample in own]
    ends = itertools.accumulate(sizes)
    return [_Placed((end - size / 2) / weight, source, size, each.id) for each, size, end in zip(own, sizes, ends)]


def _rank(sample: Sample, seed: int) -> bytes:
    return hashlib.sha256(f"jsfdd mixture: {seed}: {sample.id}".encode()).digest()
