"""Damage and malice for files: bytes changed, cut and repeated, and JSON whose values are of the wrong kind or size."""

from __future__ import annotations

import copy
import json
import random

DEEP = json.loads("[" * 400 + "]" * 400)
HOSTILE = (
    None, True, "", "\x1b[31mred", "\ud800", "../../etc/passwd", "{{ 1 / 0 }}", [], {}, ["a"], {"a": 1}, DEEP, 0, -1, 1.5,
    2**31, 2**63, 10**400, float("nan"), float("inf"), "9" * 5000,
)  # fmt: skip


def mutated(data: bytes, seed: int) -> bytes:
    """The data with one to three changes; a pure function of both."""
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(_WAYS)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    changed, place = bytearray(data), rng.randrange(len(data))
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _splice(data: bytes, rng: random.Random) -> bytes:
    """A slice put, again, somewhere else."""
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:c] + data[a:b] + data[c:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice((b"\0", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"NaN", b"\x1b]0;x\x07")) + data[place:]


def _value(data: bytes, rng: random.Random) -> bytes:
    """One value of a JSON file, or of one line of it, put in place by a hostile one, or a key left out."""
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    for text, rebuilt in ((data, None), (lines[number], number)):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        changed = json.dumps(_changed(value, rng)).encode()
        if rebuilt is None:
            return changed
        return b"\n".join([*lines[:number], changed, *lines[number + 1 :]])
    return _flip(data, rng)


def _changed(value, rng: random.Random):
    value = copy.deepcopy(value)
    holder, place, here = None, None, value
    while isinstance(here, dict | list) and here and (holder is None or rng.random() < 0.8):
        holder, place = here, rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        here = here[place]
    if holder is None:
        return rng.choice(HOSTILE)
    if rng.random() < 0.2:
        del holder[place]
    else:
        holder[place] = rng.choice(HOSTILE)
    return value


_WAYS = (_flip, _flip, _cut, _splice, _insert, _value, _value, _value, _value)
