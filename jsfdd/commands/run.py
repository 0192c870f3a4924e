"""`jsfdd run`: every stage for several arms (full data, flatness, random, …) in one resumable directory.

    load ─► score ─► select ─► train ─► evaluate ─► export ─► report

The model, the data and the target's pass are shared by all arms.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.commands import evaluate, export, inputs, score, select, train
from jsfdd.commands.evaluate import EvaluateConfig
from jsfdd.commands.export import ExportConfig
from jsfdd.commands.inputs import Inputs, Loaded, tree_shape
from jsfdd.commands.options import (
    Batched,
    DataOptions,
    DecodingOptions,
    ExportOptions,
    FeatureFormat,
    MixOptions,
    Seeded,
    SelectionOptions,
    TargetOptions,
    TrainingOptions,
)
from jsfdd.commands.outcome import Outcome, many, planned
from jsfdd.commands.score import HIDDEN, ScoreConfig, check_arms
from jsfdd.commands.select import SelectConfig
from jsfdd.commands.summary import example_texts, summarise, summary_words
from jsfdd.commands.train import RECOMPUTE, RECOMPUTED, SOFT_TARGETS, STORE, TrainConfig, check_features

if TYPE_CHECKING:
    from jsfdd.base.records import Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(
    TargetOptions,
    DataOptions,
    SelectionOptions,
    MixOptions,
    TrainingOptions,
    FeatureFormat,
    DecodingOptions,
    ExportOptions,
    Batched,
    Seeded,
):
    """Score, select, train, evaluate, export and report: the whole loop in one resumable directory."""

    prompts: tuple[Path, ...]
    """Prompt files to evaluate on."""
    out: Path
    """Directory of the run; a second call continues it and repeats nothing."""
    arms: tuple[str, ...] = ("full", "flatness", "random")
    """Drafts to train and compare: `full` (every sample) or the name of a metric, at --retain-ratio."""

    features: str = "store"
    """Hidden states: `store` keeps, while scoring, those of what an arm can still select; `recompute` lets the target compute
    each batch's anew in every epoch and needs no disk."""

    def __post_init__(self):
        super().__post_init__()
        check_arms("--arms", self.arms)
        check_features(self)
        if self.features not in ("store", "recompute"):
            raise ValueError(f"--features: got {self.features!r}; a run stores its own (`store`) or none (`recompute`)")


class Prepared(NamedTuple):
    """Prompts and inputs; both None where the run is finished."""

    prompts: list[Prompt] | None
    inputs: Inputs | None


def prepare(config: RunConfig) -> Prepared:
    from jsfdd.base.processes import several
    from jsfdd.data.chat import read_prompts
    from jsfdd.training.draft_shape import draft_of
    from jsfdd.weights.card import Serving
    from jsfdd.weights.export import check_flavour

    tree_shape(config)
    if several():
        raise ValueError("`jsfdd run` works in one process; start score, select, train and evaluate one after the other")
    check_claim(config)
    if (config.out / "summary.json").exists():
        return Prepared(None, None)
    prompts = read_prompts(config.prompts)
    found = inputs.read_inputs(config)
    # Before hours of training: the drafts will have this shape.
    serving = Serving(config.served_target or config.target)
    check_flavour(draft_of(found.target.config, config, found.samples), config.flavour, serving)
    train.training_sides(found.samples, None, config)  # a mixture that not even all samples allow is no arm's
    evaluate.check_prompts(config, found.target, prompts)
    return Prepared(prompts, found)


def run(config: RunConfig, prepared: Prepared) -> Outcome:
    summary = run_stages(config, prepared)
    paths = {"summary": config.out / "summary.json", "report": config.out / "report.html"}
    names = ("arms", "differences", "data", "seconds")
    values = {"command": "run"} | {name: summary[name] for name in names} | paths
    return Outcome(values, summary_words(summary, paths["report"]))


