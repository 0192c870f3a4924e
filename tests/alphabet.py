"""A toy target that knows something: after every letter it says the next one, so its text and its draft can be good.

Its layers are random and damped, its head asks for the embedding of the letter before, and its final norm weighs channels
so unevenly that hidden states before and after it are not to be confused.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from toy import toy_target, toy_tokenizer

from jsfdd.weights.target import Target

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def alphabet_target(**changes) -> Target:
    """Over the toy tokenizer's 258 bytes and special tokens; `changes` go to its config."""
    config, params = toy_target(0, sharpness=1.0, vocab_size=258, max_position=1024, **changes)
    tokenizer = toy_tokenizer()
    random = np.random.default_rng(0)
    rows = random.standard_normal((258, config.hidden_size))
    embedding = (rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True))).astype(np.float32)
    ids = tokenizer.encode(LETTERS)
    (line,) = tokenizer.encode("\n")
    before = np.arange(258)
    before[ids] = np.roll(ids, 1)
    asked = embedding[before]
    asked[ids[0]] += asked[line]  # after the line that opens an answer it says "a" as well
    asked[line] = 0
    scale = np.exp(random.standard_normal(config.hidden_size)).astype(np.float32)
    layers = jax.tree.map(jnp.array, params["layers"])
    layers["attention"]["o_proj"]["kernel"] *= 0.3
    layers["mlp"]["down_proj"]["kernel"] *= 0.3
    params = {
        "embed": {"embedding": jnp.asarray(embedding)},
        "layers": layers,
        "norm": {"scale": jnp.asarray(scale)},
        "head": {"kernel": jnp.asarray((asked / scale).T)},
    }
    return Target(config, params, tokenizer, "alphabet", "alphabet", (257,))


def alphabet_chats(path: Path, count: int = 40) -> Path:
    """Conversations whose answers say the alphabet, as far as they go."""
    random = np.random.default_rng(1)
    with path.open("w") as file:
        for number in range(count):
            question = "".join(random.choice(list(LETTERS[:-1]), 6))
            answer = (LETTERS * 4)[: random.integers(30, 90)].strip()
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": f"abc{number}", "messages": messages}) + "\n")
    return path
