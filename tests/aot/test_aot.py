"""Every stage compiled for TPUs that are not here, and the programs read: what no test on a CPU can see.

Not part of `make test`: `make aot` installs libtpu and runs this.
"""

import functools
import math
import re

import pytest
from programs import SMOLLM2, TOY, TREE, capture, decode, score, topology_mesh, train

from jsfdd.training.recipe import Recipe

TOPOLOGIES = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4")
EAGLE3 = Recipe(draft_kind="eagle3", compute_dtype="bfloat16", draft_steps=2)
ROWS = 2  # a device; with one row the compiler drops the axis, and scatters are simpler
READING = {
    "score": score,
    "capture": functools.partial(capture, layers=(2, 3, 4)),
    "plain": functools.partial(decode, rows=ROWS, drafts=0),
    "chain": functools.partial(decode, rows=ROWS),
    "tree": functools.partial(decode, rows=ROWS, tree=TREE),
}
TRAINING = {"EAGLE": train, "EAGLE-3": functools.partial(train, recipe=EAGLE3)}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")
TO_THE_HOST = re.compile(r" (infeed|outfeed|send|recv)\(|custom_call_target=\"(MoveTo\w*|xla_\w*callback\w*)\"")


@pytest.fixture(params=TOPOLOGIES)
def mesh(request):
    return topology_mesh(request.param)


@pytest.mark.parametrize("program", READING.values(), ids=READING.keys())
def test_reading_and_decoding(mesh, program):
    """No collective, nothing to or from the host, no product in float32, and no copy of a cache in a loop."""
    lowered = program(mesh, TOY)
    text = lowered.compile().as_text()
    assert COLLECTIVE.findall(text) == []
    assert TO_THE_HOST.findall(text) == []
    assert float32_products(lowered.as_text()) == []
    if "while" in text and program not in (READING["score"], READING["capture"]):
        assert copies_in_loops(text, cache_of(TOY, program)) == []


@pytest.mark.parametrize("program", TRAINING.values(), ids=TRAINING.keys())
def test_training(mesh, program):
    """One all-reduce, of gradients and sums together; the rest as above."""
    lowered = program(mesh, TOY)
    text = lowered.compile().as_text()
    assert COLLECTIVE.findall(text) == ["all-reduce"]
    assert TO_THE_HOST.findall(text) == []
    assert float32_products(lowered.as_text()) == []


def test_memory_is_linear_in_length():
    """Temporaries of one device, four times the tokens: 4 and not 16 times as many."""
    mesh = topology_mesh("v5p:2x2x2")
    for program in (score, train):
        short, long = (program(mesh, TOY, length=n).compile().memory_analysis().temp_size_in_bytes for n in (8192, 32768))
        assert long < 4.2 * short


def test_a_real_targets_shape():
    """SmolLM2's widths are no multiples of a tile; its programs hold no collective and no copy either."""
    mesh = topology_mesh("v5e:2x4")
    assert COLLECTIVE.findall(score(mesh, SMOLLM2).compile().as_text()) == []
    assert COLLECTIVE.findall(train(mesh, SMOLLM2).compile().as_text()) == ["all-reduce"]


def float32_products(stablehlo):
    """Matrix products of two float32 operands, as they are before the compiler: a bfloat16 model has none."""
    operands = re.findall(r"stablehlo\.dot_general .* : \((tensor<[^>]*>), (tensor<[^>]*>)\)", stablehlo)
    assert operands
    return [pair for pair in operands if all(kind.endswith("xf32>") for kind in pair)]


def cache_of(config, program):
    """The number of elements of the target's keys, or values, on one device."""
    tree = program.keywords.get("tree")
    extra = max(tree.nodes + 1, tree.draft_slots) if tree else 5 if program.keywords.get("drafts", 1) else 1
    slots = 128 + 64 + extra
    return config.num_layers * ROWS * config.num_kv_heads * config.head_dim * slots


def copies_in_loops(text, size):
    """Instructions that copy or transpose an array of so many elements, outside the entry computation.

    What is in there is done once; everything that a layer or a step does is in computations that its loops call.
    """
    inside, found = "", []
    for line in text.splitlines():
        inside = line if line.endswith("{") else inside
        match = re.search(r"= \w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\(", line)
        if match and not inside.startswith("ENTRY") and math.prod(map(int, match[1].split(","))) == size:
            found.append(line.strip())
    return found
