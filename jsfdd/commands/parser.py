"""The command line's parser: one sub-command per config, its options in titled groups, examples below its help.

A config inherits its groups of options; each of its bases becomes a titled group here. What is its own comes first, with
bases of a single option. What is parsed are plain values: the config itself checks them, so a bad value reads the same from
the command line and from Python.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
import textwrap
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, NamedTuple

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    dry_run: bool = False
    """Read and check the inputs, print what would be done, and stop: no model runs and no file is written."""
    json: bool = False
    """Print the result as one line of JSON on stdout, for scripts; progress and errors stay on stderr."""


class Command(NamedTuple):
    """What was asked for: a command, its config, and how to answer."""

    name: str
    config: object
    output: OutputOptions


class Help(NamedTuple):
    """The text of --help around the options: what is at the top, and what is below them, by command."""

    description: str
    epilogue: str
    examples: Mapping[str, str]


def parse(
    commands: Mapping[str, type], stages: Collection[str], text: Help, arguments: Sequence[str] | None = None
) -> Command:
    """The command that the arguments ask for.

    Args:
      commands: config class by command name, in the order of the help.
      stages: the commands that take `OutputOptions`.
      text: of the help.
      arguments: those of the process if None.

    Raises SystemExit: 0 after --help, 2 for an unknown or missing option. ValueError if a value is not a good one.
    """
    words = _with_repeated_joined(commands, list(arguments) if arguments is not None else sys.argv[1:])
    if os.environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False  # tyro itself does not know the variable
    forms = {name: _form(name, kind, name in stages) for name, kind in commands.items()}
    try:
        parsed = _parse(tuple(forms.values()), text.description, words)
    except SystemExit as stop:
        if not stop.code and {"-h", "--help"} & set(words):
            print(text.examples.get(words[0], text.epilogue))
        raise
    values = {}
    for name, value in vars(parsed).items():
        values |= vars(value) if dataclasses.is_dataclass(value) else {name: value}
    named = {field.name for field in dataclasses.fields(OutputOptions)}
    output = OutputOptions(**{name: values.pop(name) for name in named if name in values})
    name = type(parsed).__name__
    return Command(name, commands[name](**values), output)


def completion_script(commands: Mapping[str, type], stages: Collection[str], shell: str) -> str:
    """The completion script of `parse`'s command line for bash, zsh or fish."""
    forms = tuple(_form(name, kind, name in stages) for name, kind in commands.items())
    with contextlib.redirect_stdout(io.StringIO()) as script:
        try:
            _parse(forms, "", ["--tyro-write-completion", shell, "-"])
        except SystemExit as stop:  # tyro ends the process when it has printed the script
            if stop.code:
                raise
    return script.getvalue().rstrip("\n")


def _with_repeated_joined(commands: Mapping[str, type], words: Sequence[str]) -> list[str]:
    """`--draft a --draft b` as `--draft a b`, and so for every option of several values: tyro would forget the first."""
    kind = commands.get(words[0]) if words else None
    types = {} if kind is None else typing.get_type_hints(kind)
    several = {f"--{name.replace('_', '-')}" for name, each in types.items() if typing.get_origin(each) is tuple}
    groups: dict[object, list[str]] = {}  # by an option of several values, or by the place of any other
    group = groups.setdefault(-1, [])
    for place, word in enumerate(words):
        name, has_value, value = word.partition("=")
        name = name.replace("_", "-")
        if name in several:
            group = groups.setdefault(name, [name])
            group += [value] if has_value else []
        elif word.startswith("--"):
            group = groups.setdefault(place, [word])
        else:
            group.append(word)
    return [word for group in groups.values() for word in group]


def _parse(forms: tuple[type, ...], description: str, arguments: Sequence[str]):
    members = tuple(Annotated[form, tyro.conf.subcommand(form.__name__, prefix_name=False)] for form in forms)
    return tyro.cli(
        typing.Union[members],  # noqa: UP007 (a tuple of members)
        args=arguments,
        prog="jsfdd",
        description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )


def _form(name: str, kind: type, with_output: bool) -> type:
    """A dataclass of a config's own options and of its groups, these dataclasses too: what tyro makes a sub-command of."""
    bases = [base for base in kind.__bases__ if dataclasses.is_dataclass(base) and len(dataclasses.fields(base)) > 1]
    grouped = {field.name for base in bases for field in dataclasses.fields(base)}
    own = [field for field in dataclasses.fields(kind) if field.name not in grouped]
    own.sort(key=lambda field: field.name not in inspect.get_annotations(kind))  # inherited single ones last
    members = _options(kind, own)
    for base in [*bases, *([OutputOptions] if with_output else [])]:
        # Of the kind, which may have changed a default.
        source = kind if issubclass(kind, base) else base
        names = {field.name for field in dataclasses.fields(base)}
        fields = _options(source, [field for field in dataclasses.fields(source) if field.name in names])
        group = dataclasses.make_dataclass(base.__name__, fields, frozen=True, kw_only=True)
        group.__doc__ = "" if base.__doc__.startswith(f"{base.__name__}(") else base.__doc__  # dataclasses' own is no help
        members.append((re.sub("Options$", "", base.__name__).lower(), group))
    form = dataclasses.make_dataclass(name, members, frozen=True, kw_only=True)
    form.__doc__ = kind.__doc__
    return form


def _options(kind: type, fields: Sequence[dataclasses.Field]) -> list[tuple]:
    """(name, type with its help, default) of fields of a dataclass, for `make_dataclass`."""
    types, helps = typing.get_type_hints(kind, include_extras=True), field_docstrings(kind)
    made = []
    for field in fields:
        shown = {"help": " ".join(helps[field.name].split())}
        if field.default is None or field.default is False or field.default == ():
            shown["help_behavior_hint"] = ""  # "default: None" would say nothing
        if typing.get_origin(types[field.name]) is tuple:
            element = typing.get_args(types[field.name])[0]
            choices = typing.get_args(element)
            shown["metavar"] = (f"{{{','.join(choices)}}}" if choices else element.__name__.upper()) + " …"
        kind_of_value = Annotated[types[field.name], tyro.conf.arg(**shown)]
        made.append((field.name, kind_of_value, dataclasses.field(default=field.default)))
    return made


def field_docstrings(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of those it inherits from, by name."""
    found = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, below in zip(body.body, body.body[1:]):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text:
                found[field.target.id] = inspect.cleandoc(below.value.value)
    return found
