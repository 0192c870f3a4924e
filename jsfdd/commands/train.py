"""`jsfdd train`: train a draft on the selected samples.

It writes:

    checkpoints/      the draft, the optimizer's state, and the identity of the training data
    metrics.jsonl     a line every few steps
    timings.jsonl     seconds of the same steps
    hidden/           the target's hidden states of the samples, unless they are read from elsewhere or not stored
    soft_targets/     the stored soft targets
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from jsfdd.commands.inputs import Inputs, Loaded, known_identity, load, read_inputs, target_dtype, template_digest
from jsfdd.commands.options import (
    ChatOptions,
    Flag,
    HiddenOptions,
    MixtureOptions,
    ModelOptions,
    OptionalInt,
    OptionalPath,
    Paths,
    ProcessOptions,
    RecipeOptions,
    check_at_least,
)
from jsfdd.commands.outcome import Outcome, counts_to_json, many, planned
from jsfdd.commands.score import HIDDEN, counted_tokens, describe_hidden, is_store
from jsfdd.commands.stores import (
    SOFT_TARGETS,
    check_vocabulary,
    describe_soft_targets,
    hidden_states_of,
    layers_of,
    open_hidden,
    soft_targets_of,
)

if TYPE_CHECKING:
    from jsfdd.base.records import Sample
    from jsfdd.models.architecture import DecoderConfig
    from jsfdd.models.draft import Draft, DraftConfig
    from jsfdd.selection.sfdd import Selection
    from jsfdd.training.batch import HiddenStates, PerToken
    from jsfdd.training.recipe import Recipe
    from jsfdd.training.reports import Probe
    from jsfdd.training.train import TrainResult

RECOMPUTED = "compute the hidden states of each batch at every step; store none"
_PROBE_DEPTH, _PROBE_NEW_TOKENS = 4, 64

EXAMPLES = """
jsfdd train --target smollm2 --data chats.jsonl --selection scored/selection.json --out draft
jsfdd train --target DIR --data chats/ --mask-spans thinking tool_calls --out draft --dry-run
jsfdd train --target DIR --data chats/ --selection S --hidden-from scored/hidden --out draft
jsfdd train --target DIR --data math.jsonl chat.jsonl --mix math=0.5 chat=0.5 --out draft
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train an EAGLE draft on the selected samples."""

    model: ModelOptions
    chats: ChatOptions
    mixture: MixtureOptions = MixtureOptions()
    recipe: RecipeOptions = RecipeOptions()
    hidden: HiddenOptions = HiddenOptions()
    processes: ProcessOptions = ProcessOptions()
    out: Path
    """Directory for checkpoints/ and metrics.jsonl. An interrupted run continues here."""
    selection: OptionalPath = None
    """selection.json from `jsfdd select`. Default: train on every sample."""
    hidden_from: OptionalPath = None
    """Read hidden states from this directory, instead of computing them and storing them in OUT/hidden: what `jsfdd score
    --keep-hidden` wrote, or another program, as for `jsfdd score --hidden-from`."""
    token_scores: OptionalPath = None
    """token_scores.parquet from `jsfdd score --per-token`. With it, --token-retain-ratio keeps the flattest tokens."""
    probe_prompts: Paths = ()
    """Prompt files, different from those of the final evaluation. Decode them at every checkpoint, and keep the draft with the
    best τ."""
    patience: OptionalInt = None
    """Stop after so many --probe-prompts in a row without a new best τ. Default: train to the last step."""
    init: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="", metavar="DRAFT")] = None
    """Start from this draft, a training run's directory or an exported one, instead of random weights. It keeps its kind and
    its vocabulary."""
    shard_optimizer: Flag = False
    """Split Adam's moments over the data shards, instead of a copy on every device. Costs one exchange per step."""
    tensorboard: Flag = False
    """Also write the metrics for TensorBoard, to OUT/tensorboard. Needs `pip install 'jsfdd[tensorboard]'`."""
    seed: int = 0
    """Seed of every random choice of the command."""

    def __post_init__(self):
        if self.hidden_from is not None and self.hidden.no_hidden_store:
            raise ValueError("--hidden-from names a store, and --no-hidden-store wants none; choose one")
        check_at_least(1, patience=self.patience)
        if self.patience is not None and not self.probe_prompts:
            raise ValueError("--patience counts probes; say what to decode with --probe-prompts FILE …")
        check_vocabulary(self.recipe, self.hidden)
        if self.token_scores is not None and not self.recipe.weighs_tokens:
            raise ValueError("--token-scores chooses tokens; say how many with --token-retain-ratio below 1")


