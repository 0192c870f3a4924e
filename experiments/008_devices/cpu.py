"""`jsfdd plan` against measured memory, work per device, and what the programs exchange. See README.md."""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent.parent / "tests"
_COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
BATCH_TOKENS = 1024


def resident(field: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at its peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def part(name: str, *arguments: object, devices: int = 1) -> dict:
    """What `cpu.py --part NAME …` prints, run in a process of its own with so many forced devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # what compiling takes is part of what a command takes
    command = [sys.executable, __file__, "--part", name, *map(str, arguments)]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def stage_memory(*command: str) -> dict:
    """Growth of a command's memory over what the interpreter with all imports takes."""
    import jax

    import jsfdd.training.train
    import jsfdd.weights.target  # noqa: F401  what every command imports
    from jsfdd.commands.cli import main

    jax.block_until_ready(jax.numpy.ones(8) + 1)
    resident_before = resident("VmRSS")
    if code := main(list(command)):
        raise SystemExit(code)
    return {"growth": resident("VmHWM") - resident_before, "imports": resident_before}


def loaded_memory(data: str) -> dict:
    """Growth by loading the target, its tokenizer and the chats; `plan` counts the parameters alone."""
    import jax

    import jsfdd.training.train
    import jsfdd.weights.target  # noqa: F401  as above
    from jsfdd.commands.inputs import load
    from jsfdd.commands.options import ChatOptions, ModelOptions
    from jsfdd.commands.score import ScoreConfig

    jax.block_until_ready(jax.numpy.ones(8) + 1)
    resident_before = resident("VmRSS")
    chats = ChatOptions(data=(Path(data),), batch_tokens=BATCH_TOKENS)
    loaded = load(ScoreConfig(model=ModelOptions(target="smollm2"), chats=chats, out=Path("none")))
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.target.params))
    return {"growth": resident("VmRSS") - resident_before, "of_files": resident("RssFile"), "parameters": parameters}


def planned(data: str) -> dict:
    from jsfdd.commands.options import ChatOptions, ModelOptions
    from jsfdd.commands.plan import PlanConfig, prepare

    chats = ChatOptions(data=(Path(data),), batch_tokens=BATCH_TOKENS)
    options = PlanConfig(model=ModelOptions(target="smollm2"), chats=chats, retain_ratio=1.0, devices=1)
    stages = {stage.name: stage for stage in prepare(options).stages}
    return {name: {"peak": stage.peak, "of_which": stage.memory} for name, stage in stages.items()}


def work(data: str) -> dict:
    """Per number of devices: the calls of the compiled program, and the batches and tokens of each device."""
    from jsfdd.data.batches import choose_shapes, make_batches
    from jsfdd.data.chat import read_chats
    from jsfdd.data.template import tokenize_chats
    from jsfdd.scoring.passes import group_plans
    from jsfdd.weights.target import load_tokenizer

    samples, _ = tokenize_chats(read_chats([Path(data)]), load_tokenizer("smollm2"), 2048)
    lengths = [len(sample.tokens) for sample in samples]
    plans = make_batches(lengths, choose_shapes(lengths, BATCH_TOKENS))
    arrays = {}
    for devices in (1, 2, 4, 8):
        groups, batches, tokens = list(group_plans(plans, devices)), [0] * devices, [0] * devices
        for group in groups:
            for device, plan in enumerate(group):
                batches[device] += 1
                tokens[device] += plan.shape.rows * plan.shape.length
        arrays[devices] = {"calls": len(groups), "batches": batches, "padded_tokens": tokens}
    return arrays


def exchanges() -> dict:
    """Collectives in the compiled programs of SmolLM2 on 8 devices, by kind."""
    import jax
    import numpy as np

    from jsfdd.base.mesh import make_mesh
    from jsfdd.base.records import Batch, DraftBatch
    from jsfdd.models.draft import draft_config
    from jsfdd.models.target import init_params
    from jsfdd.scoring.score import make_score_step
    from jsfdd.training.loss import borrow
    from jsfdd.training.recipe import Recipe
    from jsfdd.training.step import init_state, make_optimizer, make_train_step, state_shardings
    from jsfdd.weights.target import read_architecture

    config, mesh, shape = read_architecture("smollm2"), make_mesh(8), (8, 64)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tokens, mask = jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, bool)
    score = make_score_step(config, mesh)
    programs = {"score": score.lower(params, Batch(tokens, mask, jax.ShapeDtypeStruct((8,), np.int32)))}
    draft, recipe = draft_config(config), Recipe()
    optimizer = make_optimizer(recipe, 100)
    shapes = jax.eval_shape(lambda: init_state(draft, optimizer, 0))
    frozen = jax.eval_shape(lambda p: borrow(config, p), params)
    weight, hidden = (jax.ShapeDtypeStruct(size, np.float32) for size in (shape, (*shape, config.hidden_size)))
    batch = DraftBatch(tokens, mask, weight, hidden)
    for name, parts in (("train", False), ("train --shard-optimizer", True)):
        places = state_shardings(draft, optimizer, mesh, parts)
        state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
        step = make_train_step(draft, optimizer, mesh, recipe, shard_optimizer=parts)
        programs[name] = step.lower(frozen, state, batch)
    return {
        name: dict(collections.Counter(_COLLECTIVE.findall(program.compile().as_text()))) for name, program in programs.items()
    }


def loading() -> list[dict]:
    """Two processes with half of a 268 MB target each (float32 safetensors): share and peak growth in bytes."""
    sys.path.insert(0, str(TESTS))
    from test_models_sharding import write_large_target

    with tempfile.TemporaryDirectory() as folder, socket.socket() as listener:
        write_large_target(Path(folder))
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        listener.close()
        command = [sys.executable, TESTS / "load_a_share.py", folder, address]
        processes = [subprocess.Popen([*map(str, command), str(i)], stdout=subprocess.PIPE, text=True) for i in range(2)]
        return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


def main() -> None:
    smoke = os.environ.get("SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a .jsonl.gz file of chats")
    parser.add_argument("--chats", type=int, default=4 if smoke else 36, help="how many of its first ones")
    parser.add_argument("--out", type=Path, default=Path(os.devnull) if smoke else HERE / "results.json")
    parser.add_argument("--part", nargs=argparse.REMAINDER, help="for the script itself")
    arguments = parser.parse_args()
    if arguments.part:
        parts = {
            "stage": stage_memory, "loaded": loaded_memory, "plan": planned, "work": work, "exchanges": exchanges,
            "loading": loading,
        }  # fmt: skip
        name, *rest = arguments.part
        print(json.dumps(parts[name](*rest)))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "chats.jsonl"
        with gzip.open(arguments.data, "rt") as lines:
            data.write_text("".join(line for line, _ in zip(lines, range(arguments.chats))))
        shared = ("--target", "smollm2", "--data", str(data), "--batch-tokens", str(BATCH_TOKENS), "--out", f"{folder}/run")
        results = {
            "chats": arguments.chats,
            "batch_tokens": BATCH_TOKENS,
            "plan": part("plan", data),
            "loaded": part("loaded", data),
            "score": part("stage", "score", *shared),
            "train": part("stage", "train", *shared, "--epochs", "1"),
            "work_per_device": part("work", data),
            "collectives_on_8_devices": part("exchanges", devices=8),
            "loading_of_two_processes": part("loading"),
        }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
