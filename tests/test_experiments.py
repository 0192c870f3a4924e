"""The experiments: each says what it asks and how to run it, imports what exists, and keeps its figures as rows."""

import ast
import importlib
import json
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.results import read_results, write_results

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
FOLDERS = sorted(EXPERIMENTS.glob("[0-9]*"))
SCRIPTS = sorted(path.relative_to(EXPERIMENTS) for path in EXPERIMENTS.rglob("*.py"))
PACKAGED_DRAFT = ROOT / "jsfdd/data/demo/smollm2-draft/model.safetensors"  # a real draft for `--draft smollm2`
LARGEST = 220_000  # bytes of a file that nobody has to explain; a golden model of four experts takes 211,008


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_experiment_has_a_page_and_one_command(folder):
    page, script = (folder / "README.md").read_text(), folder / "run.sh"
    assert page.startswith(f"# {folder.name[:3]}: ") and f"experiments/{folder.name}/run.sh" in page
    assert script.stat().st_mode & 0o111, "run.sh cannot be executed"
    subprocess.run(["bash", "-n", script], check=True)
    for module in re.findall(r"^ *(?:TORCH_PYTHON=\S+ |\[\[.*\]\] \|\| )?run (\S+)", script.read_text(), re.MULTILINE):
        assert (EXPERIMENTS / module.replace(".", "/")).with_suffix(".py").exists(), module


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_scripts_import_what_exists(path):
    """Scripts run for hours, and not in this suite: a name that moved must show here."""
    lacking = []
    for node in ast.walk(ast.parse((EXPERIMENTS / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in ("jsfdd", "experiments"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError:
                        lacking.append(f"{node.module}.{alias.name}")
    assert not lacking


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_no_script_reaches_another_by_path(path):
    text = (EXPERIMENTS / path).read_text()
    allowed = {
        "004_peer_loaders/peers.py",
        "024_eagle3_peers/peers.py",
        "008_devices/cpu.py",
    }  # another project's checkout; this suite's helpers
    assert "sys.path" not in text or str(path) in allowed


def test_nothing_is_heavy():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    heavy = [path for path in paths if path.exists() and path.stat().st_size > LARGEST]
    assert heavy == [PACKAGED_DRAFT] and PACKAGED_DRAFT.stat().st_size < 9e6


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/*.jsonl")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_figures_are_kept_as_written(path, tmp_path):
    """What is read from the rows and written again is the same file."""
    write_results(tmp_path / "again.jsonl", read_results(path))
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()


words = st.text('aé"\n\u2028', max_size=6)
values = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=40,
)


@given(st.dictionaries(words, values, max_size=5), st.sampled_from([4, 40, 800]))
def test_rows_hold_any_results(tmp_path_factory, results, width):
    path = tmp_path_factory.mktemp("rows") / "results.jsonl"
    write_results(path, results, width)
    assert read_results(path) == results
    assert all(set(json.loads(line)) == {"at", "value"} for line in path.read_text(encoding="utf-8").split("\n")[:-1])
