"""What recording costs, and how near what it records is to a pass over whole texts. See README.md."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.base.mesh import make_mesh, shard_rows, to_host
from jsfdd.base.records import Sample
from jsfdd.data.batches import Shape, pad_batch
from jsfdd.data.chat import read_chats
from jsfdd.data.template import render_prompt
from jsfdd.decoding.generate import make_generate, prepare_params
from jsfdd.decoding.kept import tail_of
from jsfdd.decoding.prompts import prompt_batch
from jsfdd.decoding.recorded import Recorded, make_recorded
from jsfdd.decoding.settings import decode_setup
from jsfdd.models.draft import layers_read
from jsfdd.models.target import final_state, head_logits, hidden_states
from jsfdd.scoring.flatness import token_flatness
from jsfdd.scoring.score import make_score_step
from jsfdd.weights.target import Target, load_target

ROWS, LONGEST, REPEATS = 8, 32, 3


class Case:
    """A target in one dtype, and a batch of prompts."""

    def __init__(self, path: Path, dtype):
        self.mesh = make_mesh(data=1)
        self.target: Target = load_target("smollm2", dtype, self.mesh)
        chats = read_chats((path,))
        chats = chats[:: max(len(chats) // ROWS, 1)][:ROWS]
        self.prompts = [render_prompt(self.target.tokenizer, chat.messages[:1]) for chat in chats]
        self.batch = shard_rows(prompt_batch(self.prompts, range(len(chats)), len(chats), seed=0), self.mesh)
        self.setup = decode_setup(self.target, max_new_tokens=LONGEST)
        self.params = prepare_params(self.target.params, (), self.mesh)
        self.tail, self.layers = tail_of(self.target.tokenizer), layers_read(self.target.config, "eagle3")

    def record(self, temperature: float, layers: tuple[int, ...], dtype: str) -> Recorded:
        decode = make_recorded(self.setup, self.mesh, tail=self.tail, layers=layers, dtype=dtype)
        return decode(self.params, self.batch, temperature)

    def samples(self, out: Recorded) -> list[Sample]:
        """The conversations as they would be tokenized."""
        samples = []
        for b, prompt in enumerate(self.prompts):
            answer = out.tokens[b, : out.lengths[b]]
            tokens = np.array([*prompt, *answer, *self.tail[1 if answer[-1] == self.tail[0] else 0 :]], np.int32)
            samples.append(Sample(str(b), "", tokens, np.arange(len(tokens)) >= len(prompt)))
        return samples


def cost(case: Case) -> None:
    """Prints CPU seconds of one batch, the programs being compiled."""
    samples = case.samples(to_host(case.record(0.0, (), "bfloat16")))
    longest = max(len(sample.tokens) for sample in samples)
    batch = pad_batch(samples, Shape(len(samples), -(-longest // 16) * 16))
    step = make_score_step(case.target.config, case.mesh, hidden_dtype="bfloat16")
    ways: dict[str, Callable] = {
        "plain decoding": lambda: make_generate(case.setup, case.mesh)(case.params, case.batch, 0.0),
        "recording": lambda: case.record(0.0, (), "bfloat16"),
        "recording for EAGLE-3": lambda: case.record(0.0, case.layers, "bfloat16"),
        "a scoring pass": lambda: step(case.target.params, batch),
    }
    for way in ways.values():
        jax.block_until_ready(way())
    seconds = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            begin = time.process_time()
            jax.block_until_ready(way())
            seconds[name].append(time.process_time() - begin)
    for name, values in seconds.items():
        print(f"{name}: {', '.join(f'{value:.2f}' for value in values)} CPU seconds", flush=True)


def distance(case: Case, temperature: float) -> None:
    """Prints how far recorded states and scores are from a pass over whole texts."""
    out = to_host(case.record(temperature, case.layers, "float32"))
    samples = case.samples(out)

    @jax.jit
    def whole(tokens):
        hidden = hidden_states(case.target.config, case.target.params, tokens, case.layers)
        logits = head_logits(case.target.config, case.target.params, final_state(case.target.config, hidden))
        return hidden.astype(jnp.float32), token_flatness(logits)

    tokens = pad_batch(samples, Shape(len(samples), max(len(sample.tokens) for sample in samples))).tokens
    hidden, flatness = jax.device_get(whole(tokens))
    parts, width = len(case.layers) + 1, case.target.config.hidden_size
    states, scores, means = [], [], []
    for b, (prompt, sample) in enumerate(zip(case.prompts, samples)):
        n = out.lengths[b]
        found = np.concatenate([out.prompt_hidden[b, : len(prompt)], out.hidden[b, : n - 1], out.tail_hidden[b]])
        size = len(sample.tokens)
        x, y = found[:size].reshape(size, parts, width), hidden[b, :size].reshape(size, parts, width)
        states.append(np.linalg.norm(x - y, axis=-1) / np.linalg.norm(y, axis=-1))
        mine, other = out.scores.flatness[b, : n - 1], flatness[b, len(prompt) : len(prompt) + n - 1]
        scores.append(np.abs(mine / other - 1))
        means.append(abs(mine.mean() / other.mean() - 1))
    states, scores = np.concatenate(states), np.concatenate(scores)
    dtype = case.target.params["embed"]["embedding"].dtype
    print(f"{dtype}, T = {temperature:g}: states {states.mean():.1e} on average, at most {states.max():.1e};", end=" ")
    print(f"a token's flatness {scores.mean():.1e}, at most {scores.max():.1e}; a sample's {max(means):.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chats", type=Path)
    path = parser.parse_args().chats
    for dtype in (jnp.float32, jnp.bfloat16):
        case = Case(path, dtype)
        if dtype == jnp.float32:
            cost(case)
        for temperature in (0.0, 1.0):
            distance(case, temperature)


if __name__ == "__main__":
    main()
