"""Settings of the compiler for TPUs, instead of those that `tests/conftest.py` makes for speed on a CPU."""

import os

for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES"):
    os.environ.pop(name, None)
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    # There is no TPU to ask about: libtpu is told whom it would be with, and that other processes may load it too.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
