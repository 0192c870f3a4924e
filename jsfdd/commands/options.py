"""Groups of options that several commands share. A command's config has them as fields, and tyro draws each as a panel.

An option has the same name, meaning and default in every command. A group checks its values when it is made, from the command
line or from Python: a wrong value raises ValueError, with the remedy, before any work is done.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jsfdd.data.spans import MaskSpan
from jsfdd.decoding.settings import CombineBy
from jsfdd.hidden.rows import HiddenDtype
from jsfdd.selection.sfdd import Within
from jsfdd.training.recipe import PYTHON_ONLY, Recipe
from jsfdd.weights.card import ExportDtype, Flavour
from jsfdd.weights.chat_template import TemplateOptions, parse_date

# Leave out hints such as "(default: None)" and "(default: False)".
_UNSET = tyro.conf.arg(help_behavior_hint="")
Flag = Annotated[bool, _UNSET]
Paths = Annotated[tuple[Path, ...], tyro.conf.arg(help_behavior_hint="", metavar="PATH …")]
MaskSpans = Annotated[tuple[MaskSpan, ...], tyro.conf.arg(help_behavior_hint="", metavar="{thinking,tool_calls} …")]
OptionalPath = Annotated[Path | None, _UNSET]
OptionalInt = Annotated[int | None, _UNSET]
OptionalText = Annotated[str | None, _UNSET]
OptionalShare = Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="SHARE")]


def check(option: str, value, good: bool, wanted: str) -> None:
    """Raise ValueError unless `good`."""
    if not good:
        raise ValueError(f"{option}: got {value!r}, but it must be {wanted}")


def share_of(option: str, text: str | None) -> float | None:
    """Parse a share written as 5% or 0.05; ValueError for anything else."""
    if text is None:
        return None
    number, factor = (text[:-1], 0.01) if text.endswith("%") else (text, 1.0)
    try:
        share = float(number) * factor
    except ValueError:
        share = -1.0
    check(option, text, 0 <= share <= 1, "a share as 5% or 0.05")
    return share


def check_share(option: str, value: float) -> None:
    check(option, value, 0 < value <= 1, "a share in (0, 1]")


def check_at_least(least: int, **values: int | None) -> None:
    """Raise ValueError for the first option whose value is below `least`; None passes."""
    for name, value in values.items():
        check(option_of(name), value, value is None or value >= least, f"{least} or more")


def option_of(name: str) -> str:
    """The option of a field: "--" and dashes for underscores."""
    return "--" + name.replace("_", "-")


def flat(config) -> dict:
    """All options of a config by name, including those of its groups."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def to_json(config) -> dict:
    """A config in the form that artifacts store: flat, paths as strings, without the process options."""
    processes = {field.name for field in dataclasses.fields(ProcessOptions)}
    return {name: _plain(value) for name, value in flat(config).items() if name not in processes}


def _plain(value):
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def options_of(kind: type) -> dict[str, tuple[type, dataclasses.Field]]:
    """All options of a config class by name, including those of its groups: (type, field)."""
    types, options = typing.get_type_hints(kind, include_extras=True), {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[field.name]):
            options |= options_of(types[field.name])
        else:
            options[field.name] = (types[field.name], field)
    return options


def from_options(kind: type, **options):
    """Make a config from a flat list of options: `from_options(ScoreConfig, target="smollm2", …)`.

    Raises:
      ValueError: the config has no option of that name.
    """
    if unknown := sorted(set(options) - set(options_of(kind))):
        raise ValueError(f"{kind.__name__} has no option {', '.join(unknown)}; it has {', '.join(options_of(kind))}")
    types, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(group := types[field.name]):
            values[field.name] = from_options(group, **{name: options[name] for name in options_of(group) if name in options})
        elif field.name in options:
            values[field.name] = options[field.name]
    return kind(**values)


