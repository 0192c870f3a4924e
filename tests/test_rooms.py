"""A room imports only itself and rooms to its left (DESIGN §2); Flax stays in models/ and Orbax in one file."""

import ast
from pathlib import Path

import pytest

import jsfdd

PACKAGE = Path(jsfdd.__file__).parent
ROOMS = (
    "base", "data", "models", "weights", "scoring", "selection", "hidden", "training", "decoding", "evaluation", "doctor",
    "report", "commands",
)  # fmt: skip
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.glob("*/**/*.py"))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_left(path):
    others = {name.split(".")[1] for name in _imports(path) if name.startswith("jsfdd.")}
    right = {other for other in others if ROOMS.index(other) > ROOMS.index(path.parts[0])}
    assert not right, f"{path} imports {', '.join(sorted(right))}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_flax_and_orbax_stay_in_their_rooms(path):
    imported = {name.split(".")[0] for name in _imports(path)}
    assert "flax" not in imported or path.parts[0] == "models"
    assert "orbax" not in imported or path == Path("weights/checkpoint.py")
    assert "pickle" not in imported and "torch" not in imported


def test_files_hold_one_idea():
    for path in FILES:
        assert len((PACKAGE / path).read_text().splitlines()) < 500, path
