"""Compile the stages of an 8B target for a TPU slice, by length, with attention in blocks and with all logits at once."""

import argparse
import dataclasses
from pathlib import Path

import jax

from experiments.results import read_results, write_results
from jsfdd.commands.ahead import lower_decode, lower_score, lower_train, read_program, topology_mesh
from jsfdd.data.batches import Shape
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.models import blocked_attention
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.draft import draft_config
from jsfdd.scoring.score import make_score_step
from jsfdd.training.recipe import Recipe
from jsfdd.training.step import make_train_step

LLAMA_8B = DecoderConfig(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, max_position=131072, rms_norm_eps=1e-5, rope=Rope(5e5), tie_embeddings=False,
)  # fmt: skip
TOY = dataclasses.replace(
    LLAMA_8B, vocab_size=2048, hidden_size=512, intermediate_size=1024, num_layers=2, num_heads=4, num_kv_heads=2
)
RECIPE = Recipe(compute_dtype="bfloat16")
FORMS = {"blocks": blocked_attention.BLOCK, "all logits": 1 << 40}
# (stage, slice, rows and tokens of a device, form). Where all logits do not fit, the compiler refuses and says what they take.
CASES = [
    ("score", "v6e:2x4", Shape(4, 2048), "blocks"),
    ("score", "v6e:2x4", Shape(4, 2048), "all logits"),
    ("score", "v5p:2x2x1", Shape(2, 8192), "blocks"),
    ("score", "v5p:2x2x1", Shape(2, 8192), "all logits"),
    ("score", "v5p:2x2x1", Shape(1, 32768), "blocks"),
    ("score", "v5p:2x2x1", Shape(1, 131072), "blocks"),
    ("score", "v5e:2x4", Shape(1, 2048), "blocks"),
    ("train", "v5p:2x2x1", Shape(1, 2048), "blocks"),
    ("train", "v5p:2x2x1", Shape(1, 2048), "all logits"),
    ("train", "v5p:2x2x1", Shape(1, 8192), "blocks"),
    ("train", "v5p:2x2x1", Shape(1, 8192), "all logits"),
    ("train", "v5p:2x2x1", Shape(1, 32768), "blocks"),
    ("train", "v5p:2x2x1", Shape(1, 131072), "blocks"),
    ("decode", "v5p:2x2x1", Shape(8, 1024), "blocks"),
    ("decode", "v5p:2x2x1", Shape(1, 32768), "blocks"),
]


def lowered(stage, config, mesh, shape):
    if stage == "score":
        return lower_score(config, mesh, shape, keep_hidden=True)
    if stage == "train":
        return lower_train(config, mesh, shape, RECIPE)
    draft = draft_config(config)
    return lower_decode(DecodeSetup(target=config, drafts=(draft,), num_draft_tokens=4, max_new_tokens=128), mesh, shape)


def compiled(stage, config, topology, shape, form):
    """What the compiler says, or what it refuses."""
    for make in (make_score_step, make_train_step):
        make.cache_clear()
    jax.clear_caches()
    blocked_attention.BLOCK = FORMS[form]
    try:
        program = read_program(lowered(stage, config, topology_mesh(topology), shape))
    except jax.errors.JaxRuntimeError as error:
        return {"refused": next(line for line in str(error).splitlines() if "Used" in line or "RESOURCE" in line)[:200]}
    return {
        "arguments GB": round(program.arguments / 1e9, 2),
        "temporaries GB": round(program.temporaries / 1e9, 2),
        "results GB": round(program.results / 1e9, 2),
        "exchanges": {kind: f"{count}, {size / 1e9:.2f} GB" for kind, (size, count) in program.collectives.items()},
        "CPU seconds": round(program.seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    config = TOY if args.smoke else LLAMA_8B
    cases = [(stage, topology, Shape(1, 512), form) for stage, topology, _, form in CASES[:2]] if args.smoke else CASES
    results = read_results(args.results) if args.results else {}
    for stage, topology, shape, form in cases:
        name = f"{shape.rows} x {shape.length}"
        if name in results.get(stage, {}).get(topology, {}).get(form, {}):
            continue
        value = compiled(stage, config, topology, shape, form)
        print(stage, topology, name, form, value, flush=True)
        results.setdefault(stage, {}).setdefault(topology, {}).setdefault(form, {})[name] = value
        if args.results:
            write_results(args.results, results)


if __name__ == "__main__":
    main()
