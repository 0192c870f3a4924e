"""One draft training step, ours and PyTorch's, turn about: TORCH_PYTHON is an interpreter that has torch. See README.md."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SMOKE = os.environ.get("SMOKE") == "1"
MODES = ["head", "means", "half the tokens", "half the tokens, means", "HASS, means"]
SIZES = dict(vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64)
TOY = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=16)


def write_inputs(directory: Path, sizes: dict, shape: tuple[int, int]) -> None:
    """Weights, tokens and hidden states that both sides read; every token counts but each row's first and last two."""
    random = np.random.default_rng(0)
    width, middle = sizes["hidden_size"], sizes["intermediate_size"]
    queries, keys = sizes["num_heads"] * sizes["head_dim"], sizes["num_kv_heads"] * sizes["head_dim"]
    shapes = dict(
        fc=(width, 2 * width), q_proj=(queries, width), k_proj=(keys, width), v_proj=(keys, width), o_proj=(width, queries),
        gate_proj=(middle, width), up_proj=(middle, width), down_proj=(width, middle),
    )  # fmt: skip
    arrays = {name: (random.normal(size=size) * size[1] ** -0.5).astype(np.float32) for name, size in shapes.items()}
    counted = np.ones(shape, bool)
    counted[:, [0, -2, -1]] = False
    np.savez(
        directory / "shared.npz",
        embedding=(0.1 * random.normal(size=(sizes["vocab_size"], width))).astype(np.float32),
        tokens=random.integers(0, sizes["vocab_size"], shape).astype(np.int32),
        hidden=(2 * random.normal(size=(*shape, width))).astype(np.float32),
        counted=counted,
        **arrays,
    )
    (directory / "sizes.json").write_text(json.dumps(sizes))


def main() -> None:
    sizes, shape, repeats = (TOY, (4, 32), 2) if SMOKE else (SIZES, (4, 256), 9)
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(Path(directory), sizes, shape)

        def start(python, script):
            return subprocess.Popen(
                [python, str(HERE / script), directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )

        workers = {"ours": start(sys.executable, "ours.py"), "torch": start(os.environ["TORCH_PYTHON"], "theirs.py")}

        def ask(worker, line):
            workers[worker].stdin.write(line + "\n")
            workers[worker].stdin.flush()
            return json.loads(workers[worker].stdout.readline())

        turns = [("torch", "step"), *(("ours", mode) for mode in MODES)]
        first = {f"{worker}: {mode}": ask(worker, mode)["loss"] for worker, mode in turns}  # compiles
        for worker, mode in turns:  # and once more: the second step's state comes from a program, not from numpy
            ask(worker, mode)
        seconds = {name: [] for name in first}
        for _ in range(repeats):
            for worker, mode in turns:
                seconds[f"{worker}: {mode}"].append(ask(worker, mode)["seconds"])
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    tokens = shape[0] * shape[1]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = np.array(seconds["torch: step"])
    rows = {}
    for name, values in seconds.items():
        ratios = np.sort(reference / np.array(values))
        rows[name] = {
            "first_loss": first[name],
            "median_seconds": medians[name],
            "tokens_per_second": tokens / medians[name],
            "times_torch": float(np.median(ratios)),
            "times_torch_least_most": [float(ratios[0]), float(ratios[-1])],
        }
        print(f"{name:32} {medians[name]:.3f} s  {tokens / medians[name]:6.0f} tokens/s  {np.median(ratios):.2f}x torch "
              f"[{ratios[0]:.2f}, {ratios[-1]:.2f}]  first loss {first[name]:.6f}")  # fmt: skip
    if not SMOKE:
        (HERE / "results.json").write_text(json.dumps({"tokens": tokens, "repeats": repeats, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
