"""`jsfdd completion`: print a completion script for a shell."""

from __future__ import annotations

import dataclasses
import typing

import tyro

from jsfdd.commands.outcome import Outcome, described

_SHELLS = ("bash", "zsh", "fish")

EXAMPLES = """
jsfdd completion bash > ~/.local/share/bash-completion/completions/jsfdd
jsfdd completion zsh  > ~/.zfunc/_jsfdd      # a directory of your $fpath
jsfdd completion fish > ~/.config/fish/completions/jsfdd.fish
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Print a completion script for a shell."""

    shell: tyro.conf.Positional[typing.Literal[_SHELLS]]
    """The shell that the script is for."""


def prepare(config: CompletionConfig) -> None:
    """Nothing to prepare."""


def run(config: CompletionConfig, _: None) -> Outcome:
    from jsfdd.commands.cli import COMMANDS, command
    from jsfdd.commands.parser import completion_script

    script = completion_script({name: command(name) for name in COMMANDS}, config.shell)
    return Outcome({"command": "completion", "script": script}, script)


def describe(config: CompletionConfig, _: None) -> Outcome:
    return described("completion", {}, [f"print a script for {config.shell}"])