def describe(config: RunConfig, prepared: Prepared) -> Outcome:
    if prepared.inputs is None:
        values = {"command": "run", "dry_run": True, "finished": True}
        return Outcome(values, f"dry run of run: {config.out} is finished; nothing would be computed")
    prompts, found = prepared
    scoring, scoring_words = score.describe_scoring(found)
    words = list(scoring_words)
    kept, held_out = train.training_sides(found.samples, None, config)
    arms = {}
    for arm in config.arms:
        # Which samples an arm keeps is known when they are scored; how many, and so about how many steps, is known now.
        share = 1.0 if arm == "full" or config.mix_total else config.retain_ratio
        values, said = train.describe_training(config, found, kept, held_out, share, estimated=arm != "full")
        arms[arm] = values
        words += [f"{arm}: {line}" for line in said]
    scoring_config, hidden_bytes, said = scoring_of_run(config), 0, RECOMPUTED
    if scoring_config.keep_features:
        hidden_bytes, said = score.describe_kept(scoring_config, found)
    elif config.features == STORE:
        tokens = sum(len(sample.tokens) for sample in found.samples)
        hidden_bytes, said = score.describe_hidden(config, found, tokens)
        said = f"store at most {said}, once it is selected"
    # Arms mix what they selected, so together they may train on more than one mixture.
    soft_target_bytes, also = train.describe_soft_targets(config, found, found.samples if config.mix else kept)
    words[len(scoring_words) : len(scoring_words)] = [said, *also]
    decoding, said = evaluate.describe_decoding(config, found.target, prompts)
    words += [f"{line}, for {many(len(arms), 'draft')}" for line in said]
    stores = [f"{HIDDEN}/"] * bool(hidden_bytes)
    stores += [f"{SOFT_TARGETS}/"] * bool(soft_target_bytes and not config.draft_vocab)
    files = ["scores.parquet", "token_scores.parquet", *stores, *(f"arms/{arm}/" for arm in arms)]
    files += ["summary.json", "report.html"]
    values = {"scoring": scoring, "hidden_bytes": hidden_bytes, "arms": arms, "decoding": decoding}
    return planned("run", values, words, config.out, files, continues=config.out / "run.json")


def run_stages(config: RunConfig, prepared: Prepared | None = None) -> dict:
    """Every stage for every arm; returns the summary that summary.json holds.

    A directory belongs to one config and one content of its inputs. A second call with the same ones finishes what is
    missing, or, where nothing is, reads the summary and computes nothing.
    """
    from jsfdd.base.files import read_json
    from jsfdd.base.progress import console
    from jsfdd.report.report import write_report

    prompts, found = prepared or prepare(config)
    _claim(config)
    if found is None:
        console.print(f"{config.out}: finished before; nothing to compute", soft_wrap=True)
    else:
        _compute(config, prompts, found)
    if not (config.out / "report.html").exists():
        write_report(config.out)
    return read_json(config.out / "summary.json")


def scoring_of_run(config: RunConfig) -> ScoreConfig:
    """The scoring stage of a run: it keeps the hidden states of all that an arm can select; `full` has every arm's samples."""
    keep = ("full",) if "full" in config.arms else config.arms
    if config.features == RECOMPUTE:
        keep = ()
    return ScoreConfig.taken_from(config, per_token=True, keep_features=keep)


