"""The held-out samples: they are used to judge a draft, and never to train it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from jsfdd.base.records import Sample

_SALT = "jsfdd held out: "


def split_held_out(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Split samples into (for training, held out): about `share` of them are held out, chosen by a hash of their ids.

    A sample's side does not depend on other samples. So all selections from the same data are judged on the same samples, on
    which none of them was trained.
    """

    def is_held_out(sample: Sample) -> bool:
        digest = hashlib.sha256((_SALT + sample.id).encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    sides = [is_held_out(sample) for sample in samples]
    train = [sample for sample, out in zip(samples, sides, strict=True) if not out]
    return train, [sample for sample, out in zip(samples, sides, strict=True) if out]
