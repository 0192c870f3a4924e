"""Pages that the site has beside those in docs/: the experiments, the repository's own pages, and the reference of every room.

Links are written as they work in the repository, `../experiments/LOG.md`; on the site such a page lies one level higher.
"""

from __future__ import annotations

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
    for room in ROOMS:
        files.append(File.generated(config, f"api/{room}.md", content=_reference(room)))
    return files


def on_config(config):
    """The experiments and the rooms in the navigation, whichever there are."""
    pages = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("experiments/[0-9]*/README.md"))]
    config["nav"].append({"Experiments": [{"Log": "experiments/LOG.md"}, *pages]})
    config["nav"].append({"Reference": [{room: f"api/{room}.md"} for room in ROOMS]})
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
