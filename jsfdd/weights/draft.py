"""Load a draft from an export or a training run's directory, and check that it fits a target."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jsfdd.models.draft import Draft, DraftConfig, check_layers
from jsfdd.weights.checkpoint import read_trained_draft
from jsfdd.weights.eagle import is_exported, read_draft
from jsfdd.weights.target import Target


def load_draft(path: str | Path, num_layers: int | None = None) -> Draft:
    """Load the draft in a directory.

    Args:
      path: a directory from `jsfdd export` or another project. Or the `--out` of `jsfdd train`: the draft with the best τ if
        the run probed, else the last one. Or the checkpoints/ in it: always the last draft. Or "smollm2", if
        there is no such directory: the draft of the demo's model that comes with jsfdd (experiments/031_packaged_draft).
      num_layers: the target's, for an EAGLE-3 draft from another project whose files do not name the layers that it reads.

    Raises:
      FileNotFoundError: there is no draft, or only pickled weights, which are never read.
      ValueError: the files are damaged, or this version does not support them; the message names the reason.
    """
    if str(path) == "smollm2" and not Path(path).is_dir():
        path = Path(str(files("jsfdd.data.demo"))) / "smollm2-draft"
    return read_draft(path, num_layers) if is_exported(path) else read_trained_draft(path)


def check_draft(target: Target, draft: DraftConfig, name: str) -> None:
    """Raise ValueError, naming the difference, if a draft cannot belong to this target.

    The rotary embedding of an EAGLE-3 draft is not compared: many were trained with another one than their target's.
    """
    check_layers(draft.target_layers, target.config.num_layers)
    for field in ("vocab_size", "hidden_size", *(["rope"] if draft.kind == "eagle" else [])):
        value, wanted = getattr(draft.decoder, field), getattr(target.config, field)
        if value != wanted:
            raise ValueError(
                f"draft {name}: {field} is {value}, but the target {target.name} has {wanted}; give the target that the draft "
                "was trained for"
            )
