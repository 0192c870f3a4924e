"""vLLM in this process, on a CPU, computing what jsfdd computes: float32, nothing cached between requests.

Imported by the scripts beside it, which run where vLLM is installed, without jsfdd.
"""

import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # everything in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import vllm  # noqa: E402


def make_engine(target: Path, **options) -> vllm.LLM:
    """An engine for the model in a directory, with further options of `vllm.LLM`."""
    return vllm.LLM(
        model=str(target),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        enable_prefix_caching=False,
        **options,
    )