class Prepared(NamedTuple):
    """The inputs, the samples to train on and to hold out, and the draft to start from."""

    inputs: Inputs
    kept: list[Sample]
    held_out: list[Sample]
    init: Draft | None


def prepare(config: TrainConfig) -> Prepared:
    from jsfdd.data.chat import read_prompts
    from jsfdd.hidden.imported import check_streams
    from jsfdd.selection.sfdd import check_inputs, read_selection
    from jsfdd.training.draft_shape import draft_of
    from jsfdd.weights.checkpoint import check_run
    from jsfdd.weights.draft import check_draft, load_draft

    if config.probe_prompts:
        read_prompts(config.probe_prompts)
    imports_states = config.hidden_from is not None and not is_store(config.hidden_from)
    inputs = read_inputs(config.model, config.chats, config.hidden_from if imports_states else None)
    if imports_states:
        _check_options_with_imported_states(config)
    selection = None if config.selection is None else read_selection(config.selection)
    kept, held_out = training_sides(inputs.samples, selection, config.recipe, config.mixture, config.seed)
    if config.token_scores is not None:
        _token_weights(config, kept)  # fails if the scores are missing or of other samples
    # The weights are compared when they are there.
    if selection is not None:
        check_inputs(selection, known_identity(config, inputs), config.selection)
    init = None
    if config.init is not None:
        init = load_draft(config.init, inputs.target.config.num_layers)
        check_draft(inputs.target, init.config, str(config.init))
    if (config.out / "checkpoints").exists():
        check_run(config.out, _known_run(config, inputs, kept, held_out, init))
    # Fails if the draft cannot be of this target, or not from --init.
    draft = draft_of(inputs.target.config, config.recipe, kept, init and init.config)
    if inputs.states is not None:
        check_streams(inputs.states, inputs.target.config, draft.target_layers)
    elif config.hidden_from is not None:
        open_hidden(config, [*kept, *held_out], selection, draft.target_layers)
    return Prepared(inputs, kept, held_out, init)


def _check_options_with_imported_states(config: TrainConfig) -> None:
    """Raise ValueError for options that need more than another program's states."""
    if config.hidden.hidden_dtype == "int8":
        raise ValueError("--hidden-dtype int8 is of states that jsfdd stores; take bfloat16 or float32 with --hidden-from")
    if config.probe_prompts:
        raise ValueError("--probe-prompts decodes with the target, of which --hidden-from reads no layers; leave it out")


def run(config: TrainConfig, prepared: Prepared) -> Outcome:
    loaded = load(config, prepared.inputs)
    result = train(config, loaded, prepared.kept, prepared.held_out, init=prepared.init)
    names = ("steps", "samples", "tokens", "seconds", "held_out")
    values = {"command": "train"} | {name: getattr(result, name) for name in names}
    values |= {"draft": config.out, "files": counts_to_json(loaded.files)}
    return Outcome(
        values, f"{many(result.steps, 'step')} on {many(result.samples, 'sample')} in {result.seconds:.0f} s: {config.out}"
    )


def describe(config: TrainConfig, prepared: Prepared) -> Outcome:
    inputs, kept, held_out, init = prepared
    values, words = describe_training(config.recipe, config.mixture, config.seed, inputs, kept, held_out)
    files = ["checkpoints/", "metrics.jsonl", "timings.jsonl"]
    values["hidden_bytes"] = 0
    if config.hidden_from is not None:
        words.append(f"read hidden states from {config.hidden_from}")
    elif config.hidden.no_hidden_store:
        words.append(RECOMPUTED)
    else:
        tokens = sum(len(sample.tokens) for sample in (*kept, *held_out))
        values["hidden_bytes"], line = describe_hidden(
            config.hidden.hidden_dtype, inputs, tokens, layers_of(config, inputs, init)
        )
        words.append(f"store {line}")
        files.append(f"{HIDDEN}/")
    values["soft_target_bytes"], lines = describe_soft_targets(config.recipe, config.hidden, inputs, kept)
    words += lines
    files += [f"{SOFT_TARGETS}/"] if values["soft_target_bytes"] else []
    return planned("train", values, words, config.out, files, continues=config.out / "checkpoints")


