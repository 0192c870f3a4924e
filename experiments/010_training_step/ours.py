"""One draft training step of jsfdd for each line on stdin: "MODE" -> seconds and loss as JSON. See compare.py."""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import DraftBatch
from jsfdd.base.tuning import vocabulary_block
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.draft import draft_config
from jsfdd.training.loss import Borrowed
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_means import make_means_step
from jsfdd.training.step import init_state, make_optimizer, make_train_step
from jsfdd.training.token_loss import Distance

shared = np.load(Path(sys.argv[1]) / "shared.npz")
sizes = json.loads((Path(sys.argv[1]) / "sizes.json").read_text())
CONFIG = DecoderConfig(
    family="llama", num_layers=1, max_position=8192, rms_norm_eps=1e-5, rope=Rope(theta=1e5), tie_embeddings=True, **sizes
)
mesh, draft = make_mesh(data=1), draft_config(CONFIG)
frozen = Borrowed(jax.numpy.asarray(shared["embedding"]), None)
counted = shared["counted"]
whole = DraftBatch(shared["tokens"], counted, counted.astype(np.float32), shared["hidden"])
half = whole.weight * (np.random.default_rng(0).random(counted.shape) < 0.5)
means = make_means_step(Distance(), mesh, vocabulary_block("cpu"), "float32")(frozen, whole)
BATCHES = {
    "head": whole,  # the target's head is asked in each step
    "means": whole._replace(soft_targets=means),
    "half the tokens": whole._replace(weight=half),
    "half the tokens, means": whole._replace(weight=half, soft_targets=means),
    "HASS, means": whole._replace(soft_targets=means),
}


def make(mode):
    recipe = Recipe(hidden_noise=0.0, draft_steps=3 if "HASS" in mode else 1)
    optimizer = make_optimizer(recipe, 1000)
    state = init_state(draft, optimizer, 0)
    params = {
        "fc": {"kernel": shared["fc"].T},
        "layer": {
            "attention": {name: {"kernel": shared[name].T} for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
            "mlp": {name: {"kernel": shared[name].T} for name in ("gate_proj", "up_proj", "down_proj")},
            "mlp_norm": {"scale": np.ones(CONFIG.hidden_size, np.float32)},
        },
    }
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    return make_train_step(draft, optimizer, mesh, recipe), state._replace(params=params)


steps = {}
for line in sys.stdin:
    mode = line.strip()
    if mode not in steps:
        steps[mode] = make(mode)
    step, state = steps[mode]
    begin = time.perf_counter()
    state, metrics = jax.block_until_ready(step(frozen, state, BATCHES[mode]))
    seconds = time.perf_counter() - begin
    steps[mode] = step, state
    print(json.dumps({"seconds": seconds, "loss": float(metrics.sums.total / metrics.sums.counted)}), flush=True)
