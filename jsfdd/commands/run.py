"""`jsfdd run`: run every stage for several arms (full data, flatness, random, …) in one resumable directory.

    load ─► score ─► select ─► train ─► evaluate ─► export ─► report

All arms share the model, the data and the target's pass over it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from jsfdd.commands import evaluate, export, score, select, stores, train
from jsfdd.commands.evaluate import EvaluateConfig
from jsfdd.commands.export import ExportConfig
from jsfdd.commands.groups import kept_and_dropped
from jsfdd.commands.inputs import Inputs, Loaded, load, read_inputs, tree_shape
from jsfdd.commands.options import (
    ChatOptions,
    DecodingOptions,
    DraftOptions,
    ExportOptions,
    HiddenOptions,
    MixtureOptions,
    ModelOptions,
    Paths,
    RecipeOptions,
    SelectionOptions,
    check,
    check_at_least,
    to_json,
)
from jsfdd.commands.outcome import Outcome, many, planned
from jsfdd.commands.score import HIDDEN, ScoreConfig, check_arms
from jsfdd.commands.select import SelectConfig
from jsfdd.commands.stores import SOFT_TARGETS, check_vocabulary
from jsfdd.commands.summary import example_texts, summarise, summary_words
from jsfdd.commands.train import RECOMPUTED, TrainConfig

if TYPE_CHECKING:
    from jsfdd.base.records import Prompt, Sample
    from jsfdd.selection.sfdd import Selection

_OF_STAGES = ("checkpoints", "metrics.jsonl", "report.json", "scores.parts", "scores.parquet", "selection.json")

EXAMPLES = """
jsfdd run --target smollm2 --data chats.jsonl --prompts prompts.jsonl --out run --dry-run
jsfdd run --target smollm2 --data chats.jsonl --prompts prompts.jsonl --arms full --out run
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Score, select, train, evaluate, export and report in one directory."""

    model: ModelOptions
    chats: ChatOptions
    selection: SelectionOptions = SelectionOptions()
    mixture: MixtureOptions = MixtureOptions()
    recipe: RecipeOptions = RecipeOptions()
    hidden: HiddenOptions = HiddenOptions()
    decoding: DecodingOptions = DecodingOptions()
    export: ExportOptions = ExportOptions()
    prompts: Paths
    """Prompts to evaluate on: files, directories or patterns as for --data. Rows have "turns"."""
    out: Path
    """Directory of the run. A second call continues it and repeats nothing."""
    arms: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ARM …")] = ("full", "flatness", "random")
    """Drafts to train and compare: `full` (every sample), or the name of a metric, which selects at --retain-ratio."""
    batch_size: int = 8
    """Prompts decoded together."""
    seed: int = 0
    """Seed of every random choice of the command."""

    def __post_init__(self):
        check("--prompts", self.prompts, len(self.prompts) > 0, "at least one prompt file")
        check("--arms", self.arms, len(self.arms) > 0, "one or more arms")
        check_arms("--arms", self.arms)
        check_at_least(1, batch_size=self.batch_size)
        check_vocabulary(self.recipe, self.hidden)


class Prepared(NamedTuple):
    """Prompts and inputs; both None if the run is finished."""

    prompts: list[Prompt] | None
    inputs: Inputs | None


def prepare(config: RunConfig) -> Prepared:
    from jsfdd.base.processes import several
    from jsfdd.data.chat import read_prompts
    from jsfdd.training.draft_shape import draft_of
    from jsfdd.weights.card import Serving
    from jsfdd.weights.flavours import check_flavour

    tree_shape(config.decoding)
    if several():
        raise ValueError("`jsfdd run` works in one process; run score, select, train and evaluate one after the other")
    check_claim(config)
    if (config.out / "summary.json").exists():
        return Prepared(None, None)
    prompts = read_prompts(config.prompts)
    inputs = read_inputs(config.model, config.chats)
    draft = draft_of(inputs.target.config, config.recipe, inputs.samples)
    if config.export.flavour != "none":  # drafts that cannot be exported should fail here, not after hours of training
        check_flavour(draft, config.export.flavour, Serving(config.model.target))
    _sides(config, inputs.samples)  # fails if even all samples together are too few for the mixture
    evaluate.check_prompts(inputs.target, prompts, config.decoding.max_new_tokens)
    return Prepared(prompts, inputs)


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
    prompts, inputs = prepared
    scoring, words = score.describe_scoring(inputs)
    kept, held_out = _sides(config, inputs.samples)
    scoring_config, hidden_bytes, hidden_words = scoring_of_run(config), 0, RECOMPUTED
    if scoring_config.keep_hidden:
        hidden_bytes, hidden_words = score.describe_kept(scoring_config, inputs)
    # Each arm mixes the samples that it selected, so together the arms may train on more than one mixture's samples.
    trained_on = inputs.samples if config.mixture.mix else kept
    soft_target_bytes, soft_target_words = stores.describe_soft_targets(config.recipe, config.hidden, inputs, trained_on)
    words += [hidden_words, *soft_target_words]
    arms = {}
    for arm in config.arms:
        # Which samples an arm keeps is known after scoring; how many, and so about how many steps, is known now.
        share = 1.0 if arm == "full" or config.mixture.mix_total else config.selection.retain_ratio
        arms[arm], lines = train.describe_training(
            config.recipe, config.mixture, config.seed, inputs, kept, held_out, share, estimated=arm != "full"
        )
        words += [f"{arm}: {line}" for line in lines]
    decoding, lines = evaluate.describe_decoding(
        config.decoding, config.batch_size, config.model.model_shards, inputs.target, prompts
    )
    words += [f"{line}, for {many(len(arms), 'draft')}" for line in lines]
    folders = [f"{HIDDEN}/"] * bool(hidden_bytes)
    folders += [f"{SOFT_TARGETS}/"] * bool(soft_target_bytes)
    files = ["scores.parquet", "token_scores.parquet", *folders, *(f"arms/{arm}/" for arm in arms)]
    files += ["summary.json", "report.html"]
    values = {"scoring": scoring, "hidden_bytes": hidden_bytes, "soft_target_bytes": soft_target_bytes, "arms": arms}
    values["decoding"] = decoding
    return planned("run", values, words, config.out, files, continues=config.out / "run.json")


def run_stages(config: RunConfig, prepared: Prepared | None = None) -> dict:
    """Run every stage for every arm, and return the content of summary.json.

    A directory belongs to one config and one content of its input files. A second call with the same ones computes only what
    is missing.
    """
    from jsfdd.base.files import read_json
    from jsfdd.base.lock import sole_writer
    from jsfdd.base.progress import console
    from jsfdd.report.report import write_report

    prompts, inputs = prepared or prepare(config)
    config.out.mkdir(parents=True, exist_ok=True)
    with sole_writer(config.out):
        _claim(config)
        if inputs is None:
            console.print(f"{config.out}: finished before; nothing to compute", soft_wrap=True)
        else:
            _compute(config, prompts, inputs)
        if not (config.out / "report.html").exists():
            write_report(config.out)
    return read_json(config.out / "summary.json")


def scoring_of_run(config: RunConfig) -> ScoreConfig:
    """The scoring stage of a run, which keeps the hidden states of every sample that an arm can select. The arm `full` has
    the samples of all others."""
    keep = () if config.hidden.no_hidden_store else ("full",) if "full" in config.arms else config.arms
    return ScoreConfig(
        model=config.model,
        chats=config.chats,
        out=config.out,
        per_token=True,
        keep_hidden=keep,
        retain_ratio=config.selection.retain_ratio,
        within=config.selection.within,
        held_out_share=config.recipe.held_out_share,
        draft_kind=config.recipe.draft_kind,
        hidden_dtype=config.hidden.hidden_dtype,
        seed=config.seed,
    )


def _training_of_arm(config: RunConfig, directory: Path) -> TrainConfig:
    return TrainConfig(
        model=config.model,
        chats=config.chats,
        mixture=config.mixture,
        recipe=config.recipe,
        hidden=config.hidden,
        out=directory,
        selection=directory / "selection.json",
        hidden_from=None if config.hidden.no_hidden_store else config.out / HIDDEN,
        token_scores=config.out / "token_scores.parquet" if config.recipe.weighs_tokens else None,
        seed=config.seed,
    )


def _sides(
    config: RunConfig, samples: Sequence[Sample], selection: Selection | None = None
) -> tuple[list[Sample], list[Sample]]:
    return train.training_sides(samples, selection, config.recipe, config.mixture, config.seed)


def _compute(config: RunConfig, prompts: Sequence[Prompt], inputs: Inputs) -> None:
    from jsfdd.base.files import write_json
    from jsfdd.base.progress import console
    from jsfdd.evaluation.evaluate import compare
    from jsfdd.training.batch import TrainingData
    from jsfdd.training.draft_shape import draft_of

    clock = _StageClock(config.out / "seconds.json")
    with clock.stage("load"):
        loaded = load(config, inputs)

    scoring = scoring_of_run(config)
    with clock.stage("score"):
        table = score.score(scoring, loaded)

    arms = {arm: config.out / "arms" / arm for arm in config.arms}
    selections = {arm: _select_arm(config, arm, directory) for arm, directory in arms.items()}
    sides = {arm: _sides(config, loaded.samples, selection) for arm, selection in selections.items()}
    needed = {sample.id: sample for kept, held_out in sides.values() for sample in (*kept, *held_out)}
    stages = {arm: _training_of_arm(config, directory) for arm, directory in arms.items()}
    with clock.stage("hidden"):
        hidden = stores.hidden_states_of(next(iter(stages.values())), loaded, list(needed.values()))
    # One vocabulary, that of all arms' samples: so the arms share soft targets and programs, and differ in their samples alone.
    data = TrainingData(list({sample.id: sample for kept, _ in sides.values() for sample in kept}.values()), hidden)
    draft = draft_of(loaded.target.config, config.recipe, data.samples)
    with clock.stage("soft_targets"):
        soft_targets = stores.soft_targets_of(
            config.recipe, config.hidden, loaded, data, draft, config.chats.batch_tokens, config.out
        )

    trained = {}
    for arm, stage in stages.items():
        console.print(f"training on {arm}: {len(sides[arm][0])} samples", soft_wrap=True)
        trained[arm] = train.train(stage, loaded, *sides[arm], hidden, soft_targets, shape=draft)

    with clock.stage("evaluate"):
        reports = _evaluate_arms(config, loaded, arms, prompts)
    for directory in arms.values() if config.export.flavour != "none" else ():
        if not (directory / "draft").exists():
            export.export(
                ExportConfig(
                    export=config.export,
                    draft=directory,
                    out=directory / "draft",
                    num_draft_tokens=config.decoding.num_draft_tokens,
                )
            )
    write_json(config.out / "texts.json", example_texts(loaded, table, selections))
    write_json(config.out / "groups.json", kept_and_dropped(loaded, table, selections))
    kept = {arm: side[0] for arm, side in sides.items()}
    held_out = next(iter(sides.values()))[1]
    summary = summarise(loaded, kept, held_out, trained, reports, clock.seconds, compare(reports, config.seed))
    write_json(config.out / "summary.json", summary)


def _select_arm(config: RunConfig, arm: str, directory: Path) -> Selection:
    metric, ratio = ("flatness", 1.0) if arm == "full" else (arm, config.selection.retain_ratio)
    return select.select(
        SelectConfig(
            selection=dataclasses.replace(config.selection, retain_ratio=ratio),
            scores=config.out / "scores.parquet",
            metric=metric,
            out=directory,
            seed=config.seed,
        )
    )


def _evaluate_arms(config: RunConfig, loaded: Loaded, arms: dict[str, Path], prompts: Sequence[Prompt]) -> dict[str, dict]:
    """Measure the arms together, so that they are paired, unless all their reports exist; return the reports."""
    from jsfdd.base.files import read_json, write_json
    from jsfdd.weights.draft import load_draft

    paths = {arm: directory / "report.json" for arm, directory in arms.items()}
    if not all(path.exists() for path in paths.values()):
        drafts = {arm: load_draft(directory) for arm, directory in arms.items()}
        reports = evaluate.measure(config.decoding, config.batch_size, config.seed, loaded.target, drafts, prompts, loaded.mesh)
        for arm, report in reports.items():
            arm_config = EvaluateConfig(
                model=config.model,
                decoding=config.decoding,
                drafts=DraftOptions(draft=(arms[arm],)),
                prompts=config.prompts,
                batch_size=config.batch_size,
                out=arms[arm],
                seed=config.seed,
            )
            write_json(paths[arm], report | {"config": to_json(arm_config)})
    return {arm: read_json(path) for arm, path in paths.items()}


def check_claim(config: RunConfig) -> dict:
    """The content of run.json for this config and the present content of its input files.

    Raises:
      ValueError: the directory holds another run.
    """
    from jsfdd.base.files import differences, read_json
    from jsfdd.data.rows import input_digests

    claim = {"config": to_json(config), "inputs": input_digests((*config.chats.data, *config.prompts))}
    path = config.out / "run.json"
    if path.exists() and (changed := differences(read_json(path), claim)):
        raise ValueError(f"{config.out} holds another run ({changed}); choose another --out")
    if not path.exists() and (found := [name for name in _OF_STAGES if (config.out / name).exists()]):
        raise ValueError(f"{config.out} holds the {found[0]} of another command, and no run; choose another --out")
    return claim


def _claim(config: RunConfig) -> None:
    """Write run.json and config.json into the run's directory, or check that they belong to this config."""
    from jsfdd.base.files import write_json

    claim = check_claim(config)
    if not (config.out / "run.json").exists():
        write_json(config.out / "config.json", to_json(config))
        write_json(config.out / "run.json", claim)


class _StageClock:
    """Seconds per stage, without those of compiling, which are a stage of their own; stored on disk so that a resumed run
    includes the time of its first part."""

    def __init__(self, path: Path):
        from jsfdd.base.files import read_json

        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    @contextmanager
    def stage(self, name: str):
        from jsfdd.base.compiling import compile_seconds
        from jsfdd.base.files import write_json

        start, compiled = time.perf_counter(), compile_seconds()
        yield
        compiling = compile_seconds() - compiled
        for stage, seconds in ((name, time.perf_counter() - start - compiling), ("compiling", compiling)):
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        write_json(self.path, self.seconds)
