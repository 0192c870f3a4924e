"""Load half of a target in one of two processes and print what that took; started by test_models_sharding.py."""

import json
from pathlib import Path

from jsfdd.base.processes import start


def resident(field: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def load_a_share(directory: Path, coordinator: str, number: int) -> None:
    """Prints {"share": bytes, "growth": bytes}."""
    start(coordinator, 2, number)
    import jax

    from jsfdd.base.mesh import make_mesh
    from jsfdd.weights import huggingface

    mesh = make_mesh(data=1, model=2)
    config = huggingface.read_config(directory)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    params = jax.block_until_ready(huggingface.read_params(directory, config, mesh=mesh))
    growth = resident("VmHWM") - before
    share = sum(part.data.nbytes for leaf in jax.tree.leaves(params) for part in leaf.addressable_shards)
    print(json.dumps({"share": share, "growth": growth}))
