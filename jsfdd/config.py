"""Every option of every stage, declared once.

An option has one name, one meaning and one default wherever it appears: groups of options are small frozen dataclasses,
and a stage's config inherits the groups it needs. The command line, the Python API and the `config` that each artifact
stores are all these classes. Bad values raise ValueError with the remedy when a config is built, before any work.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Literal

Metric = Literal["flatness", "flatness_median", "entropy", "top1", "margin", "energy", "ppl", "random"]
Flavour = Literal["eagle", "vllm", "sglang", "speculators"]
ExportDtype = Literal["keep", "float32", "bfloat16", "float16"]
FeatureDtype = Literal["bfloat16", "float32", "int8"]
MaskSpan = Literal["thinking", "tool_calls"]

# Field name -> (test, what a good value is). Checked for every config that has the field.
_RULES = {
    "data": (lambda x: len(x) > 0, "at least one chat file"),
    "prompts": (lambda x: len(x) > 0, "at least one prompt file"),
    "devices": (lambda x: x is None or x >= 1, "1 or more"),
    "device_memory": (lambda x: x is None or x > 0, "above 0"),
    "device_rate": (lambda x: x is None or x > 0, "above 0"),
    "model_shards": (lambda x: x >= 1, "1 (whole on every device) or more"),
    "max_length": (lambda x: x >= 8, "8 tokens or more"),
    "batch_tokens": (lambda x: x >= 1, "1 or more"),
    "retain_ratio": (lambda x: 0 < x <= 1, "a share of the samples in (0, 1]"),
    "epochs": (lambda x: x >= 1, "1 or more"),
    "learning_rate": (lambda x: x > 0, "above 0"),
    "warmup_share": (lambda x: 0 <= x < 1, "a share of the run's steps in [0, 1)"),
    "max_grad_norm": (lambda x: x > 0, "above 0"),
    "hidden_noise": (lambda x: x >= 0, "0 (no noise) or more"),
    "held_out_share": (lambda x: 0 <= x < 0.5, "a share of the samples in [0, 0.5)"),
    "log_every": (lambda x: x >= 1, "1 or more"),
    "save_every": (lambda x: x >= 1, "1 or more"),
    "temperature": (lambda x: x >= 0, "0 (greedy) or more"),
    "top_k": (lambda x: x >= 0, "0 (all tokens) or more"),
    "top_p": (lambda x: 0 < x <= 1, "a share of the probability in (0, 1]"),
    "num_draft_tokens": (lambda x: 1 <= x <= 32, "from 1 to 32"),
    "tree_nodes": (lambda x: 0 <= x <= 1024, "0 (a chain) or up to 1024 draft tokens"),
    "tree_top_k": (lambda x: x >= 1, "1 or more"),
    "max_new_tokens": (lambda x: x >= 1, "1 or more"),
    "batch_size": (lambda x: x >= 1, "1 or more"),
    "draft": (lambda x: x != (), "at least one draft"),
    "probe_every": (lambda x: x >= 1, "1 or more"),
    "probe_new_tokens": (lambda x: x >= 2, "2 or more: an answer's first token needs no draft"),
    "conversations": (lambda x: x >= 1, "1 or more"),
    "keep_features": (lambda x: len(set(x)) == len(x), "different arms"),
    "arms": (lambda x: len(x) > 0 and len(set(x)) == len(x), "one or more different arms"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What every config can do: check its values, go to JSON and come back."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            rule = _RULES.get(field.name)
            value = getattr(self, field.name)
            if rule and not rule[0](value):
                option = "--" + field.name.replace("_", "-")
                raise ValueError(f"{option}: got {value!r}, but it must be {rule[1]}")

    def to_json(self) -> dict:
        """A JSON-ready dict; paths become strings."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_json(cls, values: dict):
        """The config of which `to_json` made `values`. Unknown names are errors."""
        types = typing.get_type_hints(cls)
        unknown = sorted(set(values) - set(types))
        if unknown:
            raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}; it has {', '.join(sorted(types))}")
        return cls(**{name: _from_json(types[name], value) for name, value in values.items()})

    @classmethod
    def taken_from(cls, other, **changes):
        """This stage's config with the options it shares with `other`, then `changes`."""
        shared = {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(other)}
        return cls(**{name: getattr(other, name) for name in shared} | changes)


