"""Four CPU devices and strict shapes for every test; programs that compile fast, are compiled once and are forgotten."""

import ctypes
import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of what toys cost, and they gain nothing from LLVM's optimizations. `optimized` sets it back.
jax.config.update("jax_disable_most_optimizations", True)
# Every `train` or `run` of a toy builds its programs anew, and nearly all of them were compiled before.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """After the last test of a file, let go of its programs: thousands of them would be gigabytes at the end."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
    return result


@pytest.fixture(scope="module")
def optimized():
    """For files that run a real model: programs as fast as users get them."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
