"""A room imports only rooms to its left (DESIGN §2), Flax stays in models/ and Orbax in one file."""

import ast
from pathlib import Path

import pytest

import jsfdd

PACKAGE = Path(jsfdd.__file__).parent
ROOMS = ["data", "models", "weights", "selection", "training", "decoding", "evaluation"]
EVERYWHERE = {"options", "config", "records", "mesh", "files", "processes", "progress"}
STAGES = {
    "cli", "answer", "doctor", "respond", "parser", "loading", "pipeline", "drafts", "hidden", "dry_run", "results", "__init__", "__main__",
}  # fmt: skip
FORBIDDEN = {("training", "decoding")}  # a probe that decodes comes in as an argument


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_left(path):
    room = path.parts[0] if len(path.parts) > 1 else None
    own = [name.split(".") for name in _imports(PACKAGE / path) if name.startswith("jsfdd.")]
    for _, other, *_ in own:
        if room is None:
            # Records and mesh are everyone's, so they use no room; the stages and what shows them may use all.
            assert path.stem in STAGES or other in EVERYWHERE
        else:
            assert other in EVERYWHERE or ROOMS.index(other) <= ROOMS.index(room), f"{path} imports {other}"
            assert (room, other) not in FORBIDDEN


@pytest.mark.parametrize("path", FILES, ids=str)
def test_flax_and_orbax_stay_in_their_rooms(path):
    imported = {name.split(".")[0] for name in _imports(PACKAGE / path)}
    assert "flax" not in imported or path.parts[0] == "models"
    assert "orbax" not in imported or path == Path("weights/checkpoint.py")
    assert "pickle" not in imported and "torch" not in imported


def test_files_hold_one_idea():
    for path in FILES:
        assert len((PACKAGE / path).read_text().splitlines()) < 500, path