def _from_json(kind, value):
    """Rebuild what JSON has no form for: paths and tuples."""
    if value is None:
        return None
    if kind is Path or Path in typing.get_args(kind) and isinstance(value, str):
        return Path(value)
    if isinstance(value, list):
        element = typing.get_args(kind)[0]
        return tuple(_from_json(element, item) for item in value)
    return value


# --- Groups of options ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetOptions(_Options):
    """The model that the draft is for."""

    target: str
    """The target model: a Hugging Face directory, a .gguf file, a hub name, or `smollm2` (the packaged demo model)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the target's weights and activations. Metrics, softmax and losses are float32 either way."""
    model_shards: int = 1
    """Devices that share one copy of the target; the others take different rows. Must divide the devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatNames(_Options):
    """The conversations."""

    data: tuple[Path, ...]
    """Chats: files (.jsonl or .json, each also .gz or .zst; .parquet), directories, patterns such as 'chats/*.jsonl', or
    Hugging Face datasets (hf:NAME, hf:NAME:SPLIT). Rows are OpenAI messages, ShareGPT, Alpaca, or prompt and response."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFiles(ChatNames):
    """The conversations, and what of them counts."""

    mask_spans: tuple[MaskSpan, ...] = ()
    """Parts of answers that are read but neither scored nor trained on: `thinking` (`<think>…</think>`), `tool_calls`. By
    default all of an answer counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationLength(_Options):
    """How long conversations may become."""

    max_length: int = 2048
    """Conversations are cut after this many tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(ConversationLength, ChatFiles):
    """The conversations, and how they are cut into batches."""

    batch_tokens: int = 4096
    """Tokens in one batch, padding included: rows × length of a bucket. A training step divides one over all devices;
    scoring gives each device one of its own. Neither scores nor drafts depend on how many devices there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionOptions(_Options):
    """What is kept of the scored samples."""

    retain_ratio: float = 0.5
    """Share of the samples to keep."""
    unit: Literal["sample", "batch"] = "sample"
    """What is kept or dropped as a whole: a conversation, or four consecutive ones (the paper's code; for parity only)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(_Options):
    """How the draft learns."""

    epochs: int = 10
    """Passes over the kept samples. The learning-rate schedule is scaled to the run's own number of steps."""
    learning_rate: float = 5e-4
    """Peak of AdamW(0.9, 0.95): linear warm-up, then linear decay to a tenth."""
    warmup_share: float = 0.05
    """Share of the steps that warm up."""
    max_grad_norm: float = 0.5
    """Gradients are clipped to this global norm."""
    hidden_weight: float = 1.0
    """Weight of SmoothL1 between predicted and true hidden states."""
    token_weight: float = 0.1
    """Weight of the cross entropy between the target's and the draft's next-token distributions."""
    hidden_noise: float = 0.2
    """Width of the uniform noise on the input hidden states, scaled by 512 / length as EAGLE does; 0 for none."""
    held_out_share: float = 0.05
    """Share of the samples on which agreement with the target is measured and never trained."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 200
    """Steps between two checkpoints; the last step is always saved."""
    fc_bias: bool = False
    """Give the draft's fc a bias. vLLM drops it without a word, so drafts have none unless asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureFormat(_Options):
    """Stored hidden states."""

    feature_dtype: FeatureDtype = "bfloat16"
    """Of hidden states for training. int8 has a scale for each token and takes half of bfloat16's disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProposalOptions(_Options):
    """How far drafts reach."""

    num_draft_tokens: int = 4
    """Draft tokens in a row (γ): the length of a chain, the depth of a tree."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainOptions(ProposalOptions):
    """How far answers and drafts reach."""

    max_new_tokens: int = 128
    """Longest answer, in tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingOptions(ChainOptions):
    """How answers are decoded."""

    temperature: float = 0.0
    """0 decodes greedily; above 0 samples from the target's distribution at this temperature."""
    top_k: int = 0
    """Above temperature 0, sample among the target's this many most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Above temperature 0, sample among the fewest most probable tokens that together have this share of the probability."""
    tree_nodes: int = 0
    """Verify a tree of this many draft tokens (EAGLE-2 takes 60) instead of a chain, which is 0."""
    tree_top_k: int = 10
    """Children of a tree's node, and nodes that the draft reads per level."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batched(_Options):
    """A batch to decode."""

    batch_size: int = 8
    """Prompts decoded together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeOptions(_Options):
    probe_prompts: tuple[Path, ...] = ()
    """Prompt files, apart from those of the final evaluation: decode them during training and keep the draft of the best τ."""
    probe_every: int = 200
    """Steps between two such decodes; the last step always has one."""
    probe_new_tokens: int = 64
    """Longest answer of a probe, in tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(_Options):
    """Exported drafts."""

    flavour: Flavour = "vllm"
    """Whose layout exported drafts have."""
    export_dtype: ExportDtype = "keep"
    """Of an exported draft's tensors; `keep` writes them as they are, and they are trained in float32."""
    served_target: str | None = None
    """Hub name or directory by which a server finds the target, for the model card; else as --target or the report says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeded(_Options):
    """A seed."""

    seed: int = 0
    """Seeds every random choice of the command."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions(_Options):
    """How several processes find each other. No result depends on it, so no artifact stores it."""

    coordinator: str | None = None
    """HOST:PORT of process 0, the same for all processes; or `auto` on a TPU pod or under SLURM. One process unless given."""
    num_processes: int | None = None
    """How many processes there are; goes with --coordinator HOST:PORT."""
    process_id: int | None = None
    """Which of them this is, from 0."""

    def to_json(self) -> dict:
        own = {field.name for field in dataclasses.fields(ProcessOptions)}
        return {name: value for name, value in super().to_json().items() if name not in own}


# --- One config per command ----------------------------------------------------------------------------------------


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
class TrainConfig(TargetOptions, DataOptions, TrainingOptions, FeatureFormat, ProbeOptions, Seeded, ProcessOptions):
    """Train an EAGLE draft on the selected samples."""

    out: Path
    """Directory for checkpoints/ and metrics.jsonl; an interrupted run continues here."""
    selection: Path | None = None
    """selection.json, as `jsfdd select` wrote it; without it every sample is used."""
    shard_optimizer: bool = False
    """Keep Adam's moments in parts, one on each data shard, instead of whole on every device. Costs an exchange a step."""
    features: str = "store"
    """Hidden states: `store` computes them first and keeps them in OUT/hidden; `recompute` lets the target compute each batch's
    anew in every epoch and needs no disk; or a directory that `jsfdd score --keep-features` wrote."""

    def __post_init__(self):
        super().__post_init__()
        _check_features(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TargetOptions, DecodingOptions, Batched, Seeded, ProcessOptions):
    """Measure acceptance and speed by real speculative decoding."""

    draft: tuple[Path, ...]
    """Drafts, each a training run's directory, its checkpoints/, or an exported draft; several are compared in pairs."""
    prompts: tuple[Path, ...]
    """Prompts: files, directories or patterns as for --data; rows with "turns"; each turn's own answer feeds the next."""
    out: Path
    """Directory for report.json, or with several drafts for a directory of each and differences.json."""


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
class GenerateConfig(TargetOptions, DecodingOptions, Seeded):
    """Answer one prompt and print the text as it is decoded."""

    prompt: str
    """The user's message."""
    draft: Path | None = None
    """A training run's directory, its checkpoints/, or an exported draft."""
    no_draft: bool = False
    """Decode without a draft, one token a step."""
    show_accepted: bool = False
    """Mark the tokens that the draft proposed: green on a terminal, in [brackets] elsewhere."""

    def __post_init__(self):
        super().__post_init__()
        if (self.draft is None) != self.no_draft:
            raise ValueError("give either --draft DIR or --no-draft")
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


def _check_features(config: TrainConfig | RunConfig) -> None:
    if config.features == "recompute" and config.feature_dtype == "int8":
        raise ValueError("--feature-dtype int8 saves disk, and --features recompute needs none; take bfloat16 or float32")
