"""The held-out side of the data: samples on which a draft is judged and never trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from jsfdd.base.records import Sample

_SALT = "jsfdd held out: "


def split_held_out(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """(for training, held out): about `share` of the samples are held out, by a hash of their ids alone.

    A sample's side does not depend on the others, so every selection from the same data is judged on the same samples,
    none of which it was trained on.
    """

    def is_held_out(sample: Sample) -> bool:
        digest = hashlib.sha256((_SALT + sample.id).encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    sides = [is_held_out(sample) for sample in samples]
    train = [sample for sample, out in zip(samples, sides, strict=True) if not out]
    return train, [sample for sample, out in zip(samples, sides, strict=True) if out]
