"""The configs: every option of every command, as the command line, the Python API and the artifacts have them.

Groups of options that several commands share are in `options.py`; a stage's config inherits those that it needs, and adds
its own. Bad values raise ValueError with the remedy when a config is built, before any work.
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Literal

from jsfdd.commands.options import (
    Batched,
    ChainOptions,
    ChatFiles,
    ChatNames,
    CombineOptions,
    ConversationLength,
    DataOptions,
    DecodingOptions,
    ExportOptions,
    FeatureFormat,
    MixOptions,
    ProbeOptions,
    ProcessOptions,
    ProposalOptions,
    Seeded,
    SelectionOptions,
    TargetOptions,
    TrainingOptions,
    _Options,
)
from jsfdd.scoring.metrics import Metric


@dataclasses.dataclass(frozen=True, kw_only=True)
class RespondConfig(TargetOptions, ChatNames, ConversationLength, DecodingOptions, Batched, Seeded, ProcessOptions):
    """Let the target answer the users' turns of chats: its own text is what a draft learns best from."""

    out: Path
    """File of chats to write, ending in .jsonl; an interrupted run continues it, with what is in FILE.parts."""
    turns: Literal["all", "first"] = "all"
    """Answer every turn of the user's, each after the target's own earlier answers, or only the first one."""
    draft: Path | None = None
    """A training run's directory, its checkpoints/, or an exported draft, to decode with; without one, a token a step."""

    def __post_init__(self):
        super().__post_init__()
        if self.out.suffix != ".jsonl":
            raise ValueError(f"--out: got {str(self.out)!r}, but it must be a file that ends in .jsonl")
        if self.tree_nodes and self.draft is None:
            raise ValueError("--tree-nodes is about a draft's tokens; give --draft DIR or leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(TargetOptions, DataOptions, FeatureFormat, Seeded, ProcessOptions):
    """Score chats by how flat the target's next-token distributions are."""

    out: Path
    """Directory for scores.parquet; an interrupted run continues here."""
    per_token: bool = False
    """Also write token_scores.parquet, one row a sample with the list of its counted tokens' flatness and entropy."""
    keep_features: tuple[str, ...] = ()
    """In the same pass keep the hidden states of what these can select, in OUT/hidden for `jsfdd train --features`: metrics,
    at --retain-ratio and, for random, --seed; or `full`, every sample. Others are dropped as soon as that is known."""
    retain_ratio: float = SelectionOptions.retain_ratio
    """With --keep-features: the share of the samples that the selection will keep."""
    within: Literal["all", "source"] = SelectionOptions.within
    """With --keep-features: among which samples the selection will keep that share."""
    held_out_share: float = TrainingOptions.held_out_share
    """With --keep-features: the share that training will hold out, of which hidden states are kept too."""

    def __post_init__(self):
        super().__post_init__()
        _check_arms("--keep-features", self.keep_features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig(SelectionOptions, Seeded, ProcessOptions):
    """Keep the most valuable share of the scored samples."""

    scores: Path
    """scores.parquet, as `jsfdd score` wrote it."""
    metric: Metric = "flatness"
    """Which score decides. Each metric keeps the end that stands for an uncertain target."""
    out: Path
    """Directory for selection.json."""


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
        _check_features(self)
        if self.weighs_tokens != (self.token_scores is not None):
            raise ValueError(
                "--token-retain-ratio below 1 and --token-weighting soft need --token-scores, which `jsfdd score --per-token` "
                "writes, and nothing else reads it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TargetOptions, DecodingOptions, CombineOptions, Batched, Seeded, ProcessOptions):
    """Measure acceptance and speed by real speculative decoding."""

    draft: tuple[Path, ...]
    """Drafts, each a training run's directory, its checkpoints/, or an exported draft. Several are compared in pairs, unless
    --combine makes one of them."""
    prompts: tuple[Path, ...]
    """Prompts: files, directories or patterns as for --data; rows with "turns"; each turn's own answer feeds the next."""
    out: Path
    """Directory for report.json, or where several drafts are compared for a directory of each and differences.json."""
    each_draft: bool = False
    """With --combine: also measure each draft alone, and compare them all on the same prompts, with the same --tree-nodes."""

    def __post_init__(self):
        super().__post_init__()
        if not self.draft:
            raise ValueError("--draft: got none, but it must be at least one draft")
        _check_combine(self)
        if self.each_draft and self.combine is None:
            raise ValueError("--each-draft does nothing without --combine: drafts are measured alone anyway")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(ExportOptions, ProposalOptions):
    """Write a draft in the layout that a serving engine loads, with a model card."""

    draft: Path
    """A training run's directory, its checkpoints/, or an exported draft."""
    out: Path
    """Directory to write; must not exist yet."""
    report: Path | None = None
    """report.json of `jsfdd evaluate`, for the model card; the one in the training run's directory unless given."""
    selection: Path | None = None
    """selection.json, as `jsfdd select` wrote it; the one in the training run's directory unless given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(TargetOptions, DecodingOptions, CombineOptions, Seeded):
    """Answer one prompt and print the text as it is decoded."""

    prompt: str
    """The user's message."""
    draft: tuple[Path, ...] = ()
    """A training run's directory, its checkpoints/, or an exported draft; several with --combine."""
    no_draft: bool = False
    """Decode without a draft, one token a step."""
    show_accepted: bool = False
    """Mark the tokens that the draft proposed: green on a terminal, in [brackets] elsewhere. Of several drafts each has a
    colour of its own, or its number: [1:…] [2:…]."""

    def __post_init__(self):
        super().__post_init__()
        if bool(self.draft) == self.no_draft:
            raise ValueError("give either --draft DIR or --no-draft")
        _check_combine(self)
        if len(self.draft) > 1 and self.combine is None:
            raise ValueError(f"--draft: got {len(self.draft)}, but without --combine one draft decodes")
        if self.no_draft and self.show_accepted:
            raise ValueError("--show-accepted marks a draft's tokens, and there are none with --no-draft")
        if not self.prompt.strip():
            raise ValueError("--prompt is empty; give the user's message")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig(TargetOptions, ChatFiles, ChainOptions):
    """Find what would make a draft's served acceptance differ from its training. Exits with 1 on an error."""

    draft: Path | None = None
    """A training run's directory, its checkpoints/, or an exported draft; without one, target and data alone are examined."""
    hidden: Path | None = None
    """A store of hidden states to compare with fresh ones; hidden/ in the training run's directory unless given."""
    conversations: int = 6
    """So many are read by the target, and so many of their prompts decoded; template and mask are checked on more."""
    out: Path | None = None
    """Directory for doctor.json; without it the findings are only printed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig(_Options):
    """Draw one self-contained HTML page from a run's artifacts."""

    run: Path
    """Directory of `jsfdd run` or `jsfdd demo`."""
    out: Path | None = None
    """Where to write the page; report.html in the run's directory unless given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(TargetOptions, DataOptions):
    """Estimate memory, arithmetic and disk of every stage from shapes alone; no weights are read."""

    retain_ratio: float = 0.5
    """Share of the samples that are trained on."""
    epochs: int = 10
    """Passes over the kept samples."""
    target_top_k: int = TrainingOptions.target_top_k
    """As of `train`: so many tokens of every distribution are stored in place of its mean; 0 for the mean."""
    devices: int | None = None
    """How many devices; those that are here unless given."""
    device_kind: str | None = None
    """Which, as JAX names them: "TPU v5 lite", "NVIDIA H200", …; those that are here unless given."""
    device_memory: float | None = None
    """Memory of one in GB, where the kind is not known or not all of it is free."""
    device_rate: float | None = None
    """TFLOP/s of one in matrix products; unless given, the maker's bfloat16 peak or, for an unknown one here, measured."""


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
        _check_arms("--arms", self.arms)
        _check_features(self)
        if self.features not in ("store", "recompute"):
            raise ValueError(f"--features: got {self.features!r}; a run stores its own (`store`) or none (`recompute`)")


def _check_arms(option: str, arms: tuple[str, ...]) -> None:
    known = ("full", *typing.get_args(Metric))
    for arm in arms:
        if arm not in known:
            raise ValueError(f"{option}: {arm!r} is unknown; choose from {', '.join(known)}")


def stores_means(config: TrainConfig | RunConfig) -> bool:
    """Whether target means are stored: what --target-means comes to."""
    possible = config.token_loss == "cross_entropy" and config.features != "recompute" and not config.target_top_k
    return config.target_means == "store" or config.target_means == "auto" and possible


def stores_target(config: TrainConfig | RunConfig) -> bool:
    """Whether anything of the target's distributions is stored."""
    return config.target_top_k > 0 or stores_means(config)


def _check_combine(config: EvaluateConfig | GenerateConfig) -> None:
    if config.combine is None:
        return
    count = len(config.draft)
    if count < 2:
        raise ValueError(f"--combine {config.combine}: needs two drafts or more, but --draft gives {count}")
    if config.combine_weights and len(config.combine_weights) != count:
        raise ValueError(f"--combine-weights: got {len(config.combine_weights)} of them for {count} drafts; give one for each")
    if config.combine != "average" and not config.tree_nodes:
        raise ValueError(
            f"--combine {config.combine} works on trees, since a choice between sampled chains would change what is sampled; "
            "give --tree-nodes, with --tree-top-k 1 for a tree that is a chain"
        )


def _check_features(config: TrainConfig | RunConfig) -> None:
    if config.draft_vocab and not stores_target(config):
        raise ValueError(
            "--draft-vocab trains on what is stored of the target: take --target-means store and cross_entropy, or "
            "--target-top-k"
        )
    if config.features == "recompute" and config.feature_dtype == "int8":
        raise ValueError("--feature-dtype int8 saves disk, and --features recompute needs none; take bfloat16 or float32")