# --- Groups ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The target model, for which the draft is trained."""

    target: str
    """The target model: a Hugging Face directory, a .gguf file, a hub name, or `smollm2` (the packaged demo model)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the target's weights and activations. `auto` is bfloat16 on a GPU or TPU, and float32 on a CPU. Metrics,
    softmax and losses are always float32."""
    model_shards: int = 1
    """Devices that share one copy of the target; each such group takes different rows. Must divide the number of devices."""
    chat_template: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="FILE")] = None
    """A chat template to use instead of the target's: a Jinja file, or the name of one of the target's templates."""
    template_kwargs: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="JSON")] = None
    """Variables for the chat template, such as '{"enable_thinking": false}'. Use the values that the server uses."""
    date: str = "2024-07-26"
    """Today's date as chat templates see it. The default never changes, so the same chats always give the same tokens."""

    def __post_init__(self):
        check("--target", self.target, self.target != "", "a model's directory, file or name")
        check("--model-shards", self.model_shards, self.model_shards >= 1, "1 (whole on every device) or more")
        self.template_options()

    def template_options(self) -> TemplateOptions:
        """The chat template's options. ValueError if the date is invalid, or the variables are not a JSON object."""
        parse_date(self.date)
        try:
            kwargs = json.loads(self.template_kwargs or "{}")
        except ValueError as error:
            raise ValueError(f"--template-kwargs: got {self.template_kwargs!r}, which is not JSON ({error})") from error
        check("--template-kwargs", self.template_kwargs, isinstance(kwargs, dict), "a JSON object of variables")
        return TemplateOptions(self.chat_template, kwargs, self.date)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The conversations, which of their tokens count, and their batches."""

    data: Paths
    """Chats: files (.jsonl, .json or .csv, each also .gz or .zst; .parquet, .arrow), directories, patterns such as
    'chats/*.jsonl', or Hugging Face datasets (hf:NAME, hf:NAME:SPLIT). Rows are OpenAI messages, ShareGPT, Alpaca, or a
    question and its answer."""
    mask_spans: MaskSpans = ()
    """Parts of answers that are read but neither scored nor trained on: `thinking` (`<think>…</think>`), `tool_calls`. By
    default the whole answer counts."""
    max_length: int = 2048
    """Cut conversations after this many tokens, or where the target's context ends."""
    split_answers: Flag = False
    """If the chat template drops the thoughts of earlier answers, make every answer a sample of its own, with its thought."""
    strict: Flag = False
    """Stop at the first row that cannot be learned from. By default such rows are skipped and counted."""
    max_skipped: OptionalShare = None
    """Stop if more than this share of the rows is skipped, such as 1%. By default 5%, if more than three rows are skipped."""
    batch_tokens: int = 4096
    """Tokens in one batch, padding included: rows × length of a bucket. A training step divides a batch over all devices;
    scoring gives each device a batch. Scores and drafts do not depend on the number of devices."""

    def __post_init__(self):
        check("--data", self.data, len(self.data) > 0, "at least one chat file")
        check("--max-length", self.max_length, self.max_length >= 8, "8 tokens or more")
        check_at_least(1, batch_tokens=self.batch_tokens)
        share_of("--max-skipped", self.max_skipped)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Which of the scored samples are kept."""

    retain_ratio: float = 0.5
    """Share of the samples to keep."""
    within: Within = "all"
    """Rank `all` samples together, or those of each `source` or each `cluster` of like prompts separately; then each of these
    keeps this share, at least one."""

    def __post_init__(self):
        check_share("--retain-ratio", self.retain_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOptions:
    """How much of each source is in the training data."""

    mix: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="", metavar="SOURCE=WEIGHT …")] = ()
    """Train on a mixture of sources, such as `math=0.5 chat=0.5`. A row's source is its "source", or else its file's name.
    Weights are shares of the conversations; sources without a weight are left out. The mixture takes selected samples that are
    not held out, each at most once."""
    mix_total: OptionalInt = None
    """Conversations in the mixture. Default: as many as the scarcest source allows. A larger mixture contains the smaller
    ones."""

    def __post_init__(self):
        parts = [re.fullmatch(r"(.+)=(\d+|\d*\.\d+)", part) for part in self.mix]
        good = all(part and float(part[2]) > 0 for part in parts) and len({part[1] for part in parts}) == len(parts)
        check("--mix", self.mix, good, "different SOURCE=WEIGHT with weights above 0, as in math=0.5 chat=0.5")
        check_at_least(1, mix_total=self.mix_total)
        if self.mix_total is not None and not self.mix:
            raise ValueError("--mix-total is the size of a mixture; give its sources with --mix SOURCE=WEIGHT …")

    @property
    def shares(self) -> dict[str, float]:
        """Each source's share of the mixture; empty without a mixture."""
        weights = {source: float(weight) for source, _, weight in (part.rpartition("=") for part in sorted(self.mix))}
        return {source: weight / sum(weights.values()) for source, weight in weights.items()}


