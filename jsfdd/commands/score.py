"""`jsfdd score`: run the target over the chats once, and score its distributions.

It writes:

    scores.parquet         one row per sample
    token_scores.parquet   with --per-token, the counted tokens' flatness and entropy
    hidden/                with --keep-hidden, the hidden states of samples that can be selected
    scores.parts/          finished batches, from which an interrupted run continues
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jsfdd.commands.inputs import Inputs, Loaded, imported_states, known_identity, load, read_inputs
from jsfdd.commands.options import (
    ChatOptions,
    Flag,
    HiddenDtype,
    HiddenOptions,
    ModelOptions,
    OptionalPath,
    ProcessOptions,
    RecipeOptions,
    SelectionOptions,
    Within,
    check,
    check_share,
    option_of,
)
from jsfdd.commands.outcome import Outcome, counts_to_json, many, planned
from jsfdd.models.architecture import DraftKind
from jsfdd.scoring.metrics import METRICS

if TYPE_CHECKING:
    from jsfdd.base.records import Sample
    from jsfdd.hidden.best_k import StillPossible
    from jsfdd.hidden.capture import HiddenKeeper
    from jsfdd.models.architecture import DecoderConfig
    from jsfdd.scoring.table import ScoreTable

HIDDEN = "hidden"  # directory of hidden states in a stage's --out

EXAMPLES = """
jsfdd score --target smollm2 --data chats.jsonl --out scored
jsfdd score --target DIR --data 'chats/*.jsonl.zst' more/ hf:ORG/NAME:train --out scored --dry-run
jsfdd score --target DIR --data chats/ --keep-hidden flatness --retain-ratio 0.5 --out scored
jsfdd score --target DIR --data answers.jsonl --hidden-from states/ --out scored
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score chats by how flat the target's next-token distributions are."""

    model: ModelOptions
    chats: ChatOptions
    processes: ProcessOptions = ProcessOptions()
    out: Path
    """Directory for scores.parquet. An interrupted run continues here."""
    per_token: Flag = False
    """Also write token_scores.parquet: one row per sample, with lists of its counted tokens' flatness and entropy."""
    hidden_from: OptionalPath = None
    """Score hidden states that another program wrote into this directory, such as vLLM's extract connector: one safetensors
    file a conversation. Of the target only config, tokenizer, embedding, final norm and head are read."""
    keep_hidden: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="", metavar="ARM …")] = ()
    """In the same pass, store hidden states in OUT/hidden for `jsfdd train --hidden-from`. An ARM is a metric, for the samples
    that it can select, or `full`, for all samples. States of other samples are deleted as soon as they are ruled out."""
    retain_ratio: float = SelectionOptions.retain_ratio
    """With --keep-hidden: the share of the samples that the selection will keep."""
    within: Within = SelectionOptions.within
    """With --keep-hidden: how the selection will rank samples, as for `jsfdd select`. Clusters are known only when all prompts
    are, so with `cluster` the states of all samples stay on disk until the end."""
    held_out_share: float = RecipeOptions.held_out_share
    """With --keep-hidden: the share of the samples that training will hold out; their hidden states are stored, too."""
    draft_kind: DraftKind = RecipeOptions.draft_kind
    """With --keep-hidden: the kind of draft to train. Of `eagle3` the inputs of three layers are kept too."""
    hidden_dtype: HiddenDtype = HiddenOptions.hidden_dtype
    """With --keep-hidden: dtype of stored hidden states. int8 has a scale per token and takes half of bfloat16's disk."""
    seed: int = 0
    """Seed of every random choice of the command."""

    def __post_init__(self):
        check_share("--retain-ratio", self.retain_ratio)
        check_held_out_share(self.held_out_share)
        check_arms("--keep-hidden", self.keep_hidden)
        if self.hidden_from is not None and self.keep_hidden:
            raise ValueError("--hidden-from names hidden states that are kept already; leave --keep-hidden out")


def prepare(config: ScoreConfig) -> Inputs:
    from jsfdd.scoring.parts import check_parts

    if not config.keep_hidden:
        check_only_with_keep_hidden(config, ("retain_ratio", "within", "held_out_share", "hidden_dtype", "draft_kind"))
    if config.hidden_from is not None and is_store(config.hidden_from):
        raise ValueError(
            f"--hidden-from {config.hidden_from}: states that `jsfdd score --keep-hidden` kept, with their scores beside them; "
            "give the directory of another program's states"
        )
    inputs = read_inputs(config.model, config.chats, config.hidden_from)
    layers_kept(config, inputs.target.config)
    if (parts := config.out / "scores.parts").exists():
        options = {"batch_tokens": config.chats.batch_tokens, "per_token": config.per_token}
        check_parts(parts, known_identity(config, inputs) | options)
    return inputs