def train(
    config: TrainConfig,
    loaded: Loaded,
    kept: Sequence[Sample],
    held_out: Sequence[Sample],
    hidden: HiddenStates | None = None,
    soft_targets: PerToken | None = None,
    init: Draft | None = None,
    shape: DraftConfig | None = None,
) -> TrainResult:
    """Write checkpoints/ and metrics.jsonl, and return the result. Hidden states and soft targets that are not given are
    computed, stored or read as the config asks; without a shape, the draft's is that of the recipe and the kept samples."""
    from jsfdd.base.lock import sole_writer
    from jsfdd.base.processes import agree_on_directory

    agree_on_directory(config.out)
    with sole_writer(config.out):
        return _train(config, loaded, kept, held_out, hidden, soft_targets, init, shape)


def _train(
    config: TrainConfig,
    loaded: Loaded,
    kept: Sequence[Sample],
    held_out: Sequence[Sample],
    hidden: HiddenStates | None,
    soft_targets: PerToken | None,
    init: Draft | None,
    shape: DraftConfig | None,
) -> TrainResult:
    from jsfdd.base.processes import agree, is_primary
    from jsfdd.base.progress import console
    from jsfdd.selection.mixture import contents, in_words
    from jsfdd.selection.sfdd import check_inputs, read_selection
    from jsfdd.training import train as training
    from jsfdd.training.batch import TrainingData
    from jsfdd.training.draft_shape import draft_of

    if config.selection is not None:
        check_inputs(read_selection(config.selection), loaded.identity, config.selection)
    agree({"the selection": [sample.id for sample in kept]})
    if config.mixture.mix and is_primary():
        console.print(f"mixture of {in_words(contents(kept))}", soft_wrap=True)
    if hidden is None:
        hidden = hidden_states_of(config, loaded, [*kept, *held_out], init)
    data = TrainingData(kept, hidden, soft_targets, _token_weights(config, kept))
    draft = shape or draft_of(loaded.target.config, config.recipe, kept, init and init.config)
    if soft_targets is None:
        stored = soft_targets_of(config.recipe, config.hidden, loaded, data, draft, config.chats.batch_tokens, config.out)
        data = data._replace(soft_targets=stored)
    return training.train(
        loaded.target,
        data,
        TrainingData(held_out, hidden),
        _recipe(config),
        loaded.mesh,
        out=config.out,
        seed=config.seed,
        draft=draft,
        init=init,
        identity=loaded.identity | _more_identity(config, loaded.target, kept),
        shapes=loaded.shapes,
        probe=_make_probe(config, loaded, draft) if config.probe_prompts else None,
        probe_every=config.recipe.save_every,
        patience=config.patience,
        shard_optimizer=config.shard_optimizer,
        tensorboard=config.tensorboard,
    )


