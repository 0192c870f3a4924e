"""How the report's pictures look: one small SVG image each, in one style.

Panels are drawn at the size at which they are read, and the page lets them wrap: on a phone they stack instead of
shrinking. Legends belong to the page, one per figure, since all its panels share their colours.
"""

from __future__ import annotations

import base64
import collections
import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDE, NARROW = 416, 272  # CSS pixels: two or three panels side by side

# An arm keeps its colour and marker in every panel and every report. Any two of the colours are at least ΔE 14 apart
# (the first three 31) to normal, protan, deutan and tritan eyes (Machado 2009); markers tell arms apart on grey paper.
ARM_STYLES = {
    "full": ("#0072B2", "o", "●"),
    "flatness": ("#D55E00", "s", "■"),
    "random": ("#8A8A8A", "D", "◆"),
    "entropy": ("#E69F00", "^", "▲"),
    "top1": ("#56B4E9", "v", "▼"),
    "margin": ("#A02C6B", "<", "◀"),
    "energy": ("#DDCC77", ">", "▶"),
    "ppl": ("#8C5A1E", "p", "⬟"),
    "flatness_median": ("#8DD3C7", "h", "⬢"),
}
NEW_METRIC_STYLE = ("#3E7D4F", "X", "✖")
# Sources need a palette of their own: a source in an arm's colour would look like that arm.
SOURCE_COLOURS = ("#CC6677", "#44AA99", "#DDAA33", "#88CCEE", "#AA4499", "#7F8F29", "#6A7FDB")
OTHER_COLOUR = "#C8C8C8"
OTHER = "all others"

INK, MUTED, RULE = "#22262b", "#6b7280", "#dfe2e6"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "text.parse_math": False,  # a source named "$x" is a name, not a formula
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10.5,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
}
_METADATA = ("Date", "Creator", "Format", "Type")  # a date would make every page differ
_IMAGE = '<img class="{}" width="{}" height="{}" alt="{}" src="data:image/svg+xml;base64,{}">'


def arm_style(arm: str) -> tuple[str, str, str]:
    """(colour, marker, glyph) of an arm; metrics that were added to the table and have none here share one."""
    return ARM_STYLES.get(arm, NEW_METRIC_STYLE)


def source_groups(sources: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
    """(label of each sample, label -> colour): the commonest sources by name, the rest as one."""
    ranked = [name for name, _ in collections.Counter(sorted(sources)).most_common()]
    shown = sorted(ranked[: len(SOURCE_COLOURS)])
    colours = dict(zip(shown, SOURCE_COLOURS, strict=False))
    if len(ranked) > len(shown):
        colours[OTHER] = OTHER_COLOUR
    return np.array([name if name in colours else OTHER for name in sources], object), colours


def new_axes(title: str, width: int, height: int) -> tuple[Figure, Axes]:
    """A figure of one titled axes, `width` × `height` CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.suptitle(title, x=0.0, ha="left")
    return figure, figure.add_subplot()


def to_image(figure: Figure, title: str) -> Markup:
    """The figure as an <img> element that holds its own SVG."""
    stream = io.BytesIO()
    # The salt names clip paths and markers; without it the same run would give a different page each time.
    with mpl.rc_context({"svg.hashsalt": title}):
        figure.savefig(stream, format="svg", transparent=True, dpi=200, metadata=dict.fromkeys(_METADATA))
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    kind = "narrow" if width == NARROW else "wide"
    data = base64.b64encode(stream.getvalue()).decode()
    return Markup(_IMAGE).format(kind, width, height, title, data)


def bare_left(ax: Axes) -> None:
    """No line and no ticks between the names on the left and the data."""
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0, labelcolor=INK)


def choices_axis(ax: Axes, vocab_size: int) -> None:
    """A second axis on top: the effective number of choices, exp(H₂) = V · flatness²."""

    def choices(flatness):
        return vocab_size * np.maximum(flatness, 0) ** 2

    def flatness_of(choices):
        return np.sqrt(np.maximum(choices, 0) / vocab_size)

    low, high = ax.get_xlim()
    ticks: list[int] = []
    last = -np.inf
    for n in (m * 10**e for e in range(7) for m in (1, 2, 5)):
        at = ax.transAxes.inverted().transform(ax.transData.transform((flatness_of(n), 1)))[0]
        if 0.999 * choices(low) <= n <= choices(high) and at - last > 0.1:
            ticks.append(n)
            last = at
    top = ax.secondary_xaxis("top", functions=(choices, flatness_of))
    top.set_xticks(ticks, [f"{n:,}" for n in ticks])
    top.minorticks_off()
    top.set_xlabel("effective number of choices", color=MUTED)


def log_flatness_axis(ax: Axes, low: float, high: float) -> None:
    """Token flatness on a logarithmic axis, labelled in plain numbers."""
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ticks = [t for t in (m * 10.0**e for e in range(-4, 1) for m in (1, 2, 5)) if low <= t <= high]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("token flatness")


def short(name: str) -> str:
    """A label that leaves room for the data."""
    return name if len(name) <= 14 else name[:13] + "…"
