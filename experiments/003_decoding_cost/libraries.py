"""Products of a few rows in other libraries, by an interpreter that has torch: numpy's BLAS, and oneDNN with weights as they
are and packed once. CPU milliseconds of 60 products of [rows, 576] and [576, 1536], one thread. See README.md."""

import os
import time

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils import mkldnn  # noqa: E402

SMOKE = bool(os.environ.get("SMOKE"))
WIDTH, INNER, NUMBER, ROUNDS = 576, 1536, 60, 2 if SMOKE else 9  # together larger than the caches of a core


def packed(weight, dtype):
    layer = torch.nn.Linear(WIDTH, INNER, bias=False)
    layer.weight.data = weight.clone()
    return mkldnn.to_mkldnn(layer) if dtype == torch.float32 else mkldnn.to_mkldnn(layer, dtype)


def milliseconds(product, x, weights):
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.process_time()
        for weight in weights:
            product(x, weight)
        best = min(best, time.process_time() - begin)
    return f"{1e3 * best:.1f}"


def main():
    torch.set_num_threads(1)
    weights = [np.random.default_rng(i).standard_normal((WIDTH, INNER), dtype=np.float32) for i in range(NUMBER)]
    turned = [torch.from_numpy(weight.T.copy()) for weight in weights]
    layers = {dtype: [packed(weight, dtype) for weight in turned] for dtype in (torch.float32, torch.bfloat16)}
    with torch.inference_mode():
        for rows in (1, 5, 16):
            x = np.ones((rows, WIDTH), np.float32)
            tensor = torch.from_numpy(x)
            figures = {
                "numpy": milliseconds(np.matmul, x, weights),
                "torch": milliseconds(torch.nn.functional.linear, tensor, turned),
            }
            for dtype, packed_layers in layers.items():
                given = tensor.to_mkldnn() if dtype == torch.float32 else tensor.to_mkldnn(dtype)
                figures[f"oneDNN, packed, {dtype}"] = milliseconds(lambda y, layer: layer(y), given, packed_layers)
            print(rows, "rows:", figures, flush=True)


if __name__ == "__main__":
    main()
