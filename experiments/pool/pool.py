"""One pool of chats, read by the target once, on which any number of drafts are trained and judged. See README.md.

pool = open_pool(options)                     # scores, hidden states, soft targets, recorded answers: computed once, kept
row = run_arm(pool, name, arm)                # trains one draft, judges it on all recorded answers; done arms are read
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jsfdd.base.records import Prompt, Sample
from jsfdd.commands import score
from jsfdd.commands.inputs import Loaded, load
from jsfdd.commands.options import ChatOptions, ModelOptions
from jsfdd.commands.score import ScoreConfig
from jsfdd.data.batches import Shape, choose_shapes
from jsfdd.data.chat import read_prompts
from jsfdd.evaluation import replay
from jsfdd.hidden.capture import store_hidden
from jsfdd.hidden.store import HiddenStore
from jsfdd.models.architecture import DraftKind
from jsfdd.models.draft import Draft, DraftConfig, layers_read
from jsfdd.scoring.table import ScoreTable, join, read_token_scores
from jsfdd.selection.tokens import token_weights
from jsfdd.training.batch import PerToken, TrainingData
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.loss import borrow
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_store import store_soft_targets
from jsfdd.training.token_loss import Distance
from jsfdd.training.train import train
from jsfdd.weights.draft import load_draft
from jsfdd.weights.target import Target

SMOKE = os.environ.get("SMOKE") == "1"
PROMPTS = {"gsm8k": 2, "qa": 2} if SMOKE else {"mt_bench": 30, "gsm8k": 40, "alpaca": 40, "sum": 8, "qa": 40}
MAX_NEW_TOKENS = 8 if SMOKE else 48
GAMMA, AHEAD = 4, 5
BATCH_TOKENS = 1024
TRAIN_BATCH_TOKENS = 512  # small steps: a draft of few chats should have many


class Pool(NamedTuple):
    """What all arms share."""

    work: Path
    loaded: Loaded
    samples: list[Sample]  # those that arms are made from
    shapes: tuple[Shape, ...]
    recipe: Recipe
    table: ScoreTable
    store: PerToken  # the target's hidden states of all chats
    draft: DraftConfig  # with a vocabulary counted over all chats, the same for every arm
    soft_targets: PerToken
    prompts: list[Prompt]
    recorded: dict[float, replay.Recorded]
    judges: dict[float, tuple]  # (hidden states of the recorded answers, what is compiled for which shape of draft)


def pool_parser(description: str, epochs: int) -> argparse.ArgumentParser:
    """The options that all experiments on a pool have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="chats, best with the target's own answers")
    parser.add_argument("--prompts", type=Path, required=True, help="folder with " + ", ".join(f"{n}.jsonl" for n in PROMPTS))
    parser.add_argument("--work", type=Path, required=True, help="directory for all that is computed; continued")
    parser.add_argument("--chats", type=int, default=16 if SMOKE else 430, help="how many of the data")
    parser.add_argument("--epochs", type=int, default=min(epochs, 2) if SMOKE else epochs)
    return parser


def open_pool(
    options: argparse.Namespace,
    temperatures: Sequence[float] = (0.0,),
    batch_size: int = 40,
    per_file: Mapping[str, int] = PROMPTS,
    answers: str = "answers",
    excluded: Mapping[str, int] = {},
    skip: int = 0,
    draft_kind: DraftKind = "eagle",
) -> Pool:
    """Compute, or read again, what the arms share. Seconds of each part go to WORK/seconds.json.

    Arms are made from `options.chats` chats after the first `skip`; answers to `per_file` prompts, other ones than of
    `excluded`, are recorded at `temperatures`, in files named `answers`. With `draft_kind` eagle3 the streams that such drafts
    read are kept as well; EAGLE-2 drafts read what stands behind them.
    """
    prompts, work = pick_prompts(options.prompts, per_file, excluded), options.work
    recipe = Recipe(
        epochs=options.epochs, learning_rate=1e-3, draft_vocab=8192, log_every=20, save_every=100_000, held_out_share=0.0
    )
    config = scoring(options.data, work, keep_hidden=("full",), draft_kind=draft_kind)
    loaded = load(config)
    with timed(work, "score"):
        table = score.score(config, loaded)
    store = HiddenStore.open(work / "hidden", loaded.identity)
    layers = layers_read(loaded.target.config, draft_kind)
    draft = draft_of(loaded.target.config, recipe, loaded.samples)
    with timed(work, "means"):
        soft_targets = soft_targets_of(recipe, loaded, TrainingData(loaded.samples, store), draft, work / "soft_targets")
    recorded, judges = {}, {}
    for temperature in temperatures:
        name = f"{answers}_{temperature}"
        recorded[temperature], states = recorded_answers(
            loaded.target, loaded.mesh, prompts, work, name, temperature=temperature, batch_size=batch_size, layers=layers
        )
        judges[temperature] = (states, {})
    samples = loaded.samples[skip : skip + options.chats]
    shapes = choose_shapes([len(sample.tokens) for sample in samples], TRAIN_BATCH_TOKENS)
    table = join([table], [sample.id for sample in samples])
    return Pool(work, loaded, samples, shapes, recipe, table, store, draft, soft_targets, prompts, recorded, judges)


