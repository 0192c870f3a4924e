"""Four CPU devices and strict shapes for every test; programs that compile fast, are compiled once and are forgotten."""

import ctypes
import functools
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


# Bytes at which a worker forgets its programs, some 20 MB each: between two files, and within one, where it would compile
# its own anew, test after test. Two workers and what they start are to stay within 3 GB.
LARGE, LARGEST = 750e6, 1000e6
# Files that fork from tests/children.py, one after another, so that they share the process that has imported everything.
FORKING = ("test_base_processes", "test_models_sharding", "test_data_tokenized", "test_commands_respond", "test_training_train")
# Files that need more than others; at the front they are all the first worker's, so no two of them run at a time.
FIRST = ("test_decoding_smollm2", "test_golden", "test_devices", *FORKING)

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
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


def pytest_collection_finish():
    """What imports and collection left stays: the collector need not look through it again and again while JAX traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Let go of programs when they have become large, and of the process that children are forked from where none follow."""
    result = yield
    limit = LARGE if nextitem is None or nextitem.path != item.path else LARGEST
    if resident_bytes() > limit:
        forget_large_programs(item.module)
    if resident_bytes() > limit:
        forget_all_programs()
    if "children" in sys.modules and (nextitem is None or nextitem.path.stem not in FORKING):
        sys.modules["children"].stop_server()
    return result


def resident_bytes() -> int:
    """What this process occupies; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def forget_large_programs(module) -> None:
    """Those that the package, the toys and a test's module hold. Programs of one operation stay, which all tests share."""
    import jax
    import toy

    toy.compiled_decoder.cache_clear()
    compiled = type(jax.jit(abs))
    package = [loaded for name, loaded in sys.modules.items() if name.partition(".")[0] == "jsfdd"]
    for value in [value for loaded in (*package, module) for value in vars(loaded).values()]:
        if isinstance(value, compiled):
            value.clear_cache()
        elif isinstance(value, functools._lru_cache_wrapper) and value.__module__.startswith("jsfdd."):
            value.cache_clear()
    return_memory()


def forget_all_programs() -> None:
    import jax

    jax.clear_caches()
    return_memory()


def return_memory() -> None:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
