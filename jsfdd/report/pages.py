"""The templates of the pages, filled in: everything that comes from data is escaped, and a name that is missing is an error."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2
from markupsafe import Markup

from jsfdd.base.numbers import decimals, percent, significant, whole
from jsfdd.report.panel import arm_style

HEAT = tuple(round(0.02 + 0.072 * level, 3) for level in range(10))  # opacity of each tenth of token flatness


def render_template(name: str, **values) -> str:
    """A template of this directory with these values; all share report.css."""
    return _environment().get_template(name).render(heat=HEAT, **values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {f.__name__: f for f in (decimals, whole, percent, significant)}
    environment.globals["glyph"] = _glyph
    return environment


def _glyph(arm: str) -> Markup:
    colour, _, glyph = arm_style(arm)
    return Markup('<i style="color:{}">{}</i> ').format(colour, glyph)
