"""What training reads of the target, kept in stores or computed: hidden states and soft targets. `train` and `run` share it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsfdd.commands.inputs import Inputs, Loaded, imported_states
from jsfdd.commands.options import HiddenOptions, option_of
from jsfdd.commands.score import HIDDEN

if TYPE_CHECKING:
    from jsfdd.base.records import Sample
    from jsfdd.commands.train import TrainConfig
    from jsfdd.hidden.store import HiddenStore
    from jsfdd.models.architecture import DecoderConfig
    from jsfdd.models.draft import Draft, DraftConfig
    from jsfdd.selection.sfdd import Selection
    from jsfdd.training.batch import HiddenStates, TrainingData
    from jsfdd.training.recipe import Recipe

SOFT_TARGETS = "soft_targets"  # folder in --out


def layers_of(config: TrainConfig, inputs: Inputs | Loaded, init: Draft | None) -> tuple[int, ...]:
    """The target's layers whose inputs the draft reads."""
    from jsfdd.models.draft import layers_read

    if init is not None:
        return init.config.target_layers
    return layers_read(inputs.target.config, config.recipe.draft_kind, config.recipe.target_layers)


def hidden_states_of(config: TrainConfig, loaded: Loaded, samples: Sequence[Sample], init: Draft | None = None) -> HiddenStates:
    """The hidden states of `samples`: read from --hidden-from, computed at each step, or computed once and stored.

    Raises:
      FileNotFoundError: --hidden-from does not exist.
      ValueError: --hidden-from is not a store, or lacks some of the samples.
    """
    from jsfdd.hidden import capture
    from jsfdd.selection.sfdd import read_selection

    if loaded.states is not None:
        return imported_states(loaded, config.hidden.hidden_dtype, layers_of(config, loaded, init))
    if config.hidden_from is not None:
        selection = None if config.selection is None else read_selection(config.selection)
        return open_hidden(config, samples, selection, layers_of(config, loaded, init), loaded.identity)
    target, dtype, layers = loaded.target, config.hidden.hidden_dtype, layers_of(config, loaded, init)
    if config.hidden.no_hidden_store:
        return capture.make_recompute(target, loaded.mesh, dtype, layers)
    return capture.store_hidden(
        target,
        samples,
        loaded.mesh,
        batch_tokens=config.chats.batch_tokens,
        directory=config.out / HIDDEN,
        identity=loaded.identity,
        dtype=dtype,
        layers=layers,
    )


def open_hidden(
    config: TrainConfig,
    samples: Sequence[Sample],
    selection: Selection | None,
    layers: tuple[int, ...],
    identity: dict | None = None,
) -> HiddenStore:
    """Open the store in --hidden-from, and check that it has all `samples` in --hidden-dtype and the inputs of `layers`, and
    that it belongs to `identity` if that is given (it needs the target's weights)."""
    from jsfdd.hidden.store import HiddenStore

    directory, dtype = config.hidden_from, config.hidden.hidden_dtype
    if not directory.is_dir():
        raise FileNotFoundError(
            f"--hidden-from {directory}: no such directory; give one that `jsfdd score --keep-hidden` wrote, or leave the "
            "option out"
        )
    store = HiddenStore.open(directory, identity)
    if store.dtype != dtype:
        raise ValueError(f"{directory}: holds {store.dtype}; give --hidden-dtype {store.dtype}, or keep hidden states again")
    if layers and store.layers != layers:
        held = f"the inputs of layers {', '.join(map(str, store.layers))}" if store.layers else "no layer's inputs"
        raise ValueError(
            f"{directory}: holds {held}, and the draft reads those of {', '.join(map(str, layers))}; keep hidden states again "
            "with `jsfdd score --draft-kind eagle3 --keep-hidden …`, or leave --hidden-from out"
        )
    missing = [sample.id for sample in samples if sample.id not in store]
    if missing:
        wanted = {"held_out_share": config.recipe.held_out_share}
        if selection is not None:
            wanted = {name: getattr(selection, name) for name in ("metric", "retain_ratio", "within", "seed")} | wanted
        raise ValueError(
            f"{directory}: lacks {len(missing)} of {len(samples)} samples, {missing[0]} the first. Wanted: {_typed(wanted)}; "
            f"kept for: {_typed(store.kept_for or {'selection': 'of an earlier run'})}. Select and hold out what it was kept "
            "for, leave --hidden-from out, or score again with other --keep-hidden and another --out"
        )
    return store


def _typed(options: dict) -> str:
    """Options as a user types them."""
    texts = {name: " ".join(value) if isinstance(value, list) else value for name, value in options.items()}
    return " ".join(f"{option_of(name)} {text}" for name, text in texts.items() if text is not None)


def soft_targets_of(
    recipe: Recipe,
    hidden: HiddenOptions,
    loaded: Loaded,
    data: TrainingData,
    draft: DraftConfig,
    batch_tokens: int,
    out: Path,
) -> HiddenStore | None:
    """Store the recipe's soft targets of the tokens that `data` trains on in `out`/soft_targets; None if it stores none."""
    from jsfdd.models.sharding import split_vocabulary
    from jsfdd.training.loss import borrow
    from jsfdd.training.soft_store import store_soft_targets

    kind = recipe.stored_soft_targets(not hidden.no_hidden_store)
    if kind is None:
        return None
    target, mesh = loaded.target, loaded.mesh
    return store_soft_targets(
        kind,
        data,
        split_vocabulary(borrow(target.config, target.params), mesh),
        draft,
        recipe,
        mesh,
        batch_tokens=batch_tokens,
        directory=out / SOFT_TARGETS,
        identity=loaded.identity | {"hidden_dtype": hidden.hidden_dtype},
    )


def check_vocabulary(recipe: Recipe, hidden: HiddenOptions) -> None:
    """Raise ValueError if --draft-vocab is set and no soft targets are stored."""
    if recipe.draft_vocab and not recipe.stored_soft_targets(not hidden.no_hidden_store):
        raise ValueError(
            "--draft-vocab trains on soft targets: take --soft-targets means and cross_entropy, or --soft-targets top_k"
        )


def describe_soft_targets(
    recipe: Recipe, hidden: HiddenOptions, inputs: Inputs, samples: Sequence[Sample]
) -> tuple[int, list[str]]:
    """Describe the soft targets to store, for at most these samples: (bytes, words)."""
    tokens, kind = sum(len(sample.tokens) for sample in samples), recipe.stored_soft_targets(not hidden.no_hidden_store)
    size = soft_target_bytes(recipe, not hidden.no_hidden_store, inputs.target.config, tokens)
    content = f"the target's {recipe.soft_top_k} likeliest tokens" if kind == "top_k" else "target means"
    return size, [f"store at most {size / 1e6:,.1f} MB of {content}"] if size else []


def soft_target_bytes(recipe: Recipe, hidden_is_stored: bool, target: DecoderConfig, tokens: float) -> int:
    """Bytes on disk of the soft targets of `tokens` tokens."""
    from jsfdd.hidden.rows import row_bytes
    from jsfdd.training.soft_rows import row_words

    kind = recipe.stored_soft_targets(hidden_is_stored)
    if kind is None:
        return 0
    if kind == "top_k":
        # Of a vocabulary that covers a share of the answers the size is not known yet.
        size = int(recipe.draft_vocab) if recipe.draft_vocab >= 1 or not recipe.draft_vocab else target.vocab_size
        return round(
            tokens * row_bytes("uint16", row_words(recipe.likeliest(size or target.vocab_size), target.vocab_size, size))
        )
    return round(tokens * row_bytes("bfloat16", target.hidden_size + 1))
