"""Four CPU devices and strict shapes for every test; programs that compile fast and are compiled once."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of what toys cost, and they gain nothing from LLVM's optimizations. Tests of a real model set it back.
jax.config.update("jax_disable_most_optimizations", True)
# Every `train` or `run` of a toy builds its programs anew, and nearly all of them were compiled before.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
