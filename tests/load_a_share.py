"""Load half of a target in one of two processes and print what that took; started by test_models_sharding.py.

    python load_a_share.py DIRECTORY COORDINATOR NUMBER     prints {"share": bytes, "growth": bytes}
"""

import json
import sys
from pathlib import Path

from jsfdd.base.processes import start


def resident(field: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def main(directory: Path) -> None:
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


if __name__ == "__main__":
    start(sys.argv[2], 2, int(sys.argv[3]))
    main(Path(sys.argv[1]))
