"""A draft from wherever it is, exported for an engine or in the directory of a training run; and whose draft it can be."""

from __future__ import annotations

from pathlib import Path

from jsfdd.models.draft import Draft, DraftConfig, check_layers
from jsfdd.weights.checkpoint import read_trained_draft
from jsfdd.weights.eagle import is_exported, read_draft
from jsfdd.weights.target import Target


def load_draft(path: str | Path, num_layers: int | None = None) -> Draft:
    """The draft in a directory.

    Args:
      path: what `jsfdd export` or a peer wrote; or the `--out` of `jsfdd train`, of which the draft that decoded best is read
        where the run looked, and the last one elsewhere; or the checkpoints/ in it, for the last one.
      num_layers: the target's, for a peer's EAGLE-3 draft whose files do not say which of them it reads.

    Raises:
      FileNotFoundError: nothing is there, or only pickled weights, which are never read.
      ValueError: the files are damaged, or hold what this version does not compute; the message names it.
    """
    return read_draft(path, num_layers) if is_exported(path) else read_trained_draft(path)


def check_draft(target: Target, draft: DraftConfig, name: str) -> None:
    """Raise ValueError where a draft cannot be of this target, naming what differs.

    An EAGLE-3 draft turns its own keys by its own angles, and many were trained with other ones than their target's.
    """
    check_layers(draft.target_layers, target.config.num_layers)
    for field in ("vocab_size", "hidden_size", *(["rope"] if draft.kind == "eagle" else [])):
        found, wanted = getattr(draft.decoder, field), getattr(target.config, field)
        if found != wanted:
            raise ValueError(
                f"draft {name}: {field} is {found}, but the target {target.name} has {wanted}; give the target that the draft "
                "was trained for"
            )
