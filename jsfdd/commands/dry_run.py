"""`--dry-run`: what a stage would do, found without running a model or writing a file.

Inputs and options are read and checked as the stage itself does it (the target's weights are not read), so what is wrong
with them is the same error with the same exit code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jsfdd.base.mesh import make_mesh, num_data_shards
from jsfdd.base.records import Prompt, Sample
from jsfdd.commands import hidden_stage as hidden
from jsfdd.commands import pipeline
from jsfdd.commands.configs import (
    EvaluateConfig,
    ExportConfig,
    RespondConfig,
    RunConfig,
    ScoreConfig,
    SelectConfig,
    TrainConfig,
    stores_target,
)
from jsfdd.commands.drafts import measured_drafts, names_of
from jsfdd.commands.inputs import show_counts
from jsfdd.commands.options import DataOptions, TargetOptions
from jsfdd.commands.outcome import Result, counts_to_json
from jsfdd.commands.respond import ask, parts_of
from jsfdd.data.batches import Shape, choose_shapes, epoch_batches, make_batches, padding_share
from jsfdd.data.chat import read_chat_files, read_prompts
from jsfdd.data.counts import FileCounts, count_by_file, total
from jsfdd.data.template import tokenize_chats
from jsfdd.decoding.ensemble import members_of
from jsfdd.decoding.prompts import check_length, render_turns
from jsfdd.evaluation.evaluate import check_draft
from jsfdd.hidden.rows import row_bytes
from jsfdd.scoring.table import read_scores
from jsfdd.selection import sfdd
from jsfdd.selection.mixture import contents, in_words
from jsfdd.training.soft_rows import row_words
from jsfdd.training.train import draft_of
from jsfdd.weights.target import Target, describe_target


def dry_run(config) -> Result:
    """What the stage of `config` would do; its errors are the stage's."""
    match config:
        case RunConfig():
            return _run(config)
        case RespondConfig():
            return _respond(config)
        case ScoreConfig():
            return _score(config)
        case SelectConfig():
            return _select(config)
        case TrainConfig():
            return _train(config)
        case EvaluateConfig():
            return _evaluate(config)
        case ExportConfig():
            return _export(config)
    raise TypeError(f"{type(config).__name__} has no dry run")


def _respond(config: RespondConfig) -> Result:
    asked = ask(config)
    turns = Counter(turn for each in asked.questions for turn in range(len(each.turns)))
    values = {
        "files": counts_to_json(asked.files),
        "conversations": len(asked.questions),
        "skipped": total(asked.files).read - len(asked.questions),
        "answers": turns.total(),
        "max_new_tokens": config.max_new_tokens,
    }
    words = [
        f"answer {_many(values['conversations'], 'conversation')} ({_many(values['skipped'], 'row')} skipped): "
        f"{_many(values['answers'], 'answer')} of up to {_many(config.max_new_tokens, 'token')}",
        f"{config.batch_size} at a time, {'with a draft' if config.draft else 'a token a step'}",
    ]
    parts = parts_of(config.out)
    return _result("respond", values, words, config.out.parent, [config.out.name, parts.name], continues=parts)


_RECOMPUTED = "compute the hidden states of each batch at every step; store none"


class _Inputs(NamedTuple):
    target: Target  # without weights
    samples: list[Sample]
    files: list[FileCounts]
    shapes: tuple[Shape, ...]
    devices: int


def _inputs(config: TargetOptions | DataOptions) -> _Inputs:
    found = read_chat_files(config.data)
    target = describe_target(config.target)
    samples, summary = tokenize_chats(found.chats, target.tokenizer, config.max_length, config.mask_spans)
    files = count_by_file(found, summary)
    show_counts(files)
    devices = num_data_shards(make_mesh(model=config.model_shards))
    shapes = choose_shapes([len(sample.tokens) for sample in samples], config.batch_tokens)
    return _Inputs(target, samples, files, shapes, devices)


