"""The time of a program by the compiler for TPUs: its estimates of cycles, times the rounds of the loops around them.

    for step in sorted(schedule(compiled.as_text()), key=lambda step: -step.cycles): ...

libtpu writes into every scheduled instruction how many cycles it expects it to take. A loop counts from 0 up to a constant,
which is its rounds; one that depends on data (blocks of counted tokens, steps of decoding) has as many as the caller says.
Nothing here has run: it is what the compiler computed. A kernel written by hand has no estimate, and is not in the sum.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# "%name (parameters) -> results {", perhaps after ENTRY; and an instruction "%name = result kind(…), …".
_BEGIN = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_NAME = re.compile(r'op_name="([^"]*)"')
_BODY, _CONDITION = re.compile(r"body=%?([\w.\-]+)"), re.compile(r"condition=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
_CALLED = re.compile(r"to_apply=%?([\w.\-]+)")
_UNKNOWN = 1 << 62  # what stands for no estimate


class Step(NamedTuple):
    """An instruction: the computation it is in, what the program calls it, its result, and its cycles in all rounds."""

    inside: str
    name: str
    operation: str
    result: str
    rounds: int
    cycles: int


def schedule(text: str, rounds: int = 1) -> list[Step]:
    """The instructions of a compiled program that the compiler has estimated, each as often as it is executed.

    Args:
      text: the scheduled HLO, `compiled.as_text()`.
      rounds: of the outermost loops whose rounds are not known when the program is compiled.
    """
    computations, entry = _computations(text)
    steps: list[Step] = []

    def visit(name: str, times: int, is_known: bool) -> None:
        for instruction, line in computations[name]:
            if (body := _BODY.search(line)) and " while(" in line:
                constant = _rounds(computations[_CONDITION.search(line)[1]])
                repeats = constant if constant is not None else rounds if is_known else 1
                visit(body[1], times * repeats, is_known and constant is not None)
            elif " conditional(" in line:
                for several, single in _BRANCHES.findall(line):
                    for branch in (several or single).split(","):
                        visit(branch.strip().lstrip("%"), times, is_known)
            elif " call(" in line:
                visit(_CALLED.search(line)[1], times, is_known)
            elif (cycles := _CYCLES.search(line)) and int(cycles[1]) < _UNKNOWN:
                called, result = _NAME.search(line), line.split(" ")[0]
                expected = times * int(cycles[1])
                steps.append(Step(name, instruction, called[1] if called else "", result, times, expected))

    visit(entry, 1, True)
    return steps


def _rounds(condition: list[tuple[str, str]]) -> int | None:
    """The constant that a loop's counter is compared with; None if it is compared with something else."""
    compares = any(" compare(" in line and "direction=LT" in line for _, line in condition)
    constants = [int(match[1]) for _, line in condition if (match := _CONSTANT.match(line))]
    return constants[0] if compares and len(constants) == 1 else None


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """Each computation's instructions, (name, the rest of the line), and the name of the entry computation."""
    computations: dict[str, list[tuple[str, str]]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if begin := _BEGIN.match(line):
            inside = computations.setdefault(begin[2], [])
            entry = begin[2] if begin[1] else entry
        elif inside is not None and (instruction := _INSTRUCTION.match(line)):
            inside.append((instruction[1], instruction[2]))
    return computations, entry
