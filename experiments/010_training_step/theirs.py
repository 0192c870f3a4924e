"""The same step in PyTorch, written as EAGLE's trainers write it: for each line on stdin, seconds and loss. See compare.py."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

shared = {name: torch.from_numpy(value) for name, value in np.load(Path(sys.argv[1]) / "shared.npz").items()}
sizes = json.loads((Path(sys.argv[1]) / "sizes.json").read_text())
torch.set_num_threads(2)
names = ["fc", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
params = {name: torch.nn.Parameter(shared[name].clone()) for name in names}
params["norm"] = torch.nn.Parameter(torch.ones(sizes["hidden_size"]))
optimizer = torch.optim.AdamW(params.values(), lr=5e-4 / 51, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
embedding = shared["embedding"]
tokens, hidden, counted = shared["tokens"].long(), shared["hidden"], shared["counted"]
heads, kv_heads, dim = sizes["num_heads"], sizes["num_kv_heads"], sizes["head_dim"]
frequencies = 1e5 ** -(torch.arange(0, dim, 2) / dim)
angles = torch.arange(tokens.shape[1] - 1)[:, None] * frequencies[None]
cos, sin = angles.cos(), angles.sin()


def rotate(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def draft(embedded, states):
    x = functional.linear(torch.cat([embedded, states], dim=-1), params["fc"])
    rows, length, _ = x.shape

    def split(name, count):
        return functional.linear(x, params[name]).view(rows, length, count, dim).transpose(1, 2)

    q, k, v = rotate(split("q_proj", heads)), rotate(split("k_proj", kv_heads)), split("v_proj", kv_heads)
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + functional.linear(y.transpose(1, 2).reshape(rows, length, heads * dim), params["o_proj"])
    y = functional.rms_norm(x, x.shape[-1:], params["norm"], 1e-5)
    gated = functional.silu(functional.linear(y, params["gate_proj"])) * functional.linear(y, params["up_proj"])
    return x + functional.linear(gated, params["down_proj"])


def step():
    optimizer.zero_grad(set_to_none=True)
    predicted, truth = draft(embedding[tokens[:, 1:]], hidden[:, :-1]), hidden[:, 1:]
    mask = counted[:, 1:]
    predicted, truth = predicted[mask], truth[mask]
    with torch.no_grad():
        p = functional.softmax(functional.linear(truth, embedding), dim=-1)
    log_q = functional.log_softmax(functional.linear(predicted, embedding), dim=-1)
    loss = functional.smooth_l1_loss(predicted, truth) - 0.1 * (p * log_q).sum(-1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params.values(), 0.5)
    optimizer.step()
    return loss.item()


for _ in sys.stdin:
    begin = time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - begin
    assert math.isfinite(loss)
    print(json.dumps({"seconds": seconds, "loss": loss}), flush=True)
