"""The style of the report's panels, each a small SVG image.

Panels are drawn at the size at which they are shown, and the page wraps them: on a phone they stack instead of shrinking. The
page draws one legend per figure, since all panels of a figure share their colours.
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

# An arm has the same colour and marker in every panel and every report. Any two colours are at least ΔE 14 apart (the first
# three 31) for normal, protan, deutan and tritan vision (Machado 2009); on grey paper, markers distinguish the arms.
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
# What a dark page needs of a picture: its greys turned round.
_DARK = {INK: "#e7e5df", MUTED: "#a3a9b3", RULE: "#3a3f47"}
_DARK_STYLE = "<style>@media screen and (prefers-color-scheme: dark) {{{}}}</style>".format(
    "".join(
        f'[style*="{kind}: {old}"] {{ {kind}: {new} !important }} ' for old, new in _DARK.items() for kind in ("fill", "stroke")
    )
)
_IMAGE = '<img class="{}" width="{}" height="{}" alt="{}" src="data:image/svg+xml;base64,{}">'


def arm_style(arm: str) -> tuple[str, str, str]:
    """(colour, marker, glyph) of an arm; metrics without a style here share one."""
    return ARM_STYLES.get(arm, NEW_METRIC_STYLE)


def source_groups(sources: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
    """(label of each sample, label -> colour): the most common sources by name, the rest as one group."""
    ranked = [name for name, _ in collections.Counter(sorted(sources)).most_common()]
    named = sorted(ranked[: len(SOURCE_COLOURS)])
    colours = dict(zip(named, SOURCE_COLOURS, strict=False))
    if len(ranked) > len(named):
        colours[OTHER] = OTHER_COLOUR
    return np.array([name if name in colours else OTHER for name in sources], object), colours


def new_axes(title: str, width: int, height: int) -> tuple[Figure, Axes]:
    """Make a figure with one titled axes, of `width` × `height` CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.suptitle(title, x=0.0, ha="left")
    return figure, figure.add_subplot()


def to_image(figure: Figure, title: str, description: str) -> Markup:
    """Render the figure as an <img> element with its SVG inline; `description` says in words what it shows."""
    stream = io.BytesIO()
    # Matplotlib derives ids of clip paths and markers from the salt; without one they are random, and so is the page.
    with mpl.rc_context({"svg.hashsalt": title}):
        figure.savefig(stream, format="svg", transparent=True, dpi=200, metadata=dict.fromkeys(_METADATA))
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    kind = "narrow" if width == NARROW else "wide"
    svg = stream.getvalue().decode().replace("<defs>", _DARK_STYLE + "<defs>", 1)
    data = base64.b64encode(svg.encode()).decode()
    return Markup(_IMAGE).format(kind, width, height, f"{title}: {description}", data)


def bare_left(ax: Axes) -> None:
    """Remove the line and ticks between the names on the left and the data."""
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0, labelcolor=INK)


def choices_axis(ax: Axes, vocab_size: int) -> None:
    """Add an axis on top with the effective number of choices, exp(H₂) = V · flatness²."""

    def to_choices(flatness):
        return vocab_size * np.maximum(flatness, 0) ** 2

    def to_flatness(choices):
        return np.sqrt(np.maximum(choices, 0) / vocab_size)

    low, high = ax.get_xlim()
    ticks: list[int] = []
    last = -np.inf
    for n in (m * 10**e for e in range(7) for m in (1, 2, 5)):
        place = ax.transAxes.inverted().transform(ax.transData.transform((to_flatness(n), 1)))[0]
        if 0.999 * to_choices(low) <= n <= to_choices(high) and place - last > 0.1:
            ticks.append(n)
            last = place
    top = ax.secondary_xaxis("top", functions=(to_choices, to_flatness))
    top.set_xticks(ticks, [f"{n:,}" for n in ticks])
    top.minorticks_off()
    top.set_xlabel("effective number of choices", color=MUTED)


def log_flatness_axis(ax: Axes, low: float, high: float) -> None:
    """Make the x axis a logarithmic axis of token flatness, with plain numbers as labels."""
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ticks = [t for t in (m * 10.0**e for e in range(-4, 1) for m in (1, 2, 5)) if low <= t <= high]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("token flatness")


def short(name: str) -> str:
    """Shorten a label to leave room for the data."""
    return name if len(name) <= 14 else name[:13] + "…"
