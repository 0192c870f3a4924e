"""Export EAGLE-3 drafts for the peers' own classes, and keep what they compute here on real states: TARGET WORK [RUN].

    python experiments/024_eagle3_peers/ours.py TARGET WORK [DRAFT]

TARGET is the demo's target as a Hugging Face directory (experiments/005_vllm/write_target.py), DRAFT a trained EAGLE-3 draft.
"""

import dataclasses
import json
import os
import sys
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.base.records import DraftBatch
from jsfdd.data.chat import read_chats
from jsfdd.data.template import tokenize_chats
from jsfdd.models.architecture import Rope
from jsfdd.models.draft import draft_config, draft_steps, init_draft
from jsfdd.models.target import embed_tokens, hidden_states
from jsfdd.training.loss import borrow, loss_sums
from jsfdd.training.recipe import Recipe
from jsfdd.weights.card import Serving
from jsfdd.weights.draft import load_draft
from jsfdd.weights.export import write_draft
from jsfdd.weights.target import load_target

SMOKE = bool(int(os.environ.get("SMOKE", "0")))
SAMPLES, LENGTH, STEPS = (1 if SMOKE else 3), 128, 3
PEERS = ("eagle", "speculators", "tpu-inference", "sglang-jax")


def random_draft(config):
    """A draft of `config` with all parameters random, norms too."""
    params = init_draft(config, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 64))
    return config, jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), params)


def cases(target, trained):
    """{name: (draft, the flavours whose peers can compute it)}."""
    vocabulary = tuple(range(0, target.config.vocab_size, 6))
    plain = draft_config(target.config, vocabulary=vocabulary, kind="eagle3")
    everything = dataclasses.replace(plain, vocabulary=())
    scaled = dataclasses.replace(plain, decoder=dataclasses.replace(plain.decoder, rope=Rope(1e4, "linear", factor=2.0)))
    later = dataclasses.replace(
        everything, fc_norm=True, norm_output=True, norm_before_residual=True, target_layers=(1, 14, 29)
    )
    together = dataclasses.replace(everything, norm_before_fc=True, norm_output=True)
    residual = dataclasses.replace(everything, norm_before_residual=True)
    chosen = {
        "random": (random_draft(plain), PEERS),
        "random, all tokens": (random_draft(everything), PEERS),
        "random, rope scaled": (random_draft(scaled), ("eagle", "speculators")),
        "random, fc_norm and norm_output": (random_draft(later), ("speculators",)),
        "random, norm_before_fc and norm_output": (random_draft(together), ("speculators",)),
        "random, norm_before_residual": (random_draft(residual), ("speculators", "tpu-inference")),
    }
    return ({"trained": (trained[:2], PEERS)} if trained else {}) | chosen


def loss_of_a_row(target, config, params, tokens, hidden):
    """{name: array}: the mean cross entropy of each draft step with every row in the loss, and the gradient of fc."""
    recipe = Recipe(draft_kind="eagle3", draft_steps=STEPS, step_decay=1.0, soft_targets="none")
    batch = DraftBatch(tokens[:1], jnp.ones((1, LENGTH), bool), jnp.ones((1, LENGTH)), hidden[:1])
    borrowed = borrow(target.config, target.params)

    @jax.jit
    def loss(params):
        sums = loss_sums(params, borrowed, batch, None, draft=config, recipe=recipe, block=64)
        means = jnp.stack([step["distance"] / step["counted"] for step in sums.steps])
        return means.sum(), means

    gradient, means = jax.grad(loss, has_aux=True)(params)
    return {"loss": np.asarray(means), "gradient": np.asarray(gradient["fc"]["kernel"]).T}


def main(target_dir: Path, work: Path, trained: Path | None = None) -> None:
    target = load_target(str(target_dir))
    chats = read_chats([Path(str(files("jsfdd.data.demo"))) / "chats.jsonl"])
    samples, _ = tokenize_chats(chats, target.tokenizer, LENGTH)
    chosen = [sample.tokens for sample in samples if len(sample.tokens) == LENGTH][:SAMPLES]
    tokens = jnp.asarray(np.stack(chosen), jnp.int32)
    embedding = embed_tokens(target.config, target.params, tokens[:, 1:])
    arrays = {"tokens": np.asarray(tokens[:, 1:])}
    work.mkdir(parents=True, exist_ok=True)
    index = []
    for case, (draft, flavours) in cases(target, trained and load_draft(trained)).items():
        layers = draft[0].target_layers
        whole = jax.jit(hidden_states, static_argnums=(0, 3))(target.config, target.params, tokens, layers)
        hidden = whole[:, :-1]
        arrays["hidden " + " ".join(map(str, layers))] = np.asarray(hidden[..., : -target.config.hidden_size])
        for flavour in flavours:
            name = f"{case}, {flavour}".replace(", ", "_").replace(" ", "_")
            write_draft(work / name, *draft, flavour, serving=Serving(str(target_dir.absolute())))
            # What is compared is the directory, so our side reads it too.
            config, params, _ = load_draft(work / name)
            outputs = draft_steps(config, params, embedding, hidden, STEPS)
            arrays[name] = np.stack([np.asarray(x) for x in outputs])
            # Over a draft vocabulary we weigh a token by what the target gives to it, and speculators does not.
            if flavour == "speculators" and not config.vocabulary:
                parts = loss_of_a_row(target, config, params, tokens, whole)
                arrays |= {f"{name} {part}": value for part, value in parts.items()}
                arrays["final"] = np.asarray(whole[:1, 1:, -target.config.hidden_size :])
            index.append({"name": name, "case": case, "flavour": flavour, "layers": layers})
    np.savez(work / "arrays.npz", **arrays)
    (work / "index.json").write_text(json.dumps(index) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