def scoring(data: Path, out: Path, **options) -> ScoreConfig:
    """The target's pass over the chats, as all experiments on a pool make it."""
    chats = ChatOptions(data=(data,), max_length=384, batch_tokens=BATCH_TOKENS)
    return ScoreConfig(
        model=ModelOptions(target="smollm2"), chats=chats, out=out, per_token=True, held_out_share=0.0, **options
    )


def soft_targets_of(recipe: Recipe, loaded: Loaded, data: TrainingData, draft: DraftConfig, directory: Path) -> PerToken | None:
    """What the recipe stores of the target's distributions, over a draft's vocabulary."""
    kind = recipe.stored_soft_targets(hidden_is_stored=True)
    if kind is None:
        return None
    return store_soft_targets(
        kind, data, borrow(loaded.target.config, loaded.target.params), draft, recipe, loaded.mesh,
        batch_tokens=BATCH_TOKENS, directory=directory, identity=loaded.identity,
    )  # fmt: skip


def recorded_answers(
    target: Target,
    mesh: Mesh,
    prompts: Sequence[Prompt],
    work: Path,
    name: str,
    *,
    temperature: float = 0.0,
    batch_size: int = 40,
    layers: tuple[int, ...] = (),
) -> tuple[replay.Recorded, HiddenStore]:
    """The target's answers to `prompts`, WORK/NAME.json, and its states over them, WORK/NAME: what drafts are judged by."""
    path = work / f"{name}.json"
    with timed(work, f"record {name}"):
        if not path.exists():
            recorded = replay.record(
                target, prompts, mesh,
                temperature=temperature, max_new_tokens=MAX_NEW_TOKENS, ahead=AHEAD, batch_size=batch_size, seed=0,
            )  # fmt: skip
            rows = [
                {"id": s.id, "source": s.source, "tokens": s.tokens.tolist(), "answer": int(s.assistant_mask.sum())}
                for s in recorded.samples
            ]
            path.write_text(json.dumps({"prompts": recorded.prompts.tolist(), "samples": rows}))
    kept = json.loads(path.read_text())
    samples = []
    for row in kept["samples"]:
        tokens = np.array(row["tokens"], np.int32)
        samples.append(Sample(row["id"], row["source"], tokens, np.arange(len(tokens)) >= len(tokens) - row["answer"]))
    recorded = replay.Recorded(samples, np.array(kept["prompts"]), temperature, MAX_NEW_TOKENS, AHEAD, target.stop_tokens)
    digest = hashlib.sha256(b"".join(sample.tokens.tobytes() for sample in samples)).hexdigest()
    with timed(work, f"read {name}"):
        states = store_hidden(
            target, samples, mesh,
            batch_tokens=4096, directory=work / name, identity={"answers": digest}, dtype="float32", layers=layers,
        )  # fmt: skip
    return recorded, states


@dataclasses.dataclass(frozen=True)
class Arm:
    """One draft: which samples, which tokens, and what of the recipe is different.

    Attributes:
      ids: samples trained on.
      options: of the recipe, and the seed.
      weights: token weights by sample id; None for all counted tokens alike.
      init: the draft from which training starts; None for a fresh one.
    """

    ids: Sequence[str]
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    weights: PerToken | None = None
    init: Draft | None = None

    def train(self, pool: Pool, directory: Path) -> tuple[dict, DraftConfig, dict]:
        """(cost, draft, its parameters)."""
        chosen = set(self.ids)
        kept = [sample for sample in pool.samples if sample.id in chosen]
        if lost := len(chosen) - len(kept):
            raise ValueError(f"{lost} of {len(chosen)} samples are not among the pool's {len(pool.samples)}")
        options = dict(self.options)
        seed = options.pop("seed", 0)
        recipe = dataclasses.replace(pool.recipe, **options)
        draft = draft_of(pool.loaded.target.config, recipe, pool.loaded.samples)
        data = TrainingData(kept, pool.store, None, self.weights)
        cpu = time.process_time()
        means = recipe.stored_soft_targets(hidden_is_stored=True) == "means"
        if means and draft == pool.draft and Distance.from_recipe(recipe) == Distance.from_recipe(pool.recipe):
            soft_targets = pool.soft_targets
        else:
            soft_targets = soft_targets_of(recipe, pool.loaded, data, draft, directory / "soft_targets")
        cpu_of_store, cpu = time.process_time() - cpu, time.process_time()
        result = train(
            pool.loaded.target, data._replace(soft_targets=soft_targets), TrainingData([], pool.store), recipe,
            pool.loaded.mesh, out=directory, seed=seed, identity=pool.loaded.identity, draft=draft, init=self.init,
            shapes=pool.shapes,
        )  # fmt: skip
        row = {
            "samples": result.samples, "steps": result.steps, "tokens_in_loss": result.tokens,
            "tokens": sum(len(sample.tokens) for sample in kept), "seconds": result.seconds,
            "cpu_seconds": time.process_time() - cpu, "cpu_seconds_of_own_store": cpu_of_store,
        }  # fmt: skip
        return row, draft, jax.device_get(result.state.params)


