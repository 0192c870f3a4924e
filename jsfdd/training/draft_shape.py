"""The shape of the draft that a recipe trains."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence

from jsfdd.base.records import Sample
from jsfdd.models.architecture import DecoderConfig, Eagle3Norm
from jsfdd.models.draft import DraftConfig, draft_config
from jsfdd.selection.vocabulary import covering_tokens, frequent_tokens
from jsfdd.training.recipe import Recipe

EAGLE3_NORMS: tuple[str, ...] = tuple(sorted(typing.get_args(Eagle3Norm)))


def draft_of(target: DecoderConfig, recipe: Recipe, samples: Sequence[Sample], init: DraftConfig | None = None) -> DraftConfig:
    """The shape of the draft that `recipe` trains; a reduced vocabulary has the most frequent tokens of `samples`.

    Args:
      init: the shape of the draft from which training starts; it stays as it is.

    Raises:
      ValueError: the recipe asks for more tokens than the target has, or for another draft than `init`; or an EAGLE-3 draft
        cannot be of this target.
    """
    if recipe.hass_top_k_weight and recipe.hass_top_k > target.vocab_size:
        raise ValueError(f"hass_top_k: {recipe.hass_top_k} exceeds the target's vocabulary of {target.vocab_size}")
    if init is not None:
        return _as_asked(init, recipe)
    vocabulary = ()
    if recipe.draft_vocab >= 1:
        vocabulary = frequent_tokens(samples, int(recipe.draft_vocab), target.vocab_size)
    elif recipe.draft_vocab:
        vocabulary = covering_tokens(samples, recipe.draft_vocab, target.vocab_size)
    draft = draft_config(target, recipe.fc_bias, vocabulary, recipe.draft_kind, recipe.target_layers)
    return dataclasses.replace(draft, **dict.fromkeys(recipe.eagle3_norms, True))


def _as_asked(init: DraftConfig, recipe: Recipe) -> DraftConfig:
    """`init`, if the recipe asks for no other draft. What the recipe leaves open is the draft's own."""
    size = len(init.vocabulary)
    norms = tuple(name for name in EAGLE3_NORMS if getattr(init, name))
    for option, wanted, actual in (
        ("--draft-kind", recipe.draft_kind, init.kind),
        ("--draft-vocab", recipe.draft_vocab or size, size),
        ("target_layers", recipe.target_layers or init.target_layers, init.target_layers),
        ("eagle3_norms", tuple(sorted(recipe.eagle3_norms)) or norms, norms),
        ("fc_bias", recipe.fc_bias or init.fc_bias, init.fc_bias),
    ):
        if wanted != actual:
            raise ValueError(f"{option}: {wanted!r} is asked for, and the draft to start from (--init) has {actual!r}")
    if init.vocabulary and recipe.stored_soft_targets(hidden_is_stored=True) is None:
        raise ValueError("the draft to start from (--init) has a vocabulary of its own, which is trained on --soft-targets")
    return init
