"""The shape of the draft that a recipe trains."""

from __future__ import annotations

from collections.abc import Sequence

from jsfdd.base.records import Sample
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import DraftConfig, draft_config
from jsfdd.selection.vocabulary import frequent_tokens
from jsfdd.training.recipe import Recipe


def draft_of(target: DecoderConfig, recipe: Recipe, samples: Sequence[Sample]) -> DraftConfig:
    """The shape of the draft that `recipe` trains; a reduced vocabulary has the most frequent tokens of `samples`.

    Raises:
      ValueError: the recipe asks for more tokens than the target has.
    """
    if recipe.hass_top_k_weight and recipe.hass_top_k > target.vocab_size:
        raise ValueError(f"hass_top_k: {recipe.hass_top_k} exceeds the target's vocabulary of {target.vocab_size}")
    if recipe.soft_targets == "top_k" and recipe.soft_top_k > target.vocab_size:
        raise ValueError(f"--soft-top-k: {recipe.soft_top_k} exceeds the target's vocabulary of {target.vocab_size}")
    vocabulary = frequent_tokens(samples, recipe.draft_vocab, target.vocab_size) if recipe.draft_vocab else ()
    return draft_config(target, recipe.fc_bias, vocabulary)