def run_arm(pool: Pool, name: str, arm) -> dict:
    """The arm's row: cost, and at each of the pool's temperatures the counts of every prompt. What is there is read again.

    `arm` is an `Arm`, or has a `train(pool, directory)` like it.
    """
    directory = pool.work / "arms" / name.replace(" ", "_").replace("/", "-")
    path = directory / "row.json"
    row = json.loads(path.read_text()) if path.exists() else None
    lacking = [temperature for temperature in pool.judges if row is None or f"T={temperature:g}" not in row]
    if row is None:
        row, draft, params = arm.train(pool, directory)
    elif lacking:
        draft, params, _ = trained_draft(pool, name)
    for temperature in lacking:
        row[f"T={temperature:g}"] = judge_draft(pool, draft, params, temperature)
    if lacking:
        path.write_text(json.dumps(row))
        print(f"{name}: {row['samples']} samples, {row['steps']} steps, {row['seconds']:.0f} s; {taus(row)}", flush=True)
    return row


def judge_draft(pool: Pool, draft: DraftConfig, params: dict, temperature: float) -> dict:
    """{"accept_counts", "reached", "accepted"}: lists by prompt."""
    recorded = pool.recorded[temperature]
    states, compiled = pool.judges[temperature]
    if draft not in compiled:
        compiled[draft] = replay.make_judge(
            pool.loaded.target, states, recorded, draft, pool.loaded.mesh, num_draft_tokens=GAMMA
        )
    counts = replay.walk(recorded, compiled[draft](params))
    return {name: np.round(value, 6).tolist() for name, value in counts._asdict().items()}


def taus(row: dict) -> str:
    """τ at each temperature, in words."""
    words = []
    for temperature in (key for key in row if key.startswith("T=")):
        counts = np.array(row[temperature]["accept_counts"])
        words.append(f"τ {(counts @ np.arange(1, counts.shape[1] + 1)).sum() / counts.sum():.3f} at {temperature}")
    return ", ".join(words)


def trained_draft(pool: Pool, name: str) -> Draft:
    """The draft of an arm that was run."""
    return load_draft(pool.work / "arms" / name.replace(" ", "_").replace("/", "-"))


def token_weights_of(pool: Pool, samples: Sequence[Sample], **choice) -> dict:
    """As `selection.tokens.token_weights`, from the pool's scores."""
    return token_weights(samples, read_token_scores(pool.work / "token_scores.parquet"), **choice)


class timed:
    """Adds the seconds of a block to WORK/seconds.json, unless they are there: a part that is read again took nothing."""

    def __init__(self, work: Path, name: str):
        self.path, self.name = work / "seconds.json", name

    def __enter__(self):
        self.begin = time.perf_counter()

    def __exit__(self, kind, value, traceback):
        if kind is None:
            seconds = json.loads(self.path.read_text()) if self.path.exists() else {}
            seconds.setdefault(self.name, time.perf_counter() - self.begin)
            self.path.write_text(json.dumps(seconds, indent=1))


def pick_prompts(
    folder: Path, per_file: Mapping[str, int], excluded: Mapping[str, int] = {}, longest: int = 3000
) -> list[Prompt]:
    """Evenly spaced prompts of each file, {"mt_bench": 40, …}, of those with at most `longest` characters.

    None of them would be picked for `excluded`. "spec_bench/math_reasoning" are those of spec_bench.jsonl with that source.
    """
    chosen = []
    for name, count in per_file.items():
        prompts = read_prompts((folder / f"{name.split('/')[0]}.jsonl",))
        prompts = [p for p in prompts if sum(map(len, p.turns)) <= longest and ("/" not in name or p.source == name)]
        picked_before = _spaced(len(prompts), excluded.get(name, 0))
        prompts = [prompt for i, prompt in enumerate(prompts) if i not in picked_before]
        chosen += [dataclasses.replace(prompts[i], source=name) for i in _spaced(len(prompts), count)]
    return chosen


def _spaced(number: int, count: int) -> list[int]:
    return np.linspace(0, number - 1, count).round().astype(int).tolist()
