"""Four CPU devices and strict shapes for every test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
