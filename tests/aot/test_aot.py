"""Every stage compiled for TPUs that are not here, and the programs read: what no test on a CPU can see.

Not part of `make test`: `make aot` installs libtpu and runs this.
"""

import math
import re

import jax
import pytest
from jax.experimental import topologies
from programs import NARROW, PROMPTS, RECIPES, lowered, setup

from jsfdd.commands.ahead import collectives, topology_mesh

SLICE = "v5e:2x4"
READING, DECODING = ("score", "hidden"), ("plain", "chain", "tree")
# A step of a tree moves the accepted path's keys and values, and for that lays the whole cache out anew and back.
COPIES = {"plain": 0, "chain": 0, "tree": 4}
TO_THE_HOST = re.compile(r" (infeed|outfeed|send|recv)\(|custom_call_target=\"(MoveTo\w*|xla_\w*callback\w*)\"")


@pytest.mark.parametrize("name", READING + DECODING)
def test_reading_and_decoding(name):
    """No exchange between devices, nothing to or from the host, no product in float32, and no copy of a cache in a loop."""
    program = lowered(name, topology_mesh(SLICE))
    text = program.compile().as_text()
    assert collectives(text) == {}
    assert not TO_THE_HOST.search(text)
    assert float32_products(program.as_text()) == []
    if name in DECODING:
        copies = copies_in_loops(text, cache_size(name))
        assert len(copies) <= COPIES[name], copies


@pytest.mark.parametrize("name", RECIPES)
def test_training(name):
    """One all-reduce, of gradients and sums together; the rest as above."""
    program = lowered(name, topology_mesh(SLICE))
    text = program.compile().as_text()
    assert {kind: count for kind, (_, count) in collectives(text).items()} == {"all-reduce": 1}
    assert not TO_THE_HOST.search(text)
    assert float32_products(program.as_text()) == []


@pytest.mark.parametrize("name", ["v9z:2x4", "v5p", "v5p:3x3x3", "h100:8"])
def test_a_slice_that_is_none(name):
    with pytest.raises(ValueError, match=f"{name}: no slice that libtpu knows"):
        topology_mesh(name)


def test_a_fault_of_the_compiler_itself_is_no_wrong_name(monkeypatch):
    def broken(**_):
        raise jax.errors.JaxRuntimeError("ABORTED: in use by another process")

    monkeypatch.setattr(topologies, "get_topology_desc", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ABORTED"):
        topology_mesh(SLICE)


def float32_products(stablehlo):
    """Products of two float32 arrays, as they are before the compiler: a bfloat16 model has none by accident. Sums that must be
    exact ask for the highest precision."""
    products = re.findall(r"stablehlo\.dot_general (.*) : \(tensor<([^>]*)>, tensor<([^>]*)>\)", stablehlo)
    assert products
    return [kinds for how, *kinds in products if all(kind.endswith("xf32") for kind in kinds) and "HIGHEST" not in how]


def cache_size(name):
    """Elements of the target's keys, or of its values, on one device."""
    slots = setup(name).cache_slots(PROMPTS.length)
    return NARROW.num_layers * PROMPTS.rows * NARROW.num_kv_heads * NARROW.head_dim * slots


def copies_in_loops(text, size):
    """Instructions that copy or transpose an array of so many elements, outside the entry computation.

    What is in there is done once; what a layer or a step does is in computations that its loops call.
    """
    inside, found = "", []
    for line in text.splitlines():
        inside = line if line.endswith("{") else inside
        match = re.search(r"= \w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\(", line)
        if match and not inside.startswith("ENTRY") and math.prod(map(int, match[1].split(","))) == size:
            found.append(line.strip())
    return found
