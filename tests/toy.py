"""Toy models for tests: small enough for seconds, odd enough (grouped heads, untied head) to catch mix-ups."""

import jax

from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.draft import draft_config, init_draft
from jsfdd.models.target import init_params


def toy_config(vocab_size=64, **changes) -> DecoderConfig:
    values = dict(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=512,
        rms_norm_eps=1e-5,
        rope=Rope(1e4),
        tie_embeddings=False,
    )
    return DecoderConfig(**(values | changes))


def toy_target(seed=0, sharpness=3.0, **changes):
    """(config, params) whose logits are spread out by `sharpness`, so that argmaxes are clear and p is not uniform."""
    config = toy_config(**changes)
    params = init_params(config, jax.random.key(seed))
    params["norm"]["scale"] = params["norm"]["scale"] * sharpness
    return config, params


def toy_draft(config, seed=1):
    draft = draft_config(config)
    return draft, init_draft(draft, jax.random.key(seed))
