"""Score, train, resume and decode a toy target on 8 forced CPU devices, as meshes of several shapes.

Run by test_devices.py in a process of its own, since the other tests have four devices:

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python on_eight_devices.py OUT    # OUT/results.npz and OUT/programs.json
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from toy import as_target, toy_draft, toy_target

from jsfdd.base.mesh import make_mesh, put, shard_rows, to_host
from jsfdd.base.records import DraftBatch, Sample
from jsfdd.data.batches import Shape, choose_shapes, make_batches, pad_batch, pad_rows
from jsfdd.decoding.generate import make_generate, prepare_params
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.decoding.state import PromptBatch
from jsfdd.models.sharding import place_params, split_vocabulary
from jsfdd.models.target import hidden_states
from jsfdd.scoring.passes import group_plans
from jsfdd.scoring.score import make_score_step, score_samples
from jsfdd.training.batch import TrainingData, device_batch
from jsfdd.training.loss import borrow
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_means import make_means_step
from jsfdd.training.step import init_state, make_optimizer, make_train_step, state_shardings
from jsfdd.training.token_loss import Distance
from jsfdd.training.train import train

MESHES = {"1x1": (1, 1), "8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4)}
# Heads, widths and vocabulary that four model shards divide; two of them cut a key/value head.
CONFIG, PARAMS = toy_target(vocab_size=96)
DRAFT, DRAFT_PARAMS = toy_draft(CONFIG)


def samples(number=30):
    random = np.random.default_rng(0)
    found = []
    for i in range(number):
        length = int(random.integers(8, 64))  # one bucket: every shape compiles anew on every mesh
        mask = np.arange(length) >= length // 3
        found.append(Sample(f"s{i}", "toy", random.integers(0, CONFIG.vocab_size, length).astype(np.int32), mask))
    return found


SAMPLES = samples()
SHAPE = Shape(8, 64)
_hidden = jax.jit(lambda tokens: hidden_states(CONFIG, PARAMS, tokens)[0])
RECIPE = Recipe(epochs=2, save_every=3)
HIDDEN = {s.id: np.asarray(_hidden(np.pad(s.tokens, (0, 64 - len(s.tokens)))[None]))[: len(s.tokens)] for s in SAMPLES}


def score(mesh):
    table = score_samples(as_target(CONFIG, PARAMS), SAMPLES, mesh, batch_tokens=256, per_token=True, progress=False)
    return table.metrics | {"token_flatness": np.concatenate([row.flatness for row in table.tokens])}


def means(mesh):
    frozen = split_vocabulary(borrow(CONFIG, place_params(PARAMS, mesh)), mesh)
    batch = device_batch(TrainingData(SAMPLES, HIDDEN), range(SHAPE.rows), SHAPE, mesh)
    return to_host(make_means_step(Distance("cross_entropy"), mesh, 16, "float32")(frozen, batch))


class Stop(Exception):
    pass


def trained(mesh, out, stop=False, **changes):
    """The state after `train`, which a probe ends after the first epoch if `stop`."""

    def probe(params):
        raise Stop

    result = train(
        as_target(CONFIG, place_params(PARAMS, mesh)), TrainingData(SAMPLES, HIDDEN), TrainingData([], HIDDEN), RECIPE, mesh,
        out=out, batch_tokens=512, probe=probe if stop else None, probe_every=4, progress=False, **changes,
    )  # fmt: skip
    return result.state


def leaves(state):
    return enumerate(jax.tree.leaves(to_host(state.params)))


def bytes_on_first(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def generate(mesh):
    setup = DecodeSetup(target=CONFIG, drafts=(DRAFT,), num_draft_tokens=3, max_new_tokens=24)
    return make_generate(setup, mesh), (prepare_params(PARAMS, [DRAFT_PARAMS], mesh), prompts(mesh), np.float32(0))


def prompts(mesh):
    lengths = np.array([5, 9, 16, 3, 12, 7, 1, 8], np.int32)
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (8, 16)).astype(np.int32)
    return shard_rows(PromptBatch(tokens, lengths, jax.random.split(jax.random.key(0), 8)), mesh)


def train_step(mesh, shard_optimizer=False):
    optimizer = make_optimizer(RECIPE, 8)  # as many steps as `trained` takes, so it is the same program
    padded = pad_batch(SAMPLES[:8], SHAPE)
    hidden = pad_rows([HIDDEN[s.id] for s in SAMPLES[:8]], SHAPE)
    step = make_train_step(DRAFT, optimizer, mesh, RECIPE, shard_optimizer)
    state = jax.tree.map(put, init_state(DRAFT, optimizer, 0), state_shardings(DRAFT, optimizer, mesh, shard_optimizer))
    batch = shard_rows(DraftBatch(padded.tokens, padded.counted, padded.counted.astype(np.float32), hidden), mesh)
    return step, (split_vocabulary(borrow(CONFIG, place_params(PARAMS, mesh)), mesh), state, batch)


def score_step(mesh):
    return make_score_step(CONFIG, mesh, block=64), (
        place_params(PARAMS, mesh),
        shard_rows(pad_batch(SAMPLES[:8], SHAPE), mesh),
    )


def compiled_text(step, arguments):
    return step.lower(*arguments).compile().as_text()


def main(out: Path) -> None:
    results = {}
    # Of two model axes, scoring has the one that leaves heads whole; the others, that which cuts them.
    for name in ("1x1", "8x1", "4x2"):
        for key, value in score(make_mesh(*MESHES[name])).items():
            results[f"score {name} {key}"] = value
    for name in ("1x1", "8x1", "2x4"):
        results[f"means {name}"] = means(make_mesh(*MESHES[name]))
    for name in ("1x1", "8x1"):
        for i, leaf in leaves(trained(make_mesh(*MESHES[name]), out / f"train-{name}")):
            results[f"train {name} {i}"] = leaf
    whole = trained(make_mesh(8, 1), out / "train-8x1").opt_state  # reads its checkpoint
    parts = trained(make_mesh(8, 1), out / "sharded", shard_optimizer=True)
    results |= {f"train sharded {i}": leaf for i, leaf in leaves(parts)}
    results["optimizer bytes"] = [bytes_on_first(whole), bytes_on_first(parts.opt_state)]
    for name in ("8x1", "2x4"):
        step, arguments = generate(make_mesh(*MESHES[name]))
        results[f"generate {name}"] = to_host(step(*arguments)).tokens
    try:
        trained(make_mesh(*MESHES["8x1"]), out / "moved", stop=True)
    except Stop:
        pass
    results["saved"] = sorted(int(path.name) for path in (out / "moved" / "checkpoints").iterdir() if path.name.isdigit())
    for i, leaf in leaves(trained(make_mesh(*MESHES["2x4"]), out / "moved", shard_optimizer=True)):
        results[f"train moved {i}"] = leaf
    lengths = [len(s.tokens) for s in SAMPLES]
    plans = make_batches(lengths, choose_shapes(lengths, 256))
    calls = {n: sum(1 for _ in group_plans(plans, n)) for n in (1, 2, 4, 8)}
    np.savez(out / "results.npz", **results)
    mesh = make_mesh(8, 1)
    decode, arguments = generate(mesh)
    texts = {"score": score_step(mesh), "train": train_step(mesh), "generate": (jax.jit(decode), arguments)}
    texts["train sharded"] = train_step(mesh, shard_optimizer=True)
    mesh = make_mesh(*MESHES["2x4"])
    decode, arguments = generate(mesh)
    texts |= {"score 2x4": score_step(mesh), "train 2x4": train_step(mesh), "generate 2x4": (jax.jit(decode), arguments)}
    texts = {name: compiled_text(*step) for name, step in texts.items()}
    (out / "programs.json").write_text(json.dumps({"texts": texts, "calls": calls, "plans": len(plans)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
