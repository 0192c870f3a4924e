"""EAGLE-3 drafts of toys, and what their exported directories hold."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from toy import toy_config

from jsfdd.models.architecture import Rope
from jsfdd.models.draft import draft_config, init_draft
from jsfdd.weights.card import Serving
from jsfdd.weights.export import write_draft

SERVING = Serving("org/target", 3)
N = 9  # layers of the target, of which 2, 4 and 6 are the default; 5 would be N/2 rounded up
WORDS = (0, 3, 7, 8, 21, 40, 63)


ROPE = Rope(1e5)


def a_config(rope=ROPE, vocabulary=WORDS, layers=(), decoder=(), **flags):
    config = draft_config(toy_config(num_layers=N, rope=rope), vocabulary=vocabulary, kind="eagle3", target_layers=layers)
    config = dataclasses.replace(config, **flags)
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **dict(decoder)))


def a_draft(**options):
    """(config, params) of which no two values are equal, so that nothing agrees by chance."""
    config = a_config(**options)
    shapes = jax.eval_shape(lambda: init_draft(config, jax.random.key(0)))
    count = iter(range(100))
    return config, jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(next(count)).uniform(0.5, 1.5, x.shape), "f4"), shapes
    )


def written(directory, flavour, draft, **options):
    """(settings, tensors) of an exported draft."""
    write_draft(directory, *draft, flavour, serving=SERVING, **options)
    return json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")


def same_params(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))
