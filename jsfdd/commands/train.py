"""`jsfdd train`: a draft learns on the selected samples.

    checkpoints/      the draft, its optimizer and what it was trained on
    metrics.jsonl     a line every --log-every steps
    timings.jsonl     seconds of the same steps
    hidden/           the target's hidden states of the samples, unless they are read from elsewhere or not stored
    soft_targets/     what is stored of the target's distributions
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.commands.inputs import Inputs, Loaded, load, read_inputs
from jsfdd.commands.options import (
    DataOptions,
    FeatureFormat,
    MixOptions,
    ProbeOptions,
    ProcessOptions,
    Seeded,
    TargetOptions,
    TrainingOptions,
)
from jsfdd.commands.outcome import Outcome, counts_to_json, many, planned
from jsfdd.commands.score import HIDDEN, counted_tokens, describe_hidden

if TYPE_CHECKING:
    from jsfdd.base.records import Sample
    from jsfdd.commands.run import RunConfig
    from jsfdd.hidden.store import HiddenStore
    from jsfdd.selection.sfdd import Selection
    from jsfdd.training.batch import HiddenStates, PerToken, TrainingData
    from jsfdd.training.recipe import Recipe
    from jsfdd.training.train import Probe, TrainResult

STORE, RECOMPUTE = "store", "recompute"  # values of --features
SOFT_TARGETS = "soft_targets"  # folder in --out
RECOMPUTED = "compute the hidden states of each batch at every step; store none"
_PROBE_DEPTH = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(
    TargetOptions, DataOptions, MixOptions, TrainingOptions, FeatureFormat, ProbeOptions, Seeded, ProcessOptions
):
    """Train an EAGLE draft on the selected samples."""

    out: Path
    """Directory for checkpoints/ and metrics.jsonl; an interrupted run continues here."""
    selection: Path | None = None
    """selection.json, as `jsfdd select` wrote it; without it every sample is used."""
    shard_optimizer: bool = False
    """Keep Adam's moments in parts, one on each data shard, instead of whole on every device. Costs an exchange a step."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard's scalars, to OUT/tensorboard; needs `pip install 'jsfdd[tensorboard]'`."""
    features: str = "store"
    """Hidden states: `store` computes them first and keeps them in OUT/hidden; `recompute` lets the target compute each batch's
    anew in every epoch and needs no disk; or a directory that `jsfdd score --keep-features` wrote."""
    token_scores: Path | None = None
    """token_scores.parquet, as `jsfdd score --per-token` wrote it; needed where tokens are selected or weighted."""

    def __post_init__(self):
        super().__post_init__()
        check_features(self)
        if self.weighs_tokens != (self.token_scores is not None):
            raise ValueError(
                "--token-retain-ratio below 1 and --token-weighting soft need --token-scores, which `jsfdd score --per-token` "
                "writes, and nothing else reads it"
            )


class Prepared(NamedTuple):
    """The inputs, the selection (None: all samples), and what is trained on and held out of them."""

    inputs: Inputs
    selection: Selection | None
    kept: list[Sample]
    held_out: list[Sample]


def prepare(config: TrainConfig) -> Prepared:
    from jsfdd.data.chat import read_prompts
    from jsfdd.selection.sfdd import read_selection
    from jsfdd.training.draft_shape import draft_of

    if config.probe_prompts:
        read_prompts(config.probe_prompts)
    inputs = read_inputs(config)
    selection = None if config.selection is None else read_selection(config.selection)
    kept, held_out = training_sides(inputs.samples, selection, config)
    draft_of(inputs.target.config, config, kept)  # whose errors need no weights
    if config.features not in (STORE, RECOMPUTE):
        open_features(config, None, [*kept, *held_out], selection)  # of which target is only known with the weights
    return Prepared(inputs, selection, kept, held_out)


def run(config: TrainConfig, prepared: Prepared) -> Outcome:
    result = train(config, load(config, prepared.inputs))
    names = ("steps", "samples", "tokens", "seconds", "held_out")
    values = {"command": "train"} | {name: getattr(result, name) for name in names}
    values |= {"draft": config.out, "files": counts_to_json(prepared.inputs.files)}
    return Outcome(values, f"{result.steps} steps on {result.samples} samples in {result.seconds:.0f} s: {config.out}")


def describe(config: TrainConfig, prepared: Prepared) -> Outcome:
    inputs, _, kept, held_out = prepared
    values, words = describe_training(config, inputs, kept, held_out)
    files = ["checkpoints/", "metrics.jsonl", "timings.jsonl"]
    values["hidden_bytes"] = 0
    if config.features == STORE:
        tokens = sum(len(sample.tokens) for sample in (*kept, *held_out))
        values["hidden_bytes"], said = describe_hidden(config, inputs, tokens)
        words.append(f"store {said}")
        files.insert(0, f"{HIDDEN}/")
    elif config.features == RECOMPUTE:
        words.append(RECOMPUTED)
    else:
        words.append(f"read hidden states from {config.features}")
    values["soft_target_bytes"], said = describe_soft_targets(config, inputs, kept)
    words += said
    files[:0] = [f"{SOFT_TARGETS}/"] if values["soft_target_bytes"] else []
    return planned("train", values, words, config.out, files, continues=config.out / "checkpoints")


def train(
    config: TrainConfig,
    loaded: Loaded | None = None,
    store: HiddenStates | None = None,
    soft_targets: PerToken | None = None,
) -> TrainResult:
    """Write checkpoints/ and metrics.jsonl; returns what happened.

    Without a `store` hidden states come from where `config.features` says; without `soft_targets` those that the config asks
    for are computed first and kept in `out`.
    """
    from jsfdd.base.processes import agree, agree_on_directory, is_primary
    from jsfdd.base.progress import console
    from jsfdd.selection.mixture import contents, in_words
    from jsfdd.selection.sfdd import read_selection
    from jsfdd.training import train as training
    from jsfdd.training.batch import TrainingData
    from jsfdd.training.draft_shape import draft_of

    loaded = loaded or load(config)
    agree_on_directory(config.out)
    selection = None if config.selection is None else read_selection(config.selection)
    kept, held_out = training_sides(loaded.samples, selection, config)
    agree({"the selection": [sample.id for sample in kept]})
    if config.mix and is_primary():
        console.print(f"mixture of {in_words(contents(kept))}", soft_wrap=True)
    draft_of(loaded.target.config, config, kept)  # refuses what the target's vocabulary cannot give, before any work
    if store is None:
        store = hidden_for_training(config, loaded, [*kept, *held_out], selection)
    data = TrainingData(kept, store, soft_targets, _token_weights(config, kept))
    if soft_targets is None:
        data = data._replace(soft_targets=soft_targets_for_training(config, loaded, data))
    return training.train(
        loaded.target,
        data,
        TrainingData(held_out, store),
        recipe_of(config),
        loaded.mesh,
        out=config.out,
        seed=config.seed,
        identity=loaded.identity
        | {"feature_dtype": config.feature_dtype}
        | _mix_identity(config, kept)
        | _probe_identity(config),
        shapes=loaded.shapes,
        probe=_make_probe(config, loaded, kept) if config.probe_prompts else None,
        probe_every=config.probe_every,
        shard_optimizer=config.shard_optimizer,
        tensorboard=config.tensorboard,
    )


def recipe_of(config: TrainConfig | RunConfig) -> Recipe:
    """The recipe among a config's options."""
    from jsfdd.training.recipe import Recipe

    return Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})


