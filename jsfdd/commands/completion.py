"""`jsfdd completion`: print a completion script for a shell."""

from __future__ import annotations

import dataclasses
import typing

import tyro

from jsfdd.commands.outcome import Outcome

_SHELLS = ("bash", "zsh", "fish")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Print a completion script for a shell."""

    shell: tyro.conf.Positional[typing.Literal[_SHELLS]]
    """Whose script."""


def prepare(config: CompletionConfig) -> None:
    """Nothing."""


def run(config: CompletionConfig, _: None) -> Outcome:
    from jsfdd.commands.cli import STAGES, configs
    from jsfdd.commands.parser import completion_script

    return Outcome({"command": "completion"}, completion_script(configs(), STAGES, config.shell))
