"""A pool that `jsfdd respond --keep-hidden full` wrote: answers, scores and states of one pass. Some answers judge the drafts.

jsfdd respond --target smollm2 --data prompts.jsonl --turns first --max-new-tokens 96 --keep-hidden full --out FOLDER/a.jsonl
pool = open_answered(FOLDER, work, recipe)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.pool.pool import AHEAD, BATCH_TOKENS, SMOKE, TRAIN_BATCH_TOKENS, Pool, soft_targets_of, timed
from jsfdd.base.records import Sample
from jsfdd.commands import score
from jsfdd.commands.inputs import load
from jsfdd.commands.options import ChatOptions, ModelOptions
from jsfdd.commands.score import ScoreConfig
from jsfdd.data.batches import choose_shapes
from jsfdd.evaluation.replay import Recorded
from jsfdd.hidden.capture import store_hidden
from jsfdd.hidden.store import HiddenStore
from jsfdd.scoring.table import join
from jsfdd.selection.sfdd import random_score
from jsfdd.training.batch import TrainingData
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.recipe import Recipe

# An answer was cut after 96 tokens; what a chain drafts behind the last one that counts must be known too.
JUDGED_TOKENS = 96 - AHEAD
JUDGES = 2 if SMOKE else 24  # of each source


def open_answered(folder: Path, work: Path, recipe: Recipe) -> Pool:
    """The answers of `folder`; of every source some are held out and replayed, in float32. All else goes to `work`."""
    chats = ChatOptions(data=(folder / "a.jsonl",), max_length=512)
    config = ScoreConfig(
        model=ModelOptions(target="smollm2"), chats=chats, out=folder, keep_hidden=("full",), held_out_share=0.05
    )
    loaded = load(config)
    table = score.score(config, loaded)
    store = HiddenStore.open(folder / "hidden", loaded.identity)
    judges, samples = split(loaded.samples)
    draft = draft_of(loaded.target.config, recipe, samples)
    with timed(work, "means"):
        soft_targets = soft_targets_of(recipe, loaded, TrainingData(samples, store), draft, work / "soft_targets")
    recorded = Recorded(judges, np.arange(len(judges)), 0.0, JUDGED_TOKENS, AHEAD, loaded.target.stop_tokens)
    digest = hashlib.sha256(b"".join(sample.tokens.tobytes() for sample in judges)).hexdigest()
    with timed(work, "read judges"):
        states = store_hidden(
            loaded.target, judges, loaded.mesh,
            batch_tokens=BATCH_TOKENS, directory=work / "judges", identity={"answers": digest}, dtype="float32",
        )  # fmt: skip
    shapes = choose_shapes([len(sample.tokens) for sample in samples], TRAIN_BATCH_TOKENS)
    table = join([table], [sample.id for sample in samples])
    loaded = loaded._replace(samples=samples)  # drafts take their vocabulary from these
    return Pool(
        work, loaded, samples, shapes, recipe, table, store, draft, soft_targets, [], {0.0: recorded}, {0.0: (states, {})}
    )


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(answers to replay, answers to learn from): of every source the same number at random, as `JUDGES` has it."""
    judges = set()
    for source in {sample.source for sample in samples}:
        ids = [sample.id for sample in samples if sample.source == source]
        judges |= set(sorted(ids, key=lambda name: random_score(0, name))[:JUDGES])
    return [s for s in samples if s.id in judges], [s for s in samples if s.id not in judges]


def judges_of(pool: Pool, source: str) -> np.ndarray:
    """Which of the replayed answers have this source."""
    return np.array([sample.source == source for sample in pool.recorded[0.0].samples])
