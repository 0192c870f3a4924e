"""Read what speculators' converter made of our drafts, and compare it to the bit with what it was made from: WORK.

python experiments/004_peer_loaders/reread.py WORK
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from jsfdd.weights.draft import load_draft


def main(work: Path) -> None:
    for converted in sorted((work / "converted").iterdir()):
        (config, params, _), (config_again, params_again, _) = load_draft(work / converted.name), load_draft(converted)
        equal = jax.tree.structure(params) == jax.tree.structure(params_again)
        equal = equal and jax.tree.all(jax.tree.map(np.array_equal, params, params_again))
        fields, fields_again = (dataclasses.asdict(c.decoder) | {"fc_bias": c.fc_bias} for c in (config, config_again))
        changed = {name: (fields[name], fields_again[name]) for name in fields if fields[name] != fields_again[name]}
        verdict = "the same bits" if equal else "DIFFER"
        print(f"{converted.name}: parameters {verdict}; settings that differ: {changed or 'none'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