def training_sides(
    samples: Sequence[Sample], selection: Selection | None, recipe: Recipe, mixture: MixtureOptions, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Split the samples into (training samples, held-out samples). Selection and mixture apply only to the former."""
    from jsfdd.data.held_out import split_held_out
    from jsfdd.selection.mixture import mixture as mixed
    from jsfdd.selection.sfdd import selected_samples

    _, held_out = split_held_out(samples, recipe.held_out_share)
    out = {sample.id for sample in held_out}
    kept = samples if selection is None else selected_samples(selection, samples)
    kept = [sample for sample in kept if sample.id not in out]
    if mixture.mix:
        kept = mixed(kept, mixture.shares, "samples", mixture.mix_total, seed)
    return kept, held_out


# --- Recipe, token weights, probe, identities ------------------------------------------------------------------------


def _recipe(config: TrainConfig) -> Recipe:
    """The recipe, completed from other options. Without token scores, tokens are chosen at random. On an accelerator the draft
    computes in the target's dtype; a CPU is fastest in float32."""
    import jax

    changes = {} if config.token_scores or not config.recipe.weighs_tokens else {"token_metric": "random"}
    if jax.default_backend() != "cpu":
        changes["compute_dtype"] = target_dtype(config.model)
    return dataclasses.replace(config.recipe, **changes)


def _token_weights(config: TrainConfig, kept: Sequence[Sample]) -> dict | None:
    """Each sample's token weights, or None if all counted tokens weigh the same."""
    from jsfdd.scoring.table import read_token_scores
    from jsfdd.selection.tokens import token_weights

    recipe = _recipe(config)
    if not recipe.weighs_tokens:
        return None
    return token_weights(
        kept,
        read_token_scores(config.token_scores) if config.token_scores else {},
        metric=recipe.token_metric,
        retain_ratio=recipe.token_retain_ratio,
        weighting=recipe.token_weighting,
        seed=config.seed,
    )


def _make_probe(config: TrainConfig, loaded: Loaded, draft: DraftConfig) -> Probe:
    """Make the probe: decode the probe prompts with the present draft."""
    from jsfdd.data.chat import read_prompts
    from jsfdd.evaluation.probe import make_probe

    prompts = read_prompts(config.probe_prompts)
    return make_probe(
        loaded.target, draft, prompts, loaded.mesh, num_draft_tokens=_PROBE_DEPTH, max_new_tokens=_PROBE_NEW_TOKENS
    )


def _known_run(
    config: TrainConfig, inputs: Inputs, kept: Sequence[Sample], held_out: Sequence[Sample], init: Draft | None
) -> dict:
    """The part of the run's identity that is known before the weights are read; None for what this run has not."""
    from jsfdd.base.records import samples_digest
    from jsfdd.models.draft import params_digest

    return known_identity(config, inputs) | {
        "options": dataclasses.asdict(_recipe(config)) | {"seed": config.seed},
        "samples": samples_digest(kept),
        "held_out": samples_digest(held_out),
        "init": init and params_digest(init.params),
        "patience": config.patience,
        "mix": None,
        "probe": None,
        **_more_identity(config, inputs.target, kept),
    }


def _more_identity(config: TrainConfig, target: Target, kept: Sequence[Sample]) -> dict:
    """What a run depends on, besides what every stage does and what `training.train` sees."""
    shared = {"hidden_dtype": config.hidden.hidden_dtype, "template": template_digest(target)}
    return shared | _mixture_identity(config, kept) | _probe_identity(config)


def _mixture_identity(config: TrainConfig, kept: Sequence[Sample]) -> dict:
    """The mixture's options and its contents."""
    from jsfdd.selection.mixture import contents

    if not config.mixture.mix:
        return {}
    return {"mix": {"shares": config.mixture.shares, "total": config.mixture.mix_total, "contents": contents(kept)}}


def _probe_identity(config: TrainConfig) -> dict:
    """The facts that the choice of the best draft depends on, besides the training itself."""
    from jsfdd.data.rows import input_digests

    if not config.probe_prompts:
        return {}
    files = list(input_digests(config.probe_prompts).values())
    return {"probe": {"prompts": files, "every": config.recipe.save_every, "new_tokens": _PROBE_NEW_TOKENS}}


# --- Parts of a description: (values, words) -------------------------------------------------------------------------


def describe_training(
    recipe: Recipe,
    mixture: MixtureOptions,
    seed: int,
    inputs: Inputs,
    kept: Sequence[Sample],
    held_out: Sequence[Sample],
    share: float = 1.0,
    estimated: bool = False,
) -> tuple[dict, list[str]]:
    """Describe training on `kept`; with `estimated`, on an unknown `share` of these samples."""
    from jsfdd.data.batches import epoch_batches
    from jsfdd.selection.mixture import contents, in_words

    lengths = [len(sample.tokens) for sample in kept]
    steps = recipe.epochs * math.ceil(len(epoch_batches(lengths, inputs.shapes, seed, epoch=0)) / recipe.accumulate)
    samples = max(1, math.floor(share * len(kept) + 0.5))
    values = {
        "samples": samples,
        "held_out": len(held_out),
        "tokens": round(share * sum(lengths)),
        "counted_tokens": round(share * counted_tokens(kept)),
        "epochs": recipe.epochs,
        "steps": math.ceil(share * steps),
        "estimated": estimated,
        "checkpoint_bytes": _checkpoint_bytes(inputs.target.config, recipe, kept),
    }
    about = "about " if estimated else ""
    words = [
        f"train on {about}{many(samples, 'sample')} ({len(held_out):,} held out): {about}{many(values['steps'], 'step')} in "
        f"{many(recipe.epochs, 'epoch')} of {about}{values['tokens']:,} tokens",
    ]
    if mixture.mix and not estimated:
        values["mix"] = contents(kept)
        words.append(f"a mixture of {in_words(values['mix'])}")
    return values, words


def _checkpoint_bytes(target: DecoderConfig, recipe: Recipe, kept: Sequence[Sample]) -> int:
    """The disk that checkpoints take at most: the draft and two moments, of the last two steps and of the one being written."""
    import jax

    from jsfdd.models.draft import init_draft
    from jsfdd.training.draft_shape import draft_of

    draft = draft_of(target, recipe, kept)
    shapes = jax.eval_shape(lambda: init_draft(draft, jax.random.key(0)))
    return 3 * 3 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
