"""Settings of the compiler for TPUs, instead of those that `tests/conftest.py` makes for speed on a CPU."""

import os

for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES"):
    os.environ.pop(name, None)
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
