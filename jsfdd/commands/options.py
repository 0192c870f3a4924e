"""Groups of options, declared once.

An option has one name, one meaning and one default wherever it appears: groups of options are small frozen dataclasses,
and a stage's config (`config.py`) inherits the groups it needs.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Literal

from jsfdd.data.spans import MaskSpan
from jsfdd.decoding.settings import CombineBy, RouteBy
from jsfdd.hidden.rows import HiddenDtype
from jsfdd.selection.mixture import MixUnit
from jsfdd.training.recipe import Recipe
from jsfdd.weights.card import Flavour
from jsfdd.weights.export import ExportDtype

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
    "epochs": (lambda x: x >= 1, "1 or more"),
    "retain_ratio": (lambda x: 0 < x <= 1, "a share of the samples in (0, 1]"),
    "held_out_share": (lambda x: 0 <= x < 0.5, "a share of the samples in [0, 0.5)"),
    "mix": (lambda x: _is_mix(x), "different SOURCE=WEIGHT with weights above 0, as in math=0.5 chat=0.5"),
    "mix_total": (lambda x: x is None or x >= 1, "1 or more"),
    "temperature": (lambda x: x >= 0, "0 (greedy) or more"),
    "top_k": (lambda x: x >= 0, "0 (all tokens) or more"),
    "top_p": (lambda x: 0 < x <= 1, "a share of the probability in (0, 1]"),
    "num_draft_tokens": (lambda x: 1 <= x <= 32, "from 1 to 32"),
    "tree_nodes": (lambda x: 0 <= x <= 1024, "0 (a chain) or up to 1024 draft tokens"),
    "tree_top_k": (lambda x: x >= 1, "1 or more"),
    "combine_weights": (lambda x: not x or abs(sum(x) - 1) < 1e-6, "weights that sum to 1, for else they scale the draft"),
    "route_steps": (lambda x: x >= 0, "0 (every step decides) or more"),
    "max_new_tokens": (lambda x: x >= 1, "1 or more"),
    "batch_size": (lambda x: x >= 1, "1 or more"),
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


def _is_mix(mix: tuple[str, ...]) -> bool:
    parts = [re.fullmatch(r"(.+)=(\d+|\d*\.\d+)", each) for each in mix]
    return all(part and float(part[2]) > 0 for part in parts) and len({part[1] for part in parts}) == len(parts)


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
    within: Literal["all", "source"] = "all"
    """Among which samples a share is kept: among all, or among those of each source, at least one of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(_Options, Recipe):
    """How the draft learns."""

    def __post_init__(self):
        _Options.__post_init__(self)
        Recipe.__post_init__(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixOptions(_Options):
    """How much of each source is trained on."""

    mix: tuple[str, ...] = ()
    """Train on a mixture of sources, as in `math=0.5 chat=0.5`; a row's source is its "source" or else its file's name. Weights
    count in proportion; sources without one are left out. What is selected and not held out is mixed, and nothing repeated."""
    mix_unit: MixUnit = "samples"
    """What the weights are shares of: conversations, or the tokens of their answers."""
    mix_total: int | None = None
    """So many of them in all; unless given, as many as the scarcest source allows. A larger total keeps a smaller one's."""

    def __post_init__(self):
        super().__post_init__()
        if self.mix_total is not None and not self.mix:
            raise ValueError("--mix-total is the size of a mixture; say of what with --mix SOURCE=WEIGHT …")

    @property
    def mix_shares(self) -> dict[str, float]:
        """Each source's share of the mixture; empty without one."""
        weights = {source: float(weight) for source, _, weight in (each.rpartition("=") for each in sorted(self.mix))}
        return {source: weight / sum(weights.values()) for source, weight in weights.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureFormat(_Options):
    """Stored hidden states."""

    feature_dtype: HiddenDtype = "bfloat16"
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
class CombineOptions(_Options):
    """Several drafts at once."""

    combine: CombineBy | None = None
    """Decode with all drafts at once: `average` their weights into one draft, `route` each step to the draft that is surest of
    its tree, or `merge` their trees into one of --tree-nodes. Of drafts that tie the earlier counts."""
    combine_weights: tuple[float, ...] = ()
    """For `average`: a weight for each draft, 1 in all; below 0 leads away from a draft. Equal weights unless given."""
    route_by: RouteBy = "confidence"
    """For `route`: how sure a draft is. The mean probability of its tree's paths, or a low entropy of its first token."""
    route_steps: int = 0
    """For `route`: after this many steps an answer is left to the draft that was surest in them, and the other drafts only run
    while another answer of the batch needs them; 0 decides anew in every step."""

    def __post_init__(self):
        super().__post_init__()
        if self.combine_weights and self.combine != "average":
            raise ValueError("--combine-weights does nothing without --combine average")
        if (self.route_by, self.route_steps) != ("confidence", 0) and self.combine != "route":
            raise ValueError("--route-by and --route-steps do nothing without --combine route")


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