def _score(config: ScoreConfig) -> Result:
    inputs = _inputs(config)
    values, words = _scoring(inputs)
    files = ["scores.parquet", *(["token_scores.parquet"] if config.per_token else []), "scores.parts/"]
    if config.keep_features:
        values["hidden_bytes"], said = _kept_while_scoring(config, inputs)
        words.append(said)
        files.append(f"{hidden.FOLDER}/")
    return _result("score", values, words, config.out, files, continues=config.out / "scores.parts")


def _select(config: SelectConfig) -> Result:
    table = read_scores(config.scores)
    selection = sfdd.select(table, config.metric, config.retain_ratio, config.seed, config.unit, config.within)
    values = {"kept": len(selection.ids), "without_counted_token": len(selection.dropped), "thresholds": selection.thresholds}
    words = [f"keep {_many(len(selection.ids), 'sample')}; {len(selection.dropped):,} without a counted token"]
    return _result("select", values, words, config.out, ["selection.json"])


def _train(config: TrainConfig) -> Result:
    if config.probe_prompts:
        read_prompts(config.probe_prompts)
    inputs = _inputs(config)
    selection = None if config.selection is None else sfdd.read_selection(config.selection)
    kept, held_out = pipeline.training_sides(inputs.samples, selection, config)
    values, words = _training(config, inputs, kept, held_out)
    samples, files = [*kept, *held_out], ["checkpoints/", "metrics.jsonl", "timings.jsonl"]
    values["hidden_bytes"] = 0
    if config.features == hidden.STORE:
        tokens = sum(len(sample.tokens) for sample in samples)
        values["hidden_bytes"], said = _hidden(config, inputs, tokens)
        words.append(f"store {said}")
        files.insert(0, f"{hidden.FOLDER}/")
    elif config.features == hidden.RECOMPUTE:
        words.append(_RECOMPUTED)
    else:
        # Whose target they are of is not known without the weights.
        hidden.open_features(config, None, samples, selection)
        words.append(f"read hidden states from {config.features}")
    stored, said = _known(config, inputs, kept)
    words += said
    files[:0] = [f"{name}/" for name, size in stored.items() if size]
    values |= {f"{name}_bytes": size for name, size in stored.items()}
    return _result("train", values, words, config.out, files, continues=config.out / "checkpoints")


def _evaluate(config: EvaluateConfig) -> Result:
    pipeline.tree_shape(config)
    prompts = read_prompts(config.prompts)
    drafts = measured_drafts(config)
    target = describe_target(config.target)
    for name, draft in drafts.items():
        for member, its in members_of(name, draft).items():
            check_draft(target, its.config, member)
    values, words = _decoding(config, target, prompts)
    words = [f"{line}, for {_many(len(drafts), 'draft')}" for line in words]
    if config.combine is not None:
        how = {"average": "their average", "route": "each step routed to one of them", "merge": "their trees merged"}
        nodes = f", {_many(config.tree_nodes, 'node')} a tree" if config.tree_nodes else ""
        words.append(f"{config.combine}: {' and '.join(names_of(config.draft))}, {how[config.combine]}{nodes}")
    several = [*(f"{name}/report.json" for name in drafts), "differences.json"]
    files = several if len(drafts) > 1 else ["report.json"]
    return _result("evaluate", values | {"drafts": list(drafts), "combine": config.combine}, words, config.out, files)


def _export(config: ExportConfig) -> Result:
    draft, *_ = pipeline.plan_export(config)
    if config.out.exists():
        raise FileExistsError(f"{config.out}: already there; choose another --out or remove it")
    decoder = draft.config.decoder
    values = {"flavour": config.flavour, "hidden_size": decoder.hidden_size, "vocab_size": decoder.vocab_size}
    words = [f"write a draft of width {decoder.hidden_size:,} in the layout of {config.flavour}"]
    return _result("export", values, words, config.out, ["config.json", "model.safetensors", "README.md"])