def training_sides(
    samples: Sequence[Sample], selection: Selection | None, config: TrainConfig | RunConfig
) -> tuple[list[Sample], list[Sample]]:
    """(samples to train on, held-out samples): the mixture of the training side's selected ones, the whole held-out side."""
    from jsfdd.data.held_out import split_held_out
    from jsfdd.selection.mixture import mixture
    from jsfdd.selection.sfdd import selected_samples

    _, held_out = split_held_out(samples, config.held_out_share)
    out = {sample.id for sample in held_out}
    kept = samples if selection is None else selected_samples(selection, samples)
    kept = [sample for sample in kept if sample.id not in out]
    if config.mix:
        kept = mixture(kept, config.mix_shares, config.mix_unit, config.mix_total, config.seed)
    return kept, held_out


# --- What the target says of the samples -----------------------------------------------------------------------------


def hidden_for_training(
    config: TrainConfig, loaded: Loaded, samples: Sequence[Sample], selection: Selection | None
) -> HiddenStates:
    """The hidden states of `samples`, from where --features says.

    Raises FileNotFoundError or ValueError for a directory that is no store, or not one of these samples.
    """
    from jsfdd.hidden import capture

    target = loaded.target
    if config.features == RECOMPUTE:
        return capture.make_recompute(target, loaded.mesh, config.feature_dtype)
    if config.features == STORE:
        return capture.store_hidden(
            target,
            samples,
            loaded.mesh,
            batch_tokens=config.batch_tokens,
            directory=config.out / HIDDEN,
            identity=loaded.identity,
            dtype=config.feature_dtype,
        )
    return open_features(config, loaded.identity, samples, selection)


def open_features(
    config: TrainConfig, identity: dict | None, samples: Sequence[Sample], selection: Selection | None
) -> HiddenStore:
    """The store in the directory that --features names, after a look whether it has all of `samples` in --feature-dtype."""
    from jsfdd.hidden.store import HiddenStore

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
            names = ("metric", "retain_ratio", "within", "seed")
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


def soft_targets_for_training(config: TrainConfig | RunConfig, loaded: Loaded, data: TrainingData) -> HiddenStore | None:
    """What the recipe stores of the target's distributions, where `data` weighs them, in `out`/soft_targets."""
    from jsfdd.models.sharding import split_vocabulary
    from jsfdd.training.draft_shape import draft_of
    from jsfdd.training.loss import borrow
    from jsfdd.training.soft_store import store_soft_targets

    kind = config.stored_soft_targets(config.features != RECOMPUTE)
    if kind is None:
        return None
    target, mesh = loaded.target, loaded.mesh
    return store_soft_targets(
        kind,
        data,
        split_vocabulary(borrow(target.config, target.params), mesh),
        draft_of(target.config, config, data.samples),
        config,
        mesh,
        batch_tokens=config.batch_tokens,
        directory=config.out / SOFT_TARGETS,
        identity=loaded.identity | {"feature_dtype": config.feature_dtype},
    )