def layers_kept(config: ScoreConfig, target: DecoderConfig) -> tuple[int, ...]:
    """The layers whose inputs --keep-hidden keeps. ValueError: the target has too few."""
    from jsfdd.models.draft import layers_read

    return layers_read(target, config.draft_kind) if config.keep_hidden else ()


def run(config: ScoreConfig, inputs: Inputs) -> Outcome:
    path = config.out / "scores.parquet"
    before = _identity_in(path)
    table = score(config, load(config, inputs))
    values = {"command": "score", "samples": len(table.ids), "scores": path, "files": counts_to_json(inputs.files)}
    words = f"{many(len(table.ids), 'sample')} scored{' before' if table.identity == before else ''}: {path}"
    if config.keep_hidden:
        values["hidden"] = config.out / HIDDEN
        words += f"; hidden states kept for {' '.join(config.keep_hidden)}: {values['hidden']}"
    return Outcome(values, words)


def _identity_in(path: Path) -> dict | None:
    """The identity of the scores that are there; None where there are none, or damaged ones, which will be written anew."""
    from jsfdd.scoring.table import read_scores

    try:
        return read_scores(path).identity
    except (FileNotFoundError, ValueError):
        return None


def describe(config: ScoreConfig, inputs: Inputs) -> Outcome:
    values, words = describe_scoring(inputs)
    if config.hidden_from is not None:
        words.append(f"read hidden states from {config.hidden_from}, and of the target no layers")
    files = ["scores.parquet", *(["token_scores.parquet"] if config.per_token else []), "scores.parts/"]
    if config.keep_hidden:
        values["hidden_bytes"], line = describe_kept(config, inputs)
        words.append(line)
        files.append(f"{HIDDEN}/")
    return planned("score", values, words, config.out, files, continues=config.out / "scores.parts")


def score(config: ScoreConfig, loaded: Loaded | None = None) -> ScoreTable:
    """Write scores.parquet (and token_scores.parquet and hidden/ as the options ask), and return the table."""
    from jsfdd.base.lock import sole_writer
    from jsfdd.base.processes import agree_on_directory

    loaded = loaded or load(config, prepare(config))
    agree_on_directory(config.out)
    with sole_writer(config.out):
        return _score(config, loaded)


def _score(config: ScoreConfig, loaded: Loaded) -> ScoreTable:
    from jsfdd.base.processes import is_primary, wait_for_all
    from jsfdd.scoring.score import score_samples
    from jsfdd.scoring.table import write_scores, write_token_scores

    with keeper(config, loaded) if config.keep_hidden else nullcontext() as kept:
        table = score_samples(
            loaded.target,
            loaded.samples,
            loaded.mesh,
            batch_tokens=config.chats.batch_tokens,
            identity=loaded.identity,
            parts_dir=config.out / "scores.parts",
            per_token=config.per_token,
            keeper=kept,
            hidden=None if loaded.states is None else imported_states(loaded, "float32"),
        )
    if is_primary():
        write_scores(config.out / "scores.parquet", table)
        if config.per_token:
            write_token_scores(config.out / "token_scores.parquet", table)
    wait_for_all("scores written")
    return table


def keeper(config: ScoreConfig, loaded: Loaded) -> AbstractContextManager[HiddenKeeper]:
    """The keeper that stores the hidden states of --keep-hidden in OUT/hidden."""
    from jsfdd.hidden.capture import keep_hidden

    return keep_hidden(
        loaded.target,
        still_possible(config, loaded.samples),
        directory=config.out / HIDDEN,
        identity=loaded.identity,
        kept_for=rule_of(config),
        dtype=config.hidden_dtype,
        layers=layers_kept(config, loaded.target.config),
    )


def rule_of(config: ScoreConfig) -> dict:
    """The rule by which hidden states are kept."""
    names = ("keep_hidden", "retain_ratio", "within", "seed", "held_out_share")
    return {name: getattr(config, name) for name in names}


