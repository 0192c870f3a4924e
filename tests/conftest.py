"""Four CPU devices and strict shapes for every test; programs that compile fast, are compiled once and are forgotten."""

import ctypes
import gc
import os
import sys
from pathlib import Path

import pytest

# As variables, before JAX is imported, so that processes which tests start have them too.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    # Compiling is most of what tests cost. They gain nothing from LLVM's optimizations, the 135M model neither, nor from
    # the new emitter of fused loops, which takes three times as long.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # On two cores it does not pay to cut a small program into parts and compile those side by side.
    # A device that waits for another ends the process after so long: a loaded machine needs more than the usual 40 s.
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600",
    # Every `train` or `run` of a toy builds its programs anew, and nearly all of them were compiled before.
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}
if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    del SETTINGS["JAX_COMPILATION_CACHE_DIR"]
os.environ.update(SETTINGS)


# Bytes at which a worker forgets its programs, some 20 MB each. Until then files share what they compile: with 800 MB the
# larger ones compiled their own programs anew, test after test. Two workers and what they start are to stay within 3 GB.
LARGE = 1000e6
# Files that need more than others; at the front they are all the first worker's, so no two of them run at a time.
FIRST = ("test_decoding_smollm2", "test_base_processes", "test_devices", "test_models_sharding", "test_golden")

# Files that compile decoding or training, half a second a test; `make check` leaves them out, as it does what is marked slow.
COMPILING = {
    "test_api", "test_commands_plan", "test_decoding_answers", "test_decoding_eagle3", "test_decoding_generate",
    "test_decoding_tree", "test_doctests", "test_hidden_capture", "test_models", "test_models_eagle3", "test_training_eagle3",
    "test_training_loss", "test_training_soft_top_k", "test_training_step", "test_training_token_loss",
    "test_weights_export", "test_weights_target",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in COMPILING:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.stem not in FIRST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Let go of programs when they have become large, and after a file of the process that children are forked from."""
    result = yield
    if resident_bytes() > LARGE:
        free_memory()
    if "children" in sys.modules and (nextitem is None or nextitem.path != item.path):
        sys.modules["children"].stop_server()
    return result


def resident_bytes() -> int:
    """What this process occupies; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def free_memory() -> None:
    """Give back what JAX keeps of programs."""
    import jax

    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
