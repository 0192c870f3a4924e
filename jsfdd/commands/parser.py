"""Parse the command line with tyro: a config's fields become options, its groups panels; examples follow the help."""

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
class Invocation(Generic[Config]):
    """A parsed command line: the command's config, and the output options."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    output: OutputOptions


class Command(NamedTuple):
    """A command's config class, and the examples that end its help."""

    config: type
    examples: str


def parse(name: str, command: Command, words: Sequence[str]) -> Invocation:
    """Parse a command's arguments into its config and the output options.

    Raises:
      SystemExit: 0 after --help, 2 for an unknown or missing option.
      ValueError: a value is wrong, or an option that takes several values is given twice; tyro would drop the first.
    """
    _explain(command.config)
    lists = {option_of(option) for option, (kind, _) in options_of(command.config).items() if _is_tuple(kind)}
    names = [word.partition("=")[0].replace("_", "-") for word in words]
    for option in sorted(lists):
        if (count := names.count(option)) > 1:
            raise ValueError(f"{option}: given {count} times; give all its values after one, as in {option} A B")
    try:
        return tyro.cli(
            Invocation[command.config],
            args=words,
            prog=f"jsfdd {name}",
            description=inspect.getdoc(command.config),
            config=_STYLE,
        )
    except SystemExit as stop:
        if not stop.code:
            print(f"example:\n{command.examples}")
        raise


def completion_script(commands: Mapping[str, Command], shell: str) -> str:
    """Make the completion script of the whole command line, for bash, zsh or fish."""
    for command in commands.values():
        _explain(command.config)
    members = tuple(
        Annotated[Invocation[command.config], tyro.conf.subcommand(name, prefix_name=False)]
        for name, command in commands.items()
    )
    with contextlib.redirect_stdout(io.StringIO()) as script, contextlib.suppress(SystemExit):
        tyro.cli(typing.Union[members], prog="jsfdd", args=["--tyro-write-completion", shell, "-"], config=_STYLE)  # noqa: UP007
    return script.getvalue().rstrip("\n")


def _explain(kind: type) -> None:
    """Give tyro the docstring of each option as one paragraph. By default it keeps the source's line breaks."""
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
