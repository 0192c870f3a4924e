"""Which hidden states the stages keep, and where training takes them from, as the options say."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from jsfdd.base.records import Sample
from jsfdd.commands.configs import RunConfig, ScoreConfig, TrainConfig
from jsfdd.commands.inputs import Loaded
from jsfdd.hidden import capture as features
from jsfdd.hidden.best_k import StillPossible
from jsfdd.hidden.capture import FeatureKeeper
from jsfdd.hidden.store import HiddenStore
from jsfdd.models.sharding import split_vocabulary
from jsfdd.selection.sfdd import Selection
from jsfdd.training.batch import HiddenStates, TrainingData
from jsfdd.training.loss import borrow
from jsfdd.training.soft_means import store_means
from jsfdd.training.soft_top_k import store_top_k
from jsfdd.training.step import block_size
from jsfdd.training.token_loss import Distance
from jsfdd.training.train import draft_of, split_held_out

STORE, RECOMPUTE = "store", "recompute"  # values of --features
FOLDER, MEANS, TOP_K = "hidden", "means", "top_k"  # in a stage's --out


def scoring_of_run(config: RunConfig) -> ScoreConfig:
    """The scoring stage of a run: it keeps features of all that an arm can select, where that is known while scoring.

    Every arm's samples are among those of `full`. A batch of four samples has no score before all four have one, so what
    --unit batch may keep is not known in time; those hidden states are computed after the selection.
    """
    keep = ("full",) if "full" in config.arms else config.arms if config.unit == "sample" else ()
    if config.features == RECOMPUTE:
        keep = ()
    return ScoreConfig.taken_from(config, per_token=True, keep_features=keep)


def still_possible(config: ScoreConfig, samples: Sequence[Sample]) -> StillPossible:
    """What the arms of --keep-features may select, before anything is scored."""
    _, held_out = split_held_out(samples, config.held_out_share)
    always = {sample.id for sample in held_out}
    if "full" in config.keep_features:
        always |= {sample.id for sample in samples if sample.counted.any()}
    metrics = [arm for arm in config.keep_features if arm != "full"]
    return StillPossible(samples, metrics, config.retain_ratio, config.seed, always, config.within)


def keeper(config: ScoreConfig, loaded: Loaded) -> AbstractContextManager[FeatureKeeper]:
    """Of the features that --keep-features asks for, into `out`/hidden."""
    names = ("keep_features", "retain_ratio", "within", "seed", "held_out_share")
    return features.keep_features(
        loaded.target.config,
        still_possible(config, loaded.samples),
        directory=config.out / FOLDER,
        identity=loaded.identity,
        kept_for={name: getattr(config, name) for name in names},
        dtype=config.feature_dtype,
    )


def for_training(config: TrainConfig, loaded: Loaded, samples: Sequence[Sample], selection: Selection | None) -> HiddenStates:
    """The hidden states of `samples`, from where --features says.

    Raises FileNotFoundError or ValueError for a directory that is no store, or not one of these samples.
    """
    target = loaded.target
    if config.features == RECOMPUTE:
        return features.make_recompute(target.config, target.params, loaded.mesh, config.feature_dtype)
    if config.features == STORE:
        return features.store_hidden(
            target.config,
            target.params,
            samples,
            loaded.mesh,
            batch_tokens=config.batch_tokens,
            directory=config.out / FOLDER,
            identity=loaded.identity,
            dtype=config.feature_dtype,
        )
    return open_features(config, loaded.identity, samples, selection)


def open_features(
    config: TrainConfig, identity: dict | None, samples: Sequence[Sample], selection: Selection | None
) -> HiddenStore:
    """The store in the directory that --features names, after a look whether it has all of `samples` in --feature-dtype."""
    directory = Path(config.features)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"--features {directory}: no such directory; give one that `jsfdd score --keep-features` wrote, or {STORE} or "
            f"{RECOMPUTE}"
        )
    store = HiddenStore.open(directory, identity)
    if store.dtype != config.feature_dtype:
        raise ValueError(f"{directory}: holds {store.dtype}; give --feature-dtype {store.dtype}, or keep features again")
    missing = [sample.id for sample in samples if sample.id not in store]
    if missing:
        wanted = {"held_out_share": config.held_out_share}
        if selection is not None:
            names = ("metric", "retain_ratio", "within", "seed", "unit")
            wanted = {name: getattr(selection, name) for name in names} | wanted
        raise ValueError(
            f"{directory}: lacks {len(missing)} of {len(samples)} samples, {missing[0]} the first. Wanted: {_options(wanted)}; "
            f"kept for: {_options(store.kept_for or {'selection': 'of an earlier run'})}. Select and hold out what it was kept "
            f"for, compute the features with --features {STORE}, or score again with other --keep-features and another --out"
        )
    return store


def _options(values: dict) -> str:
    """As one would type them."""
    shown = {name: " ".join(value) if isinstance(value, list) else value for name, value in values.items()}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in shown.items() if value is not None)


def known_for_training(config: TrainConfig | RunConfig, loaded: Loaded, data: TrainingData) -> HiddenStore:
    """Of the target's distributions, where `data` weighs them: likeliest tokens in `out`/top_k or means in `out`/means."""
    target, mesh = loaded.target, loaded.mesh
    frozen = split_vocabulary(borrow(target.config, target.params), mesh)
    shared = dict(
        block=block_size(mesh),
        batch_tokens=config.batch_tokens,
        identity=loaded.identity | {"feature_dtype": config.feature_dtype},
        vocabulary=draft_of(target.config, config, data.samples).vocabulary,
    )
    if config.target_top_k:
        return store_top_k(data, frozen, config.target_top_k, mesh, directory=config.out / TOP_K, **shared)
    return store_means(data, frozen, Distance.of(config), mesh, directory=config.out / MEANS, **shared)