def _compute(config: RunConfig, prompts: Sequence[Prompt], found: Inputs) -> None:
    from jsfdd.base.files import write_json
    from jsfdd.base.progress import console
    from jsfdd.evaluation.evaluate import compare
    from jsfdd.training.batch import TrainingData

    clock = _StageClock(config.out / "seconds.json")
    with clock.stage("load"):
        loaded = inputs.load(config, found)

    scoring = scoring_of_run(config)
    with clock.stage("score"):
        table = score.score(scoring, loaded)

    arms = {arm: config.out / "arms" / arm for arm in config.arms}
    selections = {}
    for arm, directory in arms.items():
        metric, ratio = ("flatness", 1.0) if arm == "full" else (arm, config.retain_ratio)
        selections[arm] = select.select(
            SelectConfig.taken_from(
                config, scores=config.out / "scores.parquet", metric=metric, retain_ratio=ratio, out=directory
            )
        )
    sides = {arm: train.training_sides(loaded.samples, selection, config) for arm, selection in selections.items()}
    needed = {sample.id: sample for kept, held_out in sides.values() for sample in (*kept, *held_out)}
    kept_at = str(config.out / HIDDEN) if scoring.keep_features else config.features
    with clock.stage("hidden"):
        source = TrainConfig.taken_from(config, features=kept_at, token_retain_ratio=1.0, token_weighting="hard")
        store = train.hidden_for_training(source, loaded, list(needed.values()), None)
    soft_targets = None
    # A vocabulary belongs to one arm, and so do its soft targets.
    if config.stored_soft_targets(config.features != RECOMPUTE) and not config.draft_vocab:
        trained_on = {sample.id: sample for kept, _ in sides.values() for sample in kept}
        with clock.stage("soft_targets"):
            soft_targets = train.soft_targets_for_training(config, loaded, TrainingData(list(trained_on.values()), store))

    trained = {}
    for arm, directory in arms.items():
        console.print(f"training on {arm}: {len(sides[arm][0])} samples", soft_wrap=True)
        token_scores = config.out / "token_scores.parquet" if config.weighs_tokens else None
        train_config = TrainConfig.taken_from(
            config, out=directory, selection=directory / "selection.json", token_scores=token_scores
        )
        trained[arm] = train.train(train_config, loaded, store, soft_targets)

    with clock.stage("evaluate"):
        reports = _evaluate_arms(config, loaded, arms, prompts)
    for directory in arms.values():
        if not (directory / "draft").exists():
            export.export(ExportConfig.taken_from(config, draft=directory, out=directory / "draft"))
    write_json(config.out / "texts.json", example_texts(loaded, table, selections))
    kept = {arm: side[0] for arm, side in sides.items()}
    summary = summarise(loaded, kept, trained, reports, clock.seconds, compare(reports, config.seed))
    write_json(config.out / "summary.json", summary)


def _evaluate_arms(
    config: RunConfig, loaded: Loaded, arms: dict[str, Path], prompts: Sequence[Prompt]
) -> dict[str, dict]:
    """The arms' reports, measured together (so paired) unless all are there already."""
    from jsfdd.base.files import read_json, write_json
    from jsfdd.weights.draft import load_draft

    paths = {arm: directory / "report.json" for arm, directory in arms.items()}
    if not all(path.exists() for path in paths.values()):
        drafts = {arm: load_draft(directory) for arm, directory in arms.items()}
        for arm, result in evaluate.measure(config, loaded.target, drafts, prompts, loaded.mesh).items():
            arm_config = EvaluateConfig.taken_from(config, draft=(arms[arm],), out=arms[arm])
            write_json(paths[arm], result | {"config": arm_config.to_json()})
    return {arm: read_json(path) for arm, path in paths.items()}


def check_claim(config: RunConfig) -> dict:
    """What run.json of this config and the present content of its inputs says.

    Raises ValueError if the directory holds another run's.
    """
    from jsfdd.base.files import differences, read_json
    from jsfdd.data.rows import input_digests

    claim = {"config": config.to_json(), "inputs": input_digests((*config.data, *config.prompts))}
    path = config.out / "run.json"
    if path.exists() and (changed := differences(read_json(path), claim)):
        raise ValueError(f"{config.out} holds another run ({changed}); choose another --out")
    return claim


def _claim(config: RunConfig) -> None:
    """Make the run's directory this config's own, or find that it is already."""
    from jsfdd.base.files import write_json

    claim = check_claim(config)
    config.out.mkdir(parents=True, exist_ok=True)
    if not (config.out / "run.json").exists():
        write_json(config.out / "config.json", config.to_json())
        write_json(config.out / "run.json", claim)


class _StageClock:
    """Seconds per stage, kept on disk so that a run that was interrupted still knows what its first part took."""

    def __init__(self, path: Path):
        from jsfdd.base.files import read_json

        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    @contextmanager
    def stage(self, name: str):
        from jsfdd.base.files import write_json

        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        write_json(self.path, self.seconds)
