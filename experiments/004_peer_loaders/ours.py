"""Export drafts for the peers' own loaders, and keep what they compute here on real hidden states: RUN TARGET WORK.

    python experiments/004_peer_loaders/ours.py demo-run/arms/full TARGET WORK

RUN is a training run on the demo's target, TARGET that target's Hugging Face directory (experiments/005_vllm/write_target.py).
"""

import dataclasses
import json
import sys
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.data.chat import read_chats
from jsfdd.data.template import tokenize_chats
from jsfdd.models.architecture import Rope
from jsfdd.models.draft import EagleLayer, draft_config, init_draft
from jsfdd.models.target import embed_tokens, hidden_states
from jsfdd.weights.card import Serving
from jsfdd.weights.draft import load_draft
from jsfdd.weights.export import write_draft
from jsfdd.weights.target import load_target

SAMPLES, LENGTH = 3, 128


def random_draft(config):
    """A draft of `config` with all parameters random, biases and norms too."""
    params = init_draft(config, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 64))
    return config, jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params)


def main(run: Path, target_dir: Path, work: Path) -> None:
    target = load_target(str(target_dir))
    biased = draft_config(target.config, fc_bias=True)
    scaled = dataclasses.replace(biased, decoder=dataclasses.replace(biased.decoder, rope=Rope(1e4, "linear", factor=2.0)))
    # Each case with the flavours whose peers can compute it; speculators turns by the target's own rope.
    cases = {
        "trained": (load_draft(run)[:2], ("eagle", "speculators")),
        "random with fc bias": (random_draft(biased), ("eagle", "speculators")),
        "random with scaled rope": (random_draft(scaled), ("eagle",)),
    }
    chats = read_chats([Path(str(files("jsfdd.data.demo"))) / "chats.jsonl"])
    samples, _ = tokenize_chats(chats, target.tokenizer, LENGTH)
    chosen = [sample.tokens for sample in samples if len(sample.tokens) == LENGTH][:SAMPLES]
    tokens = jnp.asarray(np.stack(chosen), jnp.int32)
    hidden = hidden_states(target.config, target.params, tokens)[:, :-1]
    arrays = {"tokens": np.asarray(tokens[:, 1:]), "hidden": np.asarray(hidden)}
    work.mkdir(parents=True)
    index = []
    for case, ((config, params), flavours) in cases.items():
        for flavour in flavours:
            name = f"{case}, {flavour}".replace(", ", "_").replace(" ", "_")
            write_draft(work / name, config, params, flavour, serving=Serving(str(target_dir.absolute())))
            # What is compared is the directory, so our side reads it too.
            config_again, params_again = load_draft(work / name)[:2]
            embedding = embed_tokens(target.config, target.params, tokens[:, 1:])
            arrays[name] = np.asarray(EagleLayer(config_again).apply({"params": params_again}, embedding, hidden))
            index.append({"name": name, "case": case, "flavour": flavour})
    np.savez(work / "arrays.npz", **arrays)
    (work / "index.json").write_text(json.dumps(index) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