def check_features(config: TrainConfig | RunConfig) -> None:
    """ValueError where options ask for what --features does not give."""
    if config.draft_vocab and not config.stored_soft_targets(config.features != RECOMPUTE):
        raise ValueError("--draft-vocab trains on soft targets: take --soft-targets top_k, or means with cross_entropy")
    if config.features == RECOMPUTE and config.feature_dtype == "int8":
        raise ValueError("--feature-dtype int8 saves disk, and --features recompute needs none; take bfloat16 or float32")


# --- What else training reads ----------------------------------------------------------------------------------------


def _token_weights(config: TrainConfig, kept: Sequence[Sample]) -> dict | None:
    """Each sample's token weights, None where all counted tokens weigh the same."""
    from jsfdd.scoring.table import read_token_scores
    from jsfdd.selection.tokens import token_weights

    if not config.weighs_tokens:
        return None
    return token_weights(
        kept,
        read_token_scores(config.token_scores),
        metric=config.token_metric,
        retain_ratio=config.token_retain_ratio,
        weighting=config.token_weighting,
        seed=config.seed,
    )


def _make_probe(config: TrainConfig, loaded: Loaded, kept: Sequence[Sample]) -> Probe:
    """A real decode of the probe prompts by the draft so far."""
    from jsfdd.data.chat import read_prompts
    from jsfdd.evaluation.probe import make_probe
    from jsfdd.training.draft_shape import draft_of

    prompts = read_prompts(config.probe_prompts)
    draft = draft_of(loaded.target.config, config, kept)
    return make_probe(
        loaded.target, draft, prompts, loaded.mesh, num_draft_tokens=_PROBE_DEPTH, max_new_tokens=config.probe_new_tokens
    )


def _mix_identity(config: TrainConfig, kept: Sequence[Sample]) -> dict:
    """The mixture that was asked for, and what it came to."""
    from jsfdd.selection.mixture import contents

    asked = {"shares": config.mix_shares, "unit": config.mix_unit, "total": config.mix_total}
    return {"mix": asked | {"contents": contents(kept)}} if config.mix else {}


def _probe_identity(config: TrainConfig) -> dict:
    """What decides which draft is best, beside the training itself."""
    from jsfdd.data.rows import input_digests

    if not config.probe_prompts:
        return {}
    files = list(input_digests(config.probe_prompts).values())
    return {"probe": {"prompts": files, "every": config.probe_every, "new_tokens": config.probe_new_tokens}}


# --- Parts of a description: (values, words) -------------------------------------------------------------------------


def describe_training(
    config: TrainConfig | RunConfig,
    inputs: Inputs,
    kept: Sequence[Sample],
    held_out: Sequence[Sample],
    share: float = 1.0,
    estimated: bool = False,
) -> tuple[dict, list[str]]:
    """Training on `kept`; if `estimated`, about what a `share` of such samples would take."""
    from jsfdd.data.batches import epoch_batches
    from jsfdd.selection.mixture import contents, in_words

    lengths = [len(sample.tokens) for sample in kept]
    steps = config.epochs * math.ceil(len(epoch_batches(lengths, inputs.shapes, config.seed, epoch=0)) / config.accumulate)
    samples = max(1, math.floor(share * len(kept) + 0.5))
    values = {
        "samples": samples,
        "held_out": len(held_out),
        "tokens": round(share * sum(lengths)),
        "counted_tokens": round(share * counted_tokens(kept)),
        "epochs": config.epochs,
        "steps": math.ceil(share * steps),
        "estimated": estimated,
    }
    about = "about " if estimated else ""
    words = [
        f"train on {about}{many(samples, 'sample')} ({len(held_out):,} held out): {about}{many(values['steps'], 'step')} in "
        f"{many(config.epochs, 'epoch')} of {about}{values['tokens']:,} tokens",
    ]
    if config.mix and not estimated:
        values["mix"] = contents(kept)
        words.append(f"a mixture of {in_words(values['mix'])}")
    return values, words


def describe_soft_targets(
    config: TrainConfig | RunConfig, inputs: Inputs, samples: Sequence[Sample]
) -> tuple[int, list[str]]:
    """What is stored of the target's distributions, for at most these samples: (bytes, words)."""
    from jsfdd.hidden.rows import row_bytes
    from jsfdd.training.soft_rows import row_words

    kind, target = config.stored_soft_targets(config.features != RECOMPUTE), inputs.target.config
    if kind is None:
        return 0, []
    if kind == "top_k":
        words = row_words(config.soft_top_k, target.vocab_size, config.draft_vocab)
        what, row = f"the target's {config.soft_top_k} likeliest tokens", row_bytes("uint16", words)
    else:
        what, row = "target means", row_bytes("bfloat16", target.hidden_size + 1)
    size = sum(len(sample.tokens) for sample in samples) * row
    return size, [f"store at most {size / 1e6:,.1f} MB of {what}"]