def still_possible(config: ScoreConfig, samples: Sequence[Sample]) -> StillPossible:
    """The samples that the arms of --keep-hidden may select, before anything is scored."""
    from jsfdd.data.held_out import split_held_out
    from jsfdd.hidden.best_k import StillPossible

    _, held_out = split_held_out(samples, config.held_out_share)
    always = {sample.id for sample in held_out}
    if "full" in config.keep_hidden:
        always |= {sample.id for sample in samples if sample.counted.any()}
    metrics = [arm for arm in config.keep_hidden if arm != "full"]
    return StillPossible(samples, metrics, config.retain_ratio, config.seed, always, config.within)


def check_only_with_keep_hidden(config, names: Sequence[str]) -> None:
    """Raise ValueError if an option is set that only --keep-hidden reads."""
    for name in names:
        if getattr(config, name) != getattr(ScoreConfig, name):
            raise ValueError(f"{option_of(name)} goes with --keep-hidden; without it every sample is scored or answered")


def check_held_out_share(value: float) -> None:
    check("--held-out-share", value, 0 <= value < 0.5, "a share of the samples in [0, 0.5)")


def check_arms(option: str, arms: Sequence[str]) -> None:
    """Raise ValueError unless all arms are different, and each is `full` or a metric."""
    check(option, arms, len(set(arms)) == len(arms), "different arms")
    choices = ("full", *METRICS)
    for arm in arms:
        if arm not in choices:
            raise ValueError(f"{option}: {arm!r} is unknown; choose from {', '.join(choices)}")


def is_store(directory: Path) -> bool:
    """Whether jsfdd wrote the hidden states in a directory; else another program did."""
    from jsfdd.hidden.store import MANIFEST

    return (directory / MANIFEST).exists()


# --- Parts of a description: (values, words) -------------------------------------------------------------------------


def describe_scoring(inputs: Inputs) -> tuple[dict, list[str]]:
    from jsfdd.base.mesh import num_data_shards
    from jsfdd.data.batches import make_batches, padding_share
    from jsfdd.data.counts import total

    lengths = [len(sample.tokens) for sample in inputs.samples]
    plans = make_batches(lengths, inputs.shapes)
    values = {
        "files": counts_to_json(inputs.files),
        "samples": len(lengths),
        "skipped": total(inputs.files).read - total(inputs.files).kept,
        "tokens": sum(lengths),
        "counted_tokens": counted_tokens(inputs.samples),
        "batches": len(plans),
        "padding_share": padding_share(plans, lengths),
        "devices": num_data_shards(inputs.mesh),
    }
    return values, [
        f"score {many(len(lengths), 'sample')} ({many(values['skipped'], 'row')} skipped): {values['tokens']:,} tokens, "
        f"{values['counted_tokens']:,} of them counted",
        f"in {many(len(plans), 'batch', 'es')}, {values['padding_share']:.0%} padding, on {many(values['devices'], 'device')}",
    ]


def describe_kept(config: ScoreConfig, inputs: Inputs) -> tuple[int, str]:
    """Describe the hidden states of --keep-hidden: exact for `full`, else an estimate that every sample is as likely kept."""
    tokens, layers = still_possible(config, inputs.samples).expected_tokens, layers_kept(config, inputs.target.config)
    size, words = describe_hidden(config.hidden_dtype, inputs, tokens, layers)
    return size, f"keep {'' if 'full' in config.keep_hidden else 'about '}{words}, in the same pass"


def hidden_bytes(dtype: HiddenDtype, hidden_size: int, tokens: float, num_layers: int = 0) -> int:
    """Bytes on disk of the hidden states of `tokens` tokens, with the inputs of so many layers."""
    from jsfdd.hidden.rows import row_bytes

    parts = num_layers + 1
    return round(tokens * row_bytes(dtype, parts * hidden_size, parts))


def describe_hidden(dtype: HiddenDtype, inputs: Inputs, tokens: float, layers: tuple[int, ...] = ()) -> tuple[int, str]:
    """Describe the hidden states of `tokens` tokens: (bytes, words)."""
    size = hidden_bytes(dtype, inputs.target.config.hidden_size, tokens, len(layers))
    with_layers = f" and inputs of layers {', '.join(map(str, layers))}" if layers else ""
    return size, f"{size / 1e6:,.1f} MB of hidden states{with_layers}"


def counted_tokens(samples: Sequence[Sample]) -> int:
    return sum(int(sample.counted.sum()) for sample in samples)
