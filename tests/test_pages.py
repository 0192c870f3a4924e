"""The pages for users: README is short, and a command that a page shows is one that jsfdd has, with options that it takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jsfdd.commands.cli import COMMANDS, command
from jsfdd.commands.options import OutputOptions, option_of, options_of
from jsfdd.training.recipe import PYTHON_ONLY

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tpu" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# Options of other programs that pages name: pip, tpu/run.sh, Slurm, and serving engines.
OTHERS = {"--no-deps", "--fetch", "--force", "--until-done", "--zone", "--nodes", "--gpus-per-node", "--ntasks-per-node"}
OTHERS |= {
    "--kv-transfer-config",
    "--model-path",
    "--speculative-algorithm",
    "--speculative-config",
    "--speculative-draft-model-path",
}
OTHERS |= {"--speculative-eagle-topk", "--speculative-num-draft-tokens", "--speculative-num-steps"}


def options_taken(name: str) -> set[str]:
    options = {*options_of(command(name).config), *options_of(OutputOptions)} - {*PYTHON_ONLY}
    return {option_of(option) for option in options} | {"--help"}


TAKEN = {name: options_taken(name) for name in COMMANDS}


def commands_shown(page: str) -> list[tuple[str, list[str]]]:
    """The commands of a page's code blocks, with their options."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    shown = [re.match(r"(?:.*/)?jsfdd ([a-z]+)\b(.*)", line.split("#")[0].removeprefix("$ ")) for line in lines]
    return [(match[1], OPTION.findall(match[2])) for match in shown if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_of_a_page_exists(page):
    text = page.read_text(encoding="utf-8")
    assert {*OPTION.findall(text)} <= {*OTHERS}.union(*TAKEN.values())
    for name, options in commands_shown(text):
        assert {*options} <= TAKEN[name], f"jsfdd {name}"


def test_the_pages_name_every_command_and_no_other():
    named = {name for page in PAGES for name in re.findall(r"`jsfdd ([a-z]+)\b", page.read_text(encoding="utf-8"))}
    assert named == {*COMMANDS}


def test_a_newcomer_reads_the_readme_in_three_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110 and len(text.split()) <= 800
