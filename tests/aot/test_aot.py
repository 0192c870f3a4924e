"""Every stage compiled for TPUs that are not here, and the programs read: what no test on a CPU can see.

Not part of `make test`: `make aot` installs libtpu and runs this. What a program says of itself (products in float32) is the
same for every chip; what the compiler makes of it (memory, exchanges, copies, a kernel) is read on one chip for most programs,
and on every chip for one or two.
"""

import math
import re

import jax
import pytest
from jax.experimental import topologies
from planned import planned_bytes
from programs import PROGRAMS, cache_size

from jsfdd.commands.ahead import collectives, topology_mesh
from jsfdd.commands.schedule import schedule

CASES = [
    ("SmolLM2 score", "v5e:2x4"),
    ("SmolLM2 hidden states", "v6e:2x4"),
    ("SmolLM2 train", "v5e:2x4"),
    ("SmolLM2 evaluate", "v5e:2x4"),
    ("score", "v5p:2x2x1"),
    ("score", "tpu7x:2x2x1"),
    ("mixture", "v6e:2x4"),
    ("EAGLE-3 states", "v5p:2x2x1"),
    ("EAGLE-3", "v6e:2x4"),
    ("plain", "v5p:2x2x1"),
    ("tree", "v5e:2x4"),
]
# A step of a tree moves the accepted path's keys and values, and for that lays the whole cache out anew and back. With one row
# SmolLM2's chains copy twice, in a program that was not read before.
COPIES = {"tree": 4, "SmolLM2 evaluate": 2}
# Prompts of 128 tokens are one block.
WITHOUT_KERNEL = ("plain", "tree")
TO_THE_HOST = re.compile(r" (infeed|outfeed|send|recv)\(|custom_call_target=\"(MoveTo\w*|xla_\w*callback\w*)\"")


@pytest.mark.parametrize(("name", "devices"), CASES, ids=[f"{name}, {devices}" for name, devices in CASES])
def test_program(name, devices):
    """No exchange between devices but training's one all-reduce, nothing to or from the host, no product in float32, no copy of
    a cache in a loop, and of SmolLM2 the memory that `plan` computes, to a tenth."""
    program = PROGRAMS[name](topology_mesh(devices))
    compiled = program.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    trains = name in ("EAGLE-3", "SmolLM2 train")
    assert {kind: count for kind, (_, count) in collectives(text).items()} == ({"all-reduce": 1} if trains else {})
    assert not TO_THE_HOST.search(text)
    assert ("splash" in text) == (name not in WITHOUT_KERNEL)
    assert float32_products(program.as_text()) == []
    assert sum(step.cycles for step in schedule(text)) > 1e4
    if size := cache_size(name):
        copies = copies_in_loops(text, size)
        assert len(copies) <= COPIES.get(name, 0), copies
    if (expected := planned_bytes(name)) is not None:
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        found = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
        assert expected == pytest.approx(found, rel=0.1), memory


@pytest.mark.parametrize("name", ["v9z:2x4", "v5p", "v5p:3x3x3", "p100:8"])
def test_a_slice_that_is_none(name):
    with pytest.raises(ValueError, match=f"{name}: no slice that libtpu knows"):
        topology_mesh(name)


def test_a_fault_of_the_compiler_itself_is_no_wrong_name(monkeypatch):
    def broken(**_):
        raise jax.errors.JaxRuntimeError("ABORTED: in use by another process")

    monkeypatch.setattr(topologies, "get_topology_desc", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ABORTED"):
        topology_mesh("v5e:2x4")


def float32_products(stablehlo):
    """Products of two float32 arrays, as they are before the compiler: a bfloat16 model has none by accident. Sums that must be
    exact ask for the highest precision, and a number for each pair of rows, as in the kernel's backward pass, is no product of
    matrices."""
    products = re.findall(r"stablehlo\.dot_general (.*) : \(tensor<([^>]*)>, tensor<([^>]*)>\)", stablehlo)
    assert products
    return [
        kinds
        for how, *kinds in products
        if all(kind.endswith("xf32") for kind in kinds) and "HIGHEST" not in how and not of_rows(how, kinds[0])
    ]


def of_rows(how, kind):
    """Whether all axes of an operand but one are batches."""
    batches = re.search(r"batching_dims = \[([^\]]*)\]", how)
    return batches is not None and len(batches[1].split(",")) == kind.count("x") - 1


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
