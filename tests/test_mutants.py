"""The planted faults of tests/mutants/ can still be planted; `python tests/mutants/run.py` shows that they are found."""

import ast
from pathlib import Path

import pytest
from mutants.run import planted, read_mutants

ROOT = Path(__file__).parents[1]
MUTANTS = read_mutants()


def test_there_are_thirty_from_all_rooms():
    rooms = {Path(mutant.file).parts[1] for mutant in MUTANTS}
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 30
    every = {path.parent.name for path in (ROOT / "jsfdd").glob("*/__init__.py")} - {"demo"}
    assert rooms == every, every - rooms


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_can_be_planted_and_its_test_exists(mutant):
    ast.parse(planted(ROOT, mutant))
    file, name = mutant.test.split("[")[0].split("::")
    functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions
