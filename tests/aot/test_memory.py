"""`plan` computes from shapes what the compiler says that a stage takes of a device's memory, to a tenth: SmolLM2's shape."""

import numpy as np
import pytest

from jsfdd.commands import costs
from jsfdd.commands.ahead import lower_decode, lower_hidden, lower_score, lower_train, read_program, topology_mesh
from jsfdd.commands.costs import Lengths
from jsfdd.data.batches import Shape
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.draft import draft_config
from jsfdd.training.recipe import Recipe

SMOLLM2 = DecoderConfig(
    family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
    head_dim=64, max_position=8192, rms_norm_eps=1e-5, rope=Rope(1e5), tie_embeddings=True,
)  # fmt: skip
READ, TRAINED, RECIPE, NEW_TOKENS = Shape(2, 2048), Shape(1, 2048), Recipe(compute_dtype="bfloat16"), 128
LENGTHS = Lengths(np.full(16, 2048), np.full(16, 1000), "")  # two rows of each of eight devices


def estimate(stage: str) -> costs.Stage:
    slots = READ.length + NEW_TOKENS
    return {
        "score": lambda: costs.score_stage(SMOLLM2, LENGTHS, 4096, 2, 1, "tpu"),
        "hidden states": lambda: costs.hidden_stage(SMOLLM2, LENGTHS, 4096, 1.0, RECIPE, 2, 1, "tpu"),
        "train": lambda: costs.train_stage(SMOLLM2, LENGTHS, 4096, 1.0, RECIPE, 2, 1, 8, "tpu"),
        "evaluate": lambda: costs.evaluate_stage(SMOLLM2, RECIPE, slots, 8, 2, 1, 8, "tpu"),
    }[stage]()


def lowered(stage: str, mesh):
    setup = DecodeSetup(
        target=SMOLLM2, drafts=(draft_config(SMOLLM2),), num_draft_tokens=4, max_new_tokens=NEW_TOKENS, stop_tokens=(2,)
    )
    return {
        "score": lambda: lower_score(SMOLLM2, mesh, READ),
        "hidden states": lambda: lower_hidden(SMOLLM2, mesh, READ),
        "train": lambda: lower_train(SMOLLM2, mesh, TRAINED, RECIPE),
        "evaluate": lambda: lower_decode(setup, mesh, Shape(1, READ.length)),
    }[stage]()


@pytest.mark.parametrize("stage", ["score", "hidden states", "train", "evaluate"])
def test_memory_of_a_stage(stage):
    assert costs.largest_shape(SMOLLM2, LENGTHS, 4096) == READ
    program, expected = read_program(lowered(stage, topology_mesh("v5e:2x4"))), estimate(stage)
    assert expected.program == pytest.approx(program.peak, rel=0.1), (expected.memory, program)
