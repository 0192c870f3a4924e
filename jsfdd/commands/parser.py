"""Parse the command line with tyro: a config's fields become options, its groups panels; examples follow the help."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
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
      ValueError: a value is wrong; a path is empty; or an option that takes several values is given twice, of which tyro
        would drop the first.
    """
    _explain(command.config)
    kinds = {option_of(option): kind for option, (kind, _) in options_of(command.config).items()}
    _refuse_empty_paths(kinds, words)
    lists = {option for option, kind in kinds.items() if _is_tuple(kind)}
    names = [word.partition("=")[0].replace("_", "-") for word in words]
    for option in sorted(lists):
        if (count := names.count(option)) > 1:
            raise ValueError(f"{option}: given {count} times; give all its values after one, as in {option} A B")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
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
        refused = _refused_by_group(stop)
        if refused is None:
            sys.stderr.write(_as_given(box.getvalue(), command.config))
            raise
        raise refused from None


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


def _as_given(text: str, kind: type) -> str:
    """tyro's message, in which an argument without a name of its own is called after the field that holds it."""
    fields = "|".join(field.name for field in dataclasses.fields(kind))
    lines = []
    for line in text.splitlines(keepends=True):
        shorter = re.sub(rf"'config\.({fields})'", r"'\1'", line)
        inside, edge, after = shorter.rpartition("│")
        lines.append(inside + " " * (len(line) - len(shorter)) * len(edge) + edge + after)  # the box keeps its width
    return "".join(lines)


def _refused_by_group(stop: BaseException) -> ValueError | None:
    """The error of a group that refused its values, from whose message tyro drew a box; None for tyro's own errors."""
    cause = stop.__context__
    while cause is not None:
        if isinstance(cause, ValueError) and str(cause).startswith("--"):
            return cause
        cause = cause.__context__
    return None


def _refuse_empty_paths(kinds: Mapping[str, type], words: Sequence[str]) -> None:
    """Raise ValueError for a path that is an empty string, as from an unset shell variable: it would mean this directory."""
    option = ""
    for word in words:
        if word.startswith("--"):
            option, assigned, word = word.partition("=")
            option, word = option.replace("_", "-"), word if assigned else option
        if not word and _has_path(kinds.get(option)):
            raise ValueError(f"{option}: got an empty path; give a name, or . for this directory")


def _has_path(kind) -> bool:
    return kind is Path or any(map(_has_path, typing.get_args(kind)))


def _is_tuple(kind) -> bool:
    plain = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    return typing.get_origin(plain) is tuple
