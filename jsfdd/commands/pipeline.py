"""The stages as functions of their configs, and the whole loop as one resumable run.

    load ─► score ─► select ─► train ─► evaluate ─► export ─► report

Each function here is one sub-command: it loads what its config names, calls its room, and writes the stage's artifact.
`run` does them all for several arms (full data, flatness, random, …) with the model, the data and the target's pass shared.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jax.numpy as jnp

from jsfdd.base.files import differences, read_json, write_json
from jsfdd.base.hardware import describe_hardware
from jsfdd.base.mesh import make_mesh
from jsfdd.base.processes import agree, agree_on_directory, is_primary, several, wait_for_all
from jsfdd.base.progress import console, progress
from jsfdd.base.records import Sample
from jsfdd.commands import hidden_stage as hidden
from jsfdd.commands.configs import (
    EvaluateConfig,
    ExportConfig,
    ReportConfig,
    RunConfig,
    ScoreConfig,
    SelectConfig,
    TrainConfig,
    stores_target,
)
from jsfdd.commands.drafts import measured_drafts
from jsfdd.commands.inputs import Loaded, load
from jsfdd.commands.options import DecodingOptions
from jsfdd.data.batches import make_batches, padding_share
from jsfdd.data.chat import read_prompts
from jsfdd.data.counts import total
from jsfdd.data.rows import input_digests
from jsfdd.decoding.tree import TreeShape
from jsfdd.decoding.verify import Cutoff
from jsfdd.evaluation import evaluate as evaluation
from jsfdd.evaluation.probe import make_probe
from jsfdd.models.draft import Draft
from jsfdd.report.report import write_report
from jsfdd.scoring.score import score_samples
from jsfdd.scoring.table import ScoreTable, read_scores, read_token_scores, write_scores, write_token_scores
from jsfdd.selection import sfdd
from jsfdd.selection.mixture import contents, in_words, mixture
from jsfdd.selection.sfdd import Selection
from jsfdd.selection.tokens import token_weights
from jsfdd.training import train as training
from jsfdd.training.batch import HiddenStates, PerToken, TrainingData
from jsfdd.weights.card import Provenance, Serving, read_report
from jsfdd.weights.draft import load_draft
from jsfdd.weights.export import check_flavour, write_draft
from jsfdd.weights.target import Target, load_target

_PROBE_DEPTH = 4


def score(config: ScoreConfig, loaded: Loaded | None = None) -> ScoreTable:
    """`jsfdd score`: writes scores.parquet (token_scores.parquet, hidden/), returns the table."""
    loaded = loaded or load(config)
    agree_on_directory(config.out)
    with hidden.keeper(config, loaded) if config.keep_features else nullcontext() as keeper:
        table = score_samples(
            loaded.target.config,
            loaded.target.params,
            loaded.samples,
            loaded.mesh,
            batch_tokens=config.batch_tokens,
            identity=loaded.identity,
            parts_dir=config.out / "scores.parts",
            per_token=config.per_token,
            keeper=keeper,
        )
    if is_primary():
        write_scores(config.out / "scores.parquet", table)
        if config.per_token:
            write_token_scores(config.out / "token_scores.parquet", table)
    wait_for_all("scores written")
    return table


def select(config: SelectConfig) -> Selection:
    """`jsfdd select`: writes selection.json, returns the selection."""
    table = read_scores(config.scores)
    selection = sfdd.select(table, config.metric, config.retain_ratio, config.seed, config.unit, config.within)
    config.out.mkdir(parents=True, exist_ok=True)
    if is_primary():
        sfdd.write_selection(config.out / "selection.json", selection)
    wait_for_all("selection written")
    return selection


def train(
    config: TrainConfig, loaded: Loaded | None = None, store: HiddenStates | None = None, known: PerToken | None = None
) -> training.TrainResult:
    """`jsfdd train`: writes checkpoints/ and metrics.jsonl, returns what happened.

    Without a `store` hidden states come from where `config.features` says; without `known`, what the config asks for of the
    target's distributions is computed first and kept in `out`.
    """
    loaded = loaded or load(config)
    agree_on_directory(config.out)
    selection = None if config.selection is None else sfdd.read_selection(config.selection)
    kept, held_out = training_sides(loaded.samples, selection, config)
    agree({"the selection": [sample.id for sample in kept]})
    if config.mix and is_primary():
        console.print(f"mixture of {in_words(contents(kept))}", soft_wrap=True)
    training.draft_of(loaded.target.config, config, kept)  # refuses what the target's vocabulary cannot give, before any work
    if store is None:
        store = hidden.for_training(config, loaded, [*kept, *held_out], selection)
    data = TrainingData(kept, store, known, _token_weights(config, kept))
    if known is None and stores_target(config):
        data = data._replace(known=hidden.known_for_training(config, loaded, data))
    return training.train(
        loaded.target.config,
        loaded.target.params,
        data,
        TrainingData(held_out, store),
        config,
        loaded.mesh,
        identity=loaded.identity
        | {"feature_dtype": config.feature_dtype}
        | _mix_identity(config, kept)
        | _probe_identity(config),
        shapes=loaded.shapes,
        probe=_make_probe(config, loaded, kept) if config.probe_prompts else None,
    )


def evaluate(config: EvaluateConfig) -> dict[str, dict]:
    """`jsfdd evaluate`: writes a report.json a draft (and differences.json), returns {draft's name: report}.

    Drafts that are combined are one, named as what combines them.
    """
    tree_shape(config)
    prompts = read_prompts(config.prompts)
    drafts = measured_drafts(config)
    mesh = make_mesh(model=config.model_shards)
    target = load_target(config.target, jnp.dtype(config.dtype), mesh)
    agree({"the options": config.to_json(), "the prompts": [dataclasses.asdict(prompt) for prompt in prompts]})
    agree({"the target": target.fingerprint})
    reports = _evaluate(config, target, drafts, prompts, mesh)
    if is_primary():
        for name, report in reports.items():
            out = config.out / name if len(reports) > 1 else config.out
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "report.json", report | {"config": config.to_json()})
        if len(reports) > 1:
            write_json(config.out / "differences.json", evaluation.compare(reports, config.seed))
    wait_for_all("reports written")
    return reports


def export(config: ExportConfig) -> None:
    """`jsfdd export`: writes a directory that an engine loads."""
    draft, serving, provenance = plan_export(config)
    write_draft(
        config.out, *draft[:2], config.flavour, dtype=config.export_dtype, serving=serving, provenance=provenance
    )


def plan_export(config: ExportConfig) -> tuple[Draft, Serving, Provenance]:
    """All that `export` writes. ValueError names what the flavour cannot represent."""
    draft = load_draft(config.draft)
    provenance = _provenance(config, draft.record)
    named = None if provenance.report is None else provenance.report["config"]["target"]
    serving = Serving(config.served_target or named, config.num_draft_tokens)
    check_flavour(draft.config, config.flavour, serving)
    return draft, serving, provenance


def report(config: ReportConfig) -> Path:
    """`jsfdd report`: writes report.html, returns its path."""
    return write_report(config.run, config.out)


def tree_shape(config: DecodingOptions) -> TreeShape | None:
    """The tree that a config asks for, None for chains. ValueError if its depth cannot hold it."""
    return TreeShape(config.num_draft_tokens, config.tree_top_k, config.tree_nodes) if config.tree_nodes else None


def _provenance(config: ExportConfig, identity: dict | None) -> Provenance:
    """What the model card tells: the files that the config names, else those in the training run's directory."""
    run = config.draft.parent if config.draft.name == "checkpoints" else config.draft
    report = config.report or run / "report.json"
    selection = config.selection or run / "selection.json"
    return Provenance(
        training=identity,
        selection=sfdd.selection_facts(selection, identity) if config.selection or selection.exists() else None,
        report=read_report(report) if config.report or report.exists() else None,
    )


# --- The whole loop ------------------------------------------------------------------------------------------------


def run(config: RunConfig) -> dict:
    """`jsfdd run`: every stage for every arm in one directory; returns the summary that summary.json holds.

    A directory belongs to one config and one content of its inputs. A second call with the same ones finishes what is
    missing, or, where nothing is, reads the summary and computes nothing.
    """
    tree_shape(config)
    if several():
        raise ValueError("`jsfdd run` works in one process; start score, select, train and evaluate one after the other")
    _claim(config)
    if (config.out / "summary.json").exists():
        console.print(f"{config.out}: finished before; nothing to compute", soft_wrap=True)
    else:
        _run_stages(config)
    if not (config.out / "report.html").exists():
        write_report(config.out)
    return read_json(config.out / "summary.json")


def _run_stages(config: RunConfig) -> None:
    prompts = read_prompts(config.prompts)
    clock = _StageClock(config.out / "seconds.json")
    with clock.stage("load"):
        loaded = load(config)
    # Before hours of training: the drafts will have this shape.
    serving = Serving(config.served_target or config.target)
    check_flavour(training.draft_of(loaded.target.config, config, loaded.samples), config.flavour, serving)
    training_sides(loaded.samples, None, config)  # a mixture that not even all samples allow is no arm's

    scoring = hidden.scoring_of_run(config)
    with clock.stage("score"):
        table = score(scoring, loaded)

    arms = {arm: config.out / "arms" / arm for arm in config.arms}
    selections = {}
    for arm, directory in arms.items():
        metric, ratio = ("flatness", 1.0) if arm == "full" else (arm, config.retain_ratio)
        selections[arm] = select(
            SelectConfig.taken_from(
                config, scores=config.out / "scores.parquet", metric=metric, retain_ratio=ratio, out=directory
            )
        )
    sides = {arm: training_sides(loaded.samples, selection, config) for arm, selection in selections.items()}
    needed = {sample.id: sample for kept, held_out in sides.values() for sample in (*kept, *held_out)}
    kept_at = str(config.out / hidden.FOLDER) if scoring.keep_features else config.features
    with clock.stage("hidden"):
        source = TrainConfig.taken_from(config, features=kept_at, token_retain_ratio=1.0, token_weighting="hard")
        store = hidden.for_training(source, loaded, list(needed.values()), None)
    known = None
    if stores_target(config) and not config.draft_vocab:  # a vocabulary is each arm's own, and so is what is stored of it
        trained_on = {sample.id: sample for kept, _ in sides.values() for sample in kept}
        with clock.stage("top_k" if config.target_top_k else "means"):
            known = hidden.known_for_training(config, loaded, TrainingData(list(trained_on.values()), store))

    trained = {}
    for arm, directory in arms.items():
        console.print(f"training on {arm}: {len(sides[arm][0])} samples", soft_wrap=True)
        token_scores = config.out / "token_scores.parquet" if config.weighs_tokens else None
        train_config = TrainConfig.taken_from(
            config, out=directory, selection=directory / "selection.json", token_scores=token_scores
        )
        trained[arm] = train(train_config, loaded, store, known)

    with clock.stage("evaluate"):
        reports = _evaluate_arms(config, loaded, arms, prompts)
    for directory in arms.values():
        if not (directory / "draft").exists():
            export(ExportConfig.taken_from(config, draft=directory, out=directory / "draft"))
    write_json(config.out / "texts.json", _example_texts(loaded, table, selections))
    kept = {arm: side[0] for arm, side in sides.items()}
    summary = _summary(config, loaded, kept, trained, reports, clock.seconds)
    write_json(config.out / "summary.json", summary)


def _evaluate_arms(config: RunConfig, loaded: Loaded, arms: dict[str, Path], prompts) -> dict[str, dict]:
    """The arms' reports, measured together (so paired) unless all are there already."""
    paths = {arm: directory / "report.json" for arm, directory in arms.items()}
    if not all(path.exists() for path in paths.values()):
        drafts = {arm: load_draft(directory) for arm, directory in arms.items()}
        for arm, result in _evaluate(config, loaded.target, drafts, prompts, loaded.mesh).items():
            own = EvaluateConfig.taken_from(config, draft=(arms[arm],), out=arms[arm])
            write_json(paths[arm], result | {"config": own.to_json()})
    return {arm: read_json(path) for arm, path in paths.items()}


def _make_probe(config: TrainConfig, loaded: Loaded, kept: Sequence[Sample]) -> training.Probe:
    """A real decode of the probe prompts by the draft so far."""
    prompts = read_prompts(config.probe_prompts)
    draft = training.draft_of(loaded.target.config, config, kept)
    return make_probe(
        loaded.target, draft, prompts, loaded.mesh, num_draft_tokens=_PROBE_DEPTH, max_new_tokens=config.probe_new_tokens
    )


def _mix_identity(config: TrainConfig, kept: Sequence[Sample]) -> dict:
    """The mixture that was asked for, and what it came to."""
    asked = {"shares": config.mix_shares, "unit": config.mix_unit, "total": config.mix_total}
    return {"mix": asked | {"contents": contents(kept)}} if config.mix else {}


def _probe_identity(config: TrainConfig) -> dict:
    """What decides which draft is best, beside the training itself."""
    if not config.probe_prompts:
        return {}
    files = list(input_digests(config.probe_prompts).values())
    return {"probe": {"prompts": files, "every": config.probe_every, "new_tokens": config.probe_new_tokens}}


def _evaluate(config: EvaluateConfig | RunConfig, target: Target, drafts, prompts, mesh) -> dict[str, dict]:
    with progress("decode", "batches") as bar:
        return evaluation.evaluate(
            target,
            drafts,
            prompts,
            mesh,
            temperature=config.temperature,
            num_draft_tokens=config.num_draft_tokens,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            seed=config.seed,
            tree=tree_shape(config),
            cutoff=Cutoff(config.top_k, config.top_p),
            progress=bar.update,
        )


def training_sides(
    samples: Sequence[Sample], selection: Selection | None, config: TrainConfig | RunConfig
) -> tuple[list[Sample], list[Sample]]:
    """(samples to train on, held-out samples): the mixture of the training side's selected ones, the whole held-out side."""
    _, held_out = training.split_held_out(samples, config.held_out_share)
    out = {sample.id for sample in held_out}
    kept = samples if selection is None else sfdd.selected_samples(selection, samples)
    kept = [sample for sample in kept if sample.id not in out]
    if config.mix:
        kept = mixture(kept, config.mix_shares, config.mix_unit, config.mix_total, config.seed)
    return kept, held_out


def _token_weights(config: TrainConfig, kept: Sequence[Sample]) -> dict | None:
    """Each sample's token weights, None where all counted tokens weigh the same."""
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


def check_claim(config: RunConfig) -> dict:
    """What run.json of this config and the present content of its inputs says.

    Raises ValueError if the directory holds another run's.
    """
    claim = {"config": config.to_json(), "inputs": input_digests((*config.data, *config.prompts))}
    path = config.out / "run.json"
    if path.exists() and (changed := differences(read_json(path), claim)):
        raise ValueError(f"{config.out} holds another run ({changed}); choose another --out")
    return claim


def _claim(config: RunConfig) -> None:
    """Make the run's directory this config's own, or find that it is already."""
    claim = check_claim(config)
    config.out.mkdir(parents=True, exist_ok=True)
    if not (config.out / "run.json").exists():
        write_json(config.out / "config.json", config.to_json())
        write_json(config.out / "run.json", claim)


class _StageClock:
    """Seconds per stage, kept on disk so that a run that was interrupted still knows what its first part took."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    @contextmanager
    def stage(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        write_json(self.path, self.seconds)


def _summary(
    config: RunConfig,
    loaded: Loaded,
    kept: dict[str, list[Sample]],
    trained: dict[str, training.TrainResult],
    reports: dict[str, dict],
    seconds: dict[str, float],
) -> dict:
    """Everything that the run's table says; tokens are those of the samples trained on, as often as they are in the data."""
    lengths = [len(sample.tokens) for sample in loaded.samples]
    rows = []
    for arm, result in trained.items():
        rows.append(
            {
                "arm": arm,
                "samples": len(kept[arm]),
                "tokens": sum(len(sample.tokens) for sample in kept[arm]),
                "counted_tokens": sum(int(sample.counted.sum()) for sample in kept[arm]),
                "train_seconds": result.seconds,
                "steps": result.steps,
                "held_out": result.held_out,
            }
            | {
                name: reports[arm][name]
                for name in ("tau", "tau_low", "tau_high", "tau_macro", "speedup", "speedup_low", "speedup_high")
            }
        )
    versions = {name: importlib.metadata.version(name) for name in ("jsfdd", "jax", "flax", "optax", "transformers")}
    plans = make_batches(lengths, loaded.shapes)
    return {
        "versions": versions,
        "hardware": describe_hardware(),
        "target": {
            "name": loaded.target.name,
            "fingerprint": loaded.target.fingerprint,
            "vocab_size": loaded.target.config.vocab_size,
        },
        "data": dataclasses.asdict(loaded.summary)
        | {
            "duplicates": total(loaded.files).duplicates,
            "files": [dataclasses.asdict(counts) for counts in loaded.files],
            "tokens": sum(lengths),
            "counted_tokens": sum(int(sample.counted.sum()) for sample in loaded.samples),
            "padding_share": padding_share(plans, lengths),
        },
        "seconds": seconds,
        "arms": rows,
        "differences": evaluation.compare(reports, config.seed),
    }


def _example_texts(loaded: Loaded, table: ScoreTable, selections: dict[str, Selection]) -> list[dict]:
    """The two flattest samples, two at the threshold and the two least flat, token by token.

    A token is shown with the flatness of the distribution that it was drawn from, which the index rule stores one
    position earlier.
    """
    order = [i for i in sorted(range(len(table.ids)), key=lambda i: -table.flatness[i]) if table.num_tokens[i] > 0]
    middle = len(selections["flatness"].ids) if "flatness" in selections else len(order) // 2
    chosen = dict.fromkeys([*order[:2], *order[max(middle - 1, 0) : middle + 1], *order[-2:]])
    by_id = {sample.id: sample for sample in loaded.samples}
    texts = []
    for i in chosen:
        sample = by_id[table.ids[i]]
        per_token = table.tokens[i].flatness
        shown = [None, *(float(f) if c else None for f, c in zip(per_token[:-1], sample.counted[:-1]))]
        pieces = [loaded.target.tokenizer.decode([token]) for token in sample.tokens]
        texts.append({"id": sample.id, "source": sample.source, "pieces": pieces, "flatness": shown})
    return texts