def _run(config: RunConfig) -> Result:
    pipeline.check_claim(config)
    prompts = read_prompts(config.prompts)
    inputs = _inputs(config)
    scoring, scoring_words = _scoring(inputs)
    words = list(scoring_words)
    kept, held_out = pipeline.training_sides(inputs.samples, None, config)
    arms = {}
    for arm in config.arms:
        # Which samples an arm keeps is known when they are scored; how many, and so about how many steps, is known now.
        share = 1.0 if arm == "full" or config.mix_total else config.retain_ratio
        values, said = _training(config, inputs, kept, held_out, share, estimated=arm != "full")
        arms[arm] = values
        words += [f"{arm}: {line}" for line in said]
    scoring_config, hidden_bytes, said = hidden.scoring_of_run(config), 0, _RECOMPUTED
    if scoring_config.keep_features:
        hidden_bytes, said = _kept_while_scoring(scoring_config, inputs)
    elif config.features == hidden.STORE:
        tokens = sum(len(sample.tokens) for sample in inputs.samples)
        hidden_bytes, said = _hidden(config, inputs, tokens)
        said = f"store at most {said}, once it is selected"
    # Arms mix what they selected, so together they may train on more than one mixture.
    stored, also = _known(config, inputs, inputs.samples if config.mix else kept)
    words[len(scoring_words) : len(scoring_words)] = [said, *also]
    decoding, said = _decoding(config, inputs.target, prompts)
    words += [f"{line}, for {_many(len(arms), 'draft')}" for line in said]
    stores = [f"{hidden.FOLDER}/"] * bool(hidden_bytes) + [
        f"{name}/" for name, size in stored.items() if size and not config.draft_vocab
    ]
    files = ["scores.parquet", "token_scores.parquet", *stores, *(f"arms/{arm}/" for arm in arms)]
    files += ["summary.json", "report.html"]
    values = {"scoring": scoring, "hidden_bytes": hidden_bytes, "arms": arms, "decoding": decoding}
    return _result("run", values, words, config.out, files, continues=config.out / "run.json")


# --- The parts of a plan: (values, words) --------------------------------------------------------------------------


def _scoring(inputs: _Inputs) -> tuple[dict, list[str]]:
    lengths = [len(sample.tokens) for sample in inputs.samples]
    plans = make_batches(lengths, inputs.shapes)
    values = {
        "files": counts_to_json(inputs.files),
        "samples": len(lengths),
        "skipped": total(inputs.files).read - len(lengths),
        "tokens": sum(lengths),
        "counted_tokens": _counted(inputs.samples),
        "batches": len(plans),
        "padding_share": padding_share(plans, lengths),
        "devices": inputs.devices,
    }
    return values, [
        f"score {_many(len(lengths), 'sample')} ({_many(values['skipped'], 'row')} skipped): {values['tokens']:,} tokens, "
        f"{values['counted_tokens']:,} of them counted",
        f"in {_many(len(plans), 'batch', 'es')}, {values['padding_share']:.0%} padding, on {_many(inputs.devices, 'device')}",
    ]


def _training(
    config: TrainConfig | RunConfig,
    inputs: _Inputs,
    kept: Sequence[Sample],
    held_out: Sequence[Sample],
    share: float = 1.0,
    estimated: bool = False,
) -> tuple[dict, list[str]]:
    """Training on `kept`; if `estimated`, about what a `share` of such samples would take."""
    lengths = [len(sample.tokens) for sample in kept]
    steps = config.epochs * math.ceil(len(epoch_batches(lengths, inputs.shapes, config.seed, epoch=0)) / config.accumulate)
    samples = max(1, math.floor(share * len(kept) + 0.5))
    values = {
        "samples": samples,
        "held_out": len(held_out),
        "tokens": round(share * sum(lengths)),
        "counted_tokens": round(share * _counted(kept)),
        "epochs": config.epochs,
        "steps": math.ceil(share * steps),
        "estimated": estimated,
    }
    about = "about " if estimated else ""
    words = [
        f"train on {about}{_many(samples, 'sample')} ({len(held_out):,} held out): {about}{_many(values['steps'], 'step')} in "
        f"{_many(config.epochs, 'epoch')} of {about}{values['tokens']:,} tokens",
    ]
    if config.mix and not estimated:
        values["mix"] = contents(kept)
        words.append(f"a mixture of {in_words(values['mix'])}")
    return values, words