# The recipe on the command line: fields that only Python can set are fixed and hidden.
RecipeOptions = dataclasses.make_dataclass(
    "RecipeOptions",
    [(name, tyro.conf.Fixed[typing.get_type_hints(Recipe)[name]], getattr(Recipe, name)) for name in PYTHON_ONLY],
    bases=(Recipe,),
    frozen=True,
    kw_only=True,
)
RecipeOptions.__doc__ = "How the draft learns."


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenOptions:
    """The target's hidden states, which training reads."""

    no_hidden_store: Flag = False
    """Do not store hidden states. The target then computes those of each batch again in every epoch."""
    hidden_dtype: HiddenDtype = "bfloat16"
    """Dtype of stored hidden states. int8 has a scale per token and takes half of bfloat16's disk."""

    def __post_init__(self):
        if self.no_hidden_store and self.hidden_dtype == "int8":
            raise ValueError("--hidden-dtype int8 saves disk, and --no-hidden-store needs none; take bfloat16 or float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How answers are decoded."""

    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 decodes greedily; above 0, sample from the target's distribution at this temperature."""
    top_k: int = 0
    """Above temperature 0, sample only from the k most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Above temperature 0, sample only from the smallest set of most probable tokens with at least this total probability."""
    num_draft_tokens: int = 4
    """Draft tokens in a row (γ): the length of a chain or the depth of a tree."""
    tree_nodes: int = 0
    """Verify a tree of this many draft tokens (EAGLE-2 uses 60); 0 verifies a chain."""
    tree_top_k: int = 10
    """Children per node of a tree, and nodes that the draft reads per level."""

    def __post_init__(self):
        check_at_least(1, max_new_tokens=self.max_new_tokens, tree_top_k=self.tree_top_k)
        check("--temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more")
        check("--top-k", self.top_k, self.top_k >= 0, "0 (all tokens) or more")
        check("--top-p", self.top_p, 0 < self.top_p <= 1, "a share of the probability in (0, 1]")
        check_num_draft_tokens(self.num_draft_tokens)
        check("--tree-nodes", self.tree_nodes, 0 <= self.tree_nodes <= 1024, "0 (a chain) or up to 1024 draft tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """The drafts to decode with."""

    draft: Paths = ()
    """Training runs' directories, their checkpoints/, exported drafts, or `smollm2` (the packaged draft of that target).
    Without a draft, decoding is plain."""
    combine: Annotated[CombineBy | None, _UNSET] = None
    """Decode with all drafts at once: `average` their weights into one draft, `route` each step to the draft whose tree is the
    most probable, or `merge` their trees into one of --tree-nodes. In a tie the earlier draft wins."""


def check_num_draft_tokens(value: int) -> None:
    check("--num-draft-tokens", value, 1 <= value <= 32, "from 1 to 32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The format of exported drafts."""

    flavour: Flavour | Literal["none"] = "vllm"
    """The layout of exported drafts. With `none`, `jsfdd run` leaves them as checkpoints, which every command of jsfdd
    reads."""
    export_dtype: ExportDtype = "keep"
    """Dtype of exported tensors. `keep` writes them as they are; training makes them float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """How several processes find each other. Results do not depend on these options, so no artifact stores them."""

    coordinator: OptionalText = None
    """HOST:PORT of process 0, the same for all processes; or `auto` on a TPU pod or under SLURM. Default: a single process."""
    num_processes: OptionalInt = None
    """Number of processes. Goes with --coordinator HOST:PORT."""
    process_id: OptionalInt = None
    """Number of this process, from 0. Goes with --coordinator HOST:PORT."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How the command runs and prints."""

    dry_run: Flag = False
    """Read and check the inputs, print what would be done, and stop. No model runs and no file is written."""
    json: Flag = False
    """Print the result as one line of JSON on stdout, for scripts. Progress and errors stay on stderr."""
