"""EAGLE-3 in plain numpy and float64, a row at a time: what papers and their code say, in the reference trainer's indexing."""

import jax
import numpy as np


def rms(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotated(x, position, theta):
    """x [heads, H] at one position."""
    half = x.shape[-1] // 2
    angle = position * theta ** -(np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def slow_steps(draft, params, embedding, hidden, num_steps):
    """Per step i the list over rows t of what the head reads, of one sequence; row t of step i reads embedding[t + i].

    As EAGLE-3's trainer has it: hidden states stay in their row, tokens move to the left, rotary position t + i, and row t of
    step i sees step 0's keys up to t and its own row's of steps 1 … i.
    """
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    cfg, eps = draft.decoder, draft.decoder.rms_norm_eps
    embedding, hidden = np.asarray(embedding, np.float64), np.asarray(hidden, np.float64)
    length, width, per_key = len(embedding), cfg.hidden_size, cfg.num_heads // cfg.num_kv_heads
    streams = hidden[:, :-width]
    if draft.norm_before_fc:
        streams = rms(streams, p["input_norm"]["scale"], eps)
    if draft.fc_norm:
        parts = np.split(streams, len(draft.target_layers), axis=1)
        streams = np.concatenate([rms(x, p[f"fc_norm_{i}"]["scale"], eps) for i, x in enumerate(parts)], axis=1)
    states = list(streams @ p["fc"]["kernel"])
    layer, steps, seen = p["layer"], [], []  # seen[i][t]: keys and values of step i in row t
    for i in range(num_steps):
        pairs, outputs, following = [], [], []
        for t in range(length - i):
            normed = rms(states[t], layer["hidden_norm"]["scale"], eps)
            x = np.concatenate([rms(embedding[t + i], layer["embedding_norm"]["scale"], eps), normed])
            q, k, v = (x @ layer["attention"][f"{n}_proj"]["kernel"] for n in "qkv")
            q, k, v = (y.reshape(-1, cfg.head_dim) for y in (q, k, v))
            q, k = rotated(q, t + i, cfg.rope.theta), rotated(k, t + i, cfg.rope.theta)
            pairs.append((k, v))
            visible = (
                [pairs[s] for s in range(t + 1)] if i == 0 else [*seen[0][: t + 1], *(seen[j][t] for j in range(1, i)), (k, v)]
            )
            heads = []
            for head in range(cfg.num_heads):
                logits = np.array([q[head] @ keys[head // per_key] for keys, _ in visible]) * cfg.head_dim**-0.5
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                heads.append(sum(w * values[head // per_key] for w, (_, values) in zip(weights, visible)))
            residual = normed if draft.norm_before_residual else states[t]
            y = residual + np.concatenate(heads) @ layer["attention"]["o_proj"]["kernel"]
            m = rms(y, layer["mlp_norm"]["scale"], eps)
            gate = m @ layer["mlp"]["gate_proj"]["kernel"]
            y = y + (gate / (1 + np.exp(-gate)) * (m @ layer["mlp"]["up_proj"]["kernel"])) @ layer["mlp"]["down_proj"]["kernel"]
            normed = rms(y, p["norm"]["scale"], eps)
            outputs.append(normed)
            following.append(normed if draft.norm_output else y)
        steps.append(outputs)
        seen.append(pairs)
        states = following
    return steps
