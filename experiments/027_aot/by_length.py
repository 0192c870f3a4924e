"""What the compilers for TPUs and GPUs say of the stages of an 8B target, beside what `plan` computes."""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from experiments.results import read_results, write_results
from jsfdd.base.mesh import num_data_shards
from jsfdd.commands import costs
from jsfdd.commands.ahead import head_rounds, lower_decode, lower_score, lower_train, read_program, topology_mesh
from jsfdd.data.batches import Shape
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.draft import draft_config
from jsfdd.training.recipe import Recipe

LLAMA_8B = DecoderConfig(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, max_position=131072, rms_norm_eps=1e-5, rope=Rope(5e5), tie_embeddings=False,
)  # fmt: skip
TOY = dataclasses.replace(
    LLAMA_8B, vocab_size=2048, hidden_size=512, intermediate_size=1024, num_layers=2, num_heads=4, num_kv_heads=2
)
TARGETS = {"8B": LLAMA_8B}
RECIPE, NEW_TOKENS = Recipe(compute_dtype="bfloat16"), 128
# (target, stage, devices, model shards, rows and tokens of a data shard).
TPUS = [
    ("8B", "score", "v5p:2x2x2", 1, Shape(4, 2048)),
    ("8B", "score", "v5p:2x2x2", 1, Shape(2, 8192)),
    ("8B", "score", "v5p:2x2x2", 1, Shape(1, 32768)),
    ("8B", "score", "v5p:2x2x2", 1, Shape(1, 131072)),
    ("8B", "train", "v5p:2x2x2", 1, Shape(1, 2048)),
    ("8B", "train", "v5p:2x2x2", 1, Shape(1, 8192)),
    ("8B", "train", "v5p:2x2x2", 1, Shape(1, 32768)),
    ("8B", "train", "v5p:2x2x2", 1, Shape(1, 131072)),
    ("8B", "decode", "v5p:2x2x2", 1, Shape(8, 1024)),
    ("8B", "plain", "v5p:2x2x2", 1, Shape(8, 1024)),
    ("8B", "score", "v6e:2x4", 1, Shape(4, 2048)),
    ("8B", "train", "v6e:2x4", 1, Shape(1, 2048)),
    ("8B", "decode", "v6e:2x4", 1, Shape(8, 1024)),
    ("8B", "score", "v5e:4x4", 1, Shape(1, 2048)),
]
GPUS = [
    ("8B", stage, devices, 1, shape)
    for devices in ("h100:8", "h200:8", "b200:8")
    for stage, shape in (
        ("score", Shape(4, 2048)), ("score", Shape(2, 8192)), ("train", Shape(1, 2048)), ("decode", Shape(8, 1024))
    )
]  # fmt: skip


def lowered(stage, config, mesh, shape):
    if stage == "score":
        return lower_score(config, mesh, shape, keep_hidden=True)
    if stage == "train":
        return lower_train(config, mesh, shape, RECIPE)
    drafts = () if stage == "plain" else (draft_config(config),)
    setup = DecodeSetup(target=config, drafts=drafts, num_draft_tokens=4 * len(drafts), max_new_tokens=NEW_TOKENS)
    return lower_decode(setup, mesh, shape)


def planned(stage, config, mesh, shape):
    """Bytes of a device that `plan` gives a stage's program."""
    platform, data, model = mesh.devices.flat[0].platform, num_data_shards(mesh), mesh.shape["model"]
    lengths = costs.Lengths(np.full(2 * shape.rows * data, shape.length), np.full(2 * shape.rows * data, shape.length // 2), "")
    tokens = shape.rows * shape.length
    if stage == "score":
        return costs.score_stage(config, lengths, tokens, 2, model, platform).program
    if stage == "train":
        return costs.train_stage(config, lengths, tokens * data, 1.0, RECIPE, 2, model, data, platform).program
    slots = shape.length + NEW_TOKENS
    cost = costs.evaluate_stage(config, RECIPE, slots, shape.rows * data, 2, model, data, platform)
    return cost.program - (cost.memory["draft"] if stage == "plain" else 0)


def compiled(stage, config, devices, model_shards, shape):
    """What the compiler says, or what it refuses."""
    jax.clear_caches()
    mesh = topology_mesh(devices, model_shards)
    try:
        program = read_program(lowered(stage, config, mesh, shape), head_rounds(stage, mesh, shape))
    except jax.errors.JaxRuntimeError as error:
        return {"refused": next(line for line in str(error).splitlines() if "Used" in line or "RESOURCE" in line)[:200]}
    return {
        "GB": round(program.peak / 1e9, 2),
        "plan GB": round(planned(stage, config, mesh, shape) / 1e9, 2),
        "arguments GB": round(program.arguments / 1e9, 2),
        "temporaries GB": round(program.temporaries / 1e9, 2),
        "results GB": round(program.results / 1e9, 2),
        "exchanges": {kind: f"{count}, {size / 1e9:.3f} GB" for kind, (size, count) in program.collectives.items()},
        "Mcycles": round(program.cycles / 1e6, 1),
        "Mcycles of a round": round(program.round_cycles / 1e6, 2),
        "CPU seconds": round(program.seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--gpus", action="store_true", help="compile for GPUs instead of TPUs")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    cases = GPUS if args.gpus else TPUS
    targets = TARGETS
    if args.smoke:
        cases, targets = [(*case[:4], Shape(1, 512)) for case in (cases[0], cases[-1])], dict.fromkeys(TARGETS, TOY)
    results = read_results(args.results) if args.results else {}
    for target, stage, devices, model_shards, shape in cases:
        name = f"{shape.rows} x {shape.length}" + (f", {model_shards} model shards" if model_shards > 1 else "")
        known = results.get(target, {}).get(stage, {}).get(devices, {})
        if args.only not in f"{target} {stage} {devices} {name}" or name in known:
            continue
        value = compiled(stage, targets[target], devices, model_shards, shape)
        print(target, stage, devices, name, value, flush=True)
        results = read_results(args.results) if args.results else results  # another run may have added rows
        results.setdefault(target, {}).setdefault(stage, {}).setdefault(devices, {})[name] = value
        if args.results:
            write_results(args.results, results)


if __name__ == "__main__":
    main()
