"""The command line's parser: a config's fields are options and its groups panels, drawn by tyro; examples below."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Generic, NamedTuple, TypeVar

import docstring_parser
import tyro

from jsfdd.commands.options import OutputOptions, option_of, options_of

Config = TypeVar("Config")
_STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.SuppressFixed)


@dataclasses.dataclass(frozen=True)
class Asked(Generic[Config]):
    """A command's config, and how to answer."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    output: OutputOptions


class Command(NamedTuple):
    """The config class of a command, and what its help ends with."""

    config: type
    examples: str


def parse(name: str, command: Command, words: Sequence[str]) -> Asked:
    """The config that a command's words ask for.

    Raises:
      SystemExit: 0 after --help, 2 for an unknown or missing option.
      ValueError: a value is not a good one, or an option of several values is given twice: tyro would forget the first.
    """
    _explain(command.config)
    several = {option_of(option) for option, (kind, _) in options_of(command.config).items() if _is_tuple(kind)}
    given = [word.partition("=")[0].replace("_", "-") for word in words]
    for option in sorted(several):
        if given.count(option) > 1:
            raise ValueError(f"{option}: given {given.count(option)} times; give all its values after one, as in {option} A B")
    try:
        return tyro.cli(
            Asked[command.config], args=words, prog=f"jsfdd {name}", description=inspect.getdoc(command.config), config=_STYLE
        )
    except SystemExit as stop:
        if not stop.code:
            print(f"example:\n{command.examples}")
        raise


def completion_script(commands: Mapping[str, Command], shell: str) -> str:
    """A completion script of the whole command line, for bash, zsh or fish."""
    for command in commands.values():
        _explain(command.config)
    members = tuple(
        Annotated[Asked[command.config], tyro.conf.subcommand(name, prefix_name=False)] for name, command in commands.items()
    )
    with contextlib.redirect_stdout(io.StringIO()) as script, contextlib.suppress(SystemExit):
        tyro.cli(typing.Union[members], prog="jsfdd", args=["--tyro-write-completion", shell, "-"], config=_STYLE)  # noqa: UP007
    return script.getvalue().rstrip("\n")


def _explain(kind: type) -> None:
    """Give tyro the docstring under each option as one paragraph; left alone, it keeps the line breaks of the source."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        for option in docstring_parser.parse_from_object(base).params:
            fields[option.arg_name].metadata = {"help": " ".join(option.description.split())}
    for group in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(group):
            _explain(group)


def _is_tuple(kind) -> bool:
    plain = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    return typing.get_origin(plain) is tuple