def _kept_while_scoring(config: ScoreConfig, inputs: _Inputs) -> tuple[int, str]:
    """Of all arms of --keep-features; exact for `full`, else as if every sample were as likely to stay."""
    size, said = _hidden(config, inputs, hidden.still_possible(config, inputs.samples).expected_tokens)
    return size, f"keep {'' if 'full' in config.keep_features else 'about '}{said}, in the same pass"


def _hidden(config: ScoreConfig | TrainConfig | RunConfig, inputs: _Inputs, tokens: float) -> tuple[int, str]:
    """Bytes of the hidden states of so many tokens on disk."""
    size = round(tokens * row_bytes(config.feature_dtype, inputs.target.config.hidden_size))
    return size, f"{size / 1e6:,.1f} MB of hidden states"


def _known(config: TrainConfig | RunConfig, inputs: _Inputs, samples: Sequence[Sample]) -> tuple[dict[str, int], list[str]]:
    """What of the target's distributions of at most these samples is stored: (bytes by folder, words)."""
    target, stored = inputs.target.config, {hidden.MEANS: 0, hidden.TOP_K: 0}
    draft_of(target, config, samples)  # whose errors are the stage's
    if not stores_target(config):
        return stored, []
    tokens = sum(len(sample.tokens) for sample in samples)
    if config.target_top_k:
        words = row_words(config.target_top_k, target.vocab_size, config.draft_vocab)
        name, what, row = hidden.TOP_K, f"the target's {config.target_top_k} likeliest tokens", row_bytes("uint16", words)
    else:
        name, what, row = hidden.MEANS, "target means", row_bytes("bfloat16", target.hidden_size + 1)
    size = tokens * row
    return stored | {name: size}, [f"store at most {size / 1e6:,.1f} MB of {what}"]


def _decoding(config: EvaluateConfig | RunConfig, target: Target, prompts: Sequence[Prompt]) -> tuple[dict, list[str]]:
    # Prompts of one source and turn are decoded together.
    together = Counter((prompt.source, turn) for prompt in prompts for turn in range(len(prompt.turns)))
    lengths = [len(render_turns(target, prompt, [])) for prompt in prompts]
    for prompt, length in zip(prompts, lengths):
        check_length(target, prompt, length, config.max_new_tokens)
    devices = num_data_shards(make_mesh(model=config.model_shards))
    batch_size = -(-config.batch_size // devices) * devices
    values = {
        "prompts": len(prompts),
        "turns": together.total(),
        "batches": sum(-(-count // batch_size) for count in together.values()),
        "longest_prompt": max(lengths),
        "max_new_tokens": config.max_new_tokens,
    }
    batches, longest = _many(values["batches"], "batch", "es"), _many(config.max_new_tokens, "new token")
    return values, [
        f"decode {_many(len(prompts), 'prompt')} ({_many(values['turns'], 'turn')}) in {batches}, up to {longest} each, "
        "with and without a draft"
    ]


def _many(count: int, noun: str, ending: str = "s") -> str:
    """ "1 row", "2 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def _counted(samples: Sequence[Sample]) -> int:
    return sum(int(sample.counted.sum()) for sample in samples)


def _result(
    command: str, values: dict, words: Sequence[str], out: Path, files: Sequence[str], continues: Path | None = None
) -> Result:
    """The plan as a result; `continues` is what an earlier start would have left."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: not a directory; choose another --out")
    started = continues is not None and continues.exists()
    paths = [f"{out / file}{'/' if file.endswith('/') else ''}" for file in files]
    values = {"command": command, "dry_run": True} | values | {"continues": started, "would_write": paths}
    begin = "continue what was begun in" if started else "write to"
    lines = [f"dry run of {command}: nothing was computed or written", *words, f"{begin} {out}: {', '.join(files)}"]
    return Result(values, "\n  ".join(lines))
