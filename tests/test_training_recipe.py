"""A recipe checks its own values, and is light enough for a command line's help."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jsfdd.training.recipe import PYTHON_ONLY, Recipe


@pytest.mark.parametrize("values, message", [
    (dict(epochs=0), "--epochs: got 0, but it must be 1 or more"),
    (dict(learning_rate=0.0), "--learning-rate: got 0.0"),
    (dict(draft_steps=9), "--draft-steps: got 9, but it must be from 1 to 8"),
    (dict(warmup_share=1.0), "warmup_share: got 1.0"),
    (dict(soft_targets="means", token_loss="hybrid"), "take top_k"),
    (dict(soft_targets="top_k", soft_top_k=4, hass_top_k_weight=1.0), "hass_top_k: 10 exceeds soft_top_k 4"),
    (dict(soft_targets="none", draft_vocab=8), "--draft-vocab trains on soft targets"),
    (dict(token_loss="hybrid", draft_vocab=8), "--draft-vocab trains on soft targets"),
])  # fmt: skip
def test_what_no_training_can_have_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**values)


@pytest.mark.parametrize("values, where_stored, elsewhere", [
    (dict(), "means", None),
    (dict(token_loss="hybrid"), None, None),
    (dict(soft_targets="means"), "means", "means"),
    (dict(soft_targets="top_k", token_loss="hybrid"), "top_k", "top_k"),
    (dict(soft_targets="none"), None, None),
])  # fmt: skip
def test_auto_stores_means_where_hidden_states_are_stored(values, where_stored, elsewhere):
    recipe = Recipe(**values)
    assert recipe.stored_soft_targets(hidden_is_stored=True) == where_stored
    assert recipe.stored_soft_targets(hidden_is_stored=False) == elsewhere


def test_fields_for_python_alone_are_fields():
    assert set(PYTHON_ONLY) < {field.name for field in dataclasses.fields(Recipe)}


def test_a_recipe_brings_neither_jax_nor_what_reads_files():
    heavy = {"jax", "flax", "pyarrow", "transformers", "tyro"}
    code = f"import sys, jsfdd.training.recipe; print(sorted({heavy} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("name, value", [("epochs", 1.5), ("draft_steps", 2.0), ("accumulate", True)])
def test_whole_numbers_are_whole(name, value):
    with pytest.raises(ValueError, match="must be a whole number"):
        Recipe(**{name: value})
