"""What `plan` computes from shapes of SmolLM2's stages, for the batches that `programs.py` compiles."""

import numpy as np
from programs import EAGLE, NEW_TOKENS, READ, SMOLLM2

from jsfdd.commands import costs
from jsfdd.commands.costs import Lengths

LENGTHS = Lengths(np.full(16, 2048), np.full(16, 1000), "")  # two rows of each of eight devices


def planned_bytes(name: str) -> float | None:
    """Bytes of one of eight devices; None of a program that is not SmolLM2's."""
    assert costs.largest_shape(SMOLLM2, LENGTHS, 4096, "tpu") == READ
    stages = {
        "SmolLM2 score": lambda: costs.score_stage(SMOLLM2, LENGTHS, 4096, 2, 1, "tpu"),
        "SmolLM2 hidden states": lambda: costs.hidden_stage(SMOLLM2, LENGTHS, 4096, 1.0, EAGLE, 2, 1, "tpu"),
        "SmolLM2 train": lambda: costs.train_stage(SMOLLM2, LENGTHS, 4096, 1.0, EAGLE, 2, 1, 8, "tpu"),
        "SmolLM2 evaluate": lambda: costs.evaluate_stage(SMOLLM2, EAGLE, READ.length + NEW_TOKENS, 8, 2, 1, 8, "tpu"),
    }
    return stages[name]().program if name in stages else None
