"""Pages that the site has beside those in docs/: the experiments, the repository's own pages, and the reference of every room.

Links are written as they work in the repository, `../experiments/LOG.md`; on the site such a page lies one level higher.
"""

from __future__ import annotations

import ast
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
ROOMS = ("base", "data", "models", "weights", "scoring", "selection", "hidden", "training", "decoding", "evaluation",
         "doctor", "report", "commands")  # fmt: skip


def on_files(files, config):
    """Add what lies outside of docs/."""
    outside = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "tpu/README.md", "experiments/LOG.md")]
    for path in [*outside, *sorted(ROOT.glob("experiments/*/README.md")), *sorted(ROOT.glob("experiments/*/*.png"))]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, "api/jsfdd.md", content=_front_door()))
    for room in ROOMS:
        files.append(File.generated(config, f"api/{room}.md", content=_reference(room)))
    return files


def on_config(config):
    """The experiments and the rooms in the navigation, whichever there are."""
    pages = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("experiments/[0-9]*/README.md"))]
    config["nav"].append({"Experiments": [{"Log": "experiments/LOG.md"}, *pages]})
    config["nav"].append({"Reference": [{"jsfdd": "api/jsfdd.md"}, *({room: f"api/{room}.md"} for room in ROOMS)]})
    return config


def on_page_markdown(markdown, page, config, files):
    """Links out of docs/ stay on the site; so do links of the repository's own pages into docs/. Wide tables get the width."""
    if page.file.src_uri.startswith("experiments/"):
        page.meta.setdefault("hide", ["toc"])
    if "/" not in page.file.src_uri:
        return markdown.replace("](../", "](").replace("](docs/", "](")
    return markdown.replace("](../../docs/", "](../../")


def _reference(room: str) -> str:
    """A page with the docstrings of all modules of a room, in the order in which `ls` has them."""
    package = f"jsfdd.{room}"
    modules = sorted(path.stem for path in (ROOT / "jsfdd" / room).glob("*.py") if path.stem != "__init__")
    parts = [f"::: {package}\n    options: {{show_root_heading: false, members: false}}"]
    parts += [f"::: {package}.{module}" for module in modules]
    return f"# {room}\n\n" + "\n\n".join(parts) + "\n"


def _front_door() -> str:
    """A page with the names that `import jsfdd` gives, each with its first line, and what is written for notebooks alone."""
    tree = ast.parse((ROOT / "jsfdd/__init__.py").read_text(encoding="utf-8"))
    (rooms,) = (ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and node.targets[0].id == "_PUBLIC")  # fmt: skip
    lines = ["# jsfdd", "", "`import jsfdd` gives these names. [In Python](../python.md) shows them at work.", ""]
    lines += ["| name | what it is |", "|---|---|"]
    for name, room in sorted((name, room) for room, names in rooms.items() for name in names):
        lines.append(f"| [`jsfdd.{name}`][{room}.{name}] | {_first_line(room, name)} |")
    return "\n".join(lines) + "\n\n::: jsfdd.api\n"


def _first_line(module: str, name: str) -> str:
    """The first line of an object's docstring."""
    path = (ROOT / module.replace(".", "/")).with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return (ast.get_docstring(node) or "").split("\n")[0].replace("|", "\\|")
    return ""
