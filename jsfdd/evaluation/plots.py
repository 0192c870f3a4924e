"""The report's pictures, each one small panel of inline SVG.

Panels are drawn at the size at which they are read, and the page lets them wrap: on a phone they stack instead of
shrinking. Text stays text in the page's own font; ink, labels and rules are CSS variables, so that a panel follows the
page into a dark theme. Legends belong to the page, one per figure, since all its panels share their colours.
"""

from __future__ import annotations

import dataclasses
import html
import io
import re
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jsfdd.evaluation.run_files import Arm

WIDE, NARROW = 416, 272  # CSS pixels: two or three panels side by side

# An arm keeps its colour and marker in every panel and every report: Okabe and Ito's colours, told apart by people with
# any kind of colour vision. Markers tell arms apart on grey paper.
ARM_STYLES = {
    "full": ("#0072B2", "o", "●"),
    "flatness": ("#D55E00", "s", "■"),
    "random": ("#8A8A8A", "D", "◆"),
    "entropy": ("#009E73", "^", "▲"),
    "top1": ("#CC79A7", "v", "▼"),
    "margin": ("#E69F00", "<", "◀"),
    "energy": ("#56B4E9", ">", "▶"),
    "ppl": ("#A6761D", "p", "⬟"),
    "flatness_median": ("#7570B3", "h", "⬢"),
}
# Sources need a palette of their own: a source in an arm's colour would look like that arm.
SOURCE_COLOURS = ("#CC6677", "#44AA99", "#DDAA33", "#88CCEE", "#AA4499", "#7F8F29", "#6A7FDB")
OTHER_COLOUR = "#B0B0B0"
OTHER = "all others"

_INK, _MUTED, _RULE = "#22262b", "#6b7280", "#dfe2e6"
_THEME = {_INK: f"var(--ink,{_INK})", _MUTED: f"var(--muted,{_MUTED})", _RULE: f"var(--rule,{_RULE})"}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": _INK,
    "text.parse_math": False,  # a source named "$x" is a name, not a formula
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 10.5,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
}
_METADATA = ("Date", "Creator", "Format", "Type")  # a date would make every page differ
_OPEN = '<svg class="{}" viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">'
_MANY_POINTS = 3000  # beyond, points become one embedded image: a page of 100 000 circles does not open on a phone


@dataclasses.dataclass(frozen=True)
class Dot:
    """A labelled value with its interval; None where a figure does not exist."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    colour: str = _INK
    marker: str = "o"


def arm_dot(arm: Arm, record: dict, name: str) -> Dot:
    """The figure `name` of an arm, with its interval, in the arm's colour."""
    colour, marker, _ = ARM_STYLES[arm.name]
    return Dot(arm.name, record[name], record[f"{name}_low"], record[f"{name}_high"], colour, marker)


@mpl.rc_context(_STYLE)
def intervals(title: str, dots: Sequence[Dot], reference: float, unit: str, *, form: str = "{:.2f}") -> str:
    """Dots with intervals, one a line, values written beside them; a line marks `reference`, which is always in view."""
    figure, ax = _axes(title, WIDE, 66 + 27 * len(dots))
    known = [dot for dot in dots if dot.value is not None]
    for y, dot in enumerate(dots):
        if dot.value is None:
            ax.text(0.5, y, "not measured", color=_MUTED, transform=ax.get_yaxis_transform(), va="center", ha="center")
            continue
        _interval_mark(ax, dot, dot.value, y)
        ax.annotate(
            form.format(dot.value).replace("-", "−"), (dot.high if dot.high is not None else dot.value, y),
            (7, 0), textcoords="offset points", va="center", fontweight="bold",
        )  # fmt: skip
    edges = [reference, *(x for dot in known for x in (dot.value, dot.low, dot.high) if x is not None)]
    span = (max(edges) - min(edges)) or 1.0
    ax.set_xlim(min(edges) - 0.05 * span, max(edges) + 0.22 * span)
    ax.axvline(reference, color=_MUTED, linewidth=1, linestyle=(0, (2, 2)))
    ax.set_yticks(range(len(dots)), [dot.label for dot in dots])
    ax.set_ylim(len(dots) - 0.4, -0.6)
    ax.set_xlabel(unit)
    ax.grid(axis="x")
    _bare_left(ax)
    return _svg(figure, title)


@mpl.rc_context(_STYLE)
def cost_and_gain(title: str, arms: Sequence[Arm]) -> str:
    """τ with its interval against seconds of training, a point an arm."""
    figure, ax = _axes(title, WIDE, 66 + 27 * max(len(arms), 4))
    for arm in arms:
        dot = arm_dot(arm, arm.row, "tau")
        if dot.value is None:
            continue
        x = arm.row["train_seconds"]
        if dot.low is not None:
            ax.plot([x, x], [dot.low, dot.high], color=dot.colour, linewidth=2, alpha=0.55)
        ax.plot([x], [dot.value], dot.marker, color=dot.colour, markersize=7)
        ax.annotate(arm.name, (x, dot.value), (8, 3), textcoords="offset points", fontweight="bold")
    ax.set_xlim(0, 1.25 * max(arm.row["train_seconds"] for arm in arms))
    ax.margins(y=0.25)
    ax.set_xlabel("seconds of training")
    ax.set_ylabel("τ", rotation=0)
    ax.grid()
    return _svg(figure, title)


@mpl.rc_context(_STYLE)
def source_histogram(
    title: str, values: np.ndarray, groups: np.ndarray, colours: dict[str, str], vocab_size: int, threshold: float | None
) -> str:
    """Sample flatness, stacked by source; the arrow marks what the flatness arm keeps."""
    figure, ax = _axes(title, WIDE, 270)
    edges = np.histogram_bin_edges(values, bins=min(40, max(8, round(2 * len(values) ** 0.5))))
    bottom = np.zeros(len(edges) - 1)
    for name, colour in colours.items():
        counts, _ = np.histogram(values[groups == name], edges)
        ax.bar(edges[:-1], counts, np.diff(edges), bottom, align="edge", color=colour, linewidth=0)
        bottom += counts
    ax.set_ylim(0, 1.18 * bottom.max())
    if threshold is not None:
        ax.axvline(threshold, color=_INK, linewidth=1.2)
        ax.annotate(
            "kept by flatness →", (threshold, 1), (5, -10), xycoords=ax.get_xaxis_transform(),
            textcoords="offset points", fontweight="bold",
        )  # fmt: skip
    ax.set_xlim(max(0.0, edges[0]), edges[-1])
    ax.set_xlabel("sample flatness")
    ax.set_ylabel("samples")
    ax.grid(axis="y")
    _choices_axis(ax, vocab_size)
    return _svg(figure, title)


@mpl.rc_context(_STYLE)
def flatness_against_entropy(
    title: str, flatness: np.ndarray, entropy: np.ndarray, groups: np.ndarray, colours: dict[str, str], vocab_size: int
) -> str:
    """Sample flatness against sample entropy, a point a sample, coloured by source."""
    figure, ax = _axes(title, WIDE, 270)
    # One call with the points in file order: source by source, the last source would cover the others.
    ax.scatter(
        flatness, entropy, s=14, c=[colours[name] for name in groups], alpha=0.75, linewidths=0,
        rasterized=len(flatness) > _MANY_POINTS,
    )  # fmt: skip
    ax.set_xlim(left=max(0.0, ax.get_xlim()[0]))
    ax.set_xlabel("sample flatness")
    ax.set_ylabel("mean entropy, nats")
    ax.grid()
    _choices_axis(ax, vocab_size)
    return _svg(figure, title)


@mpl.rc_context(_STYLE)
def token_histogram(title: str, flatness: np.ndarray, vocab_size: int) -> str:
    """Flatness of single tokens; both axes logarithmic, since most tokens are nearly certain and a few wide open."""
    figure, ax = _axes(title, WIDE, 270)
    low, high = _flatness_range(flatness, vocab_size)
    edges = np.geomspace(low, high, 41)
    # Rounding can put a certain token a hair under the bound 1/√V: it belongs in the first bin.
    ax.hist(np.maximum(flatness, low), edges, histtype="stepfilled", color=ARM_STYLES["flatness"][0], linewidth=0)
    ax.set_yscale("log")
    decades = [10**e for e in range(10) if 10**e <= ax.get_ylim()[1]]
    ax.set_yticks(decades, [f"{n:,}" for n in decades])
    ax.minorticks_off()
    _log_flatness_axis(ax, low, high)
    ax.set_ylabel("tokens")
    ax.grid(axis="y")
    _choices_axis(ax, vocab_size)
    return _svg(figure, title)


@mpl.rc_context(_STYLE)
def entropy_density(title: str, flatness: np.ndarray, entropy: np.ndarray, vocab_size: int) -> str:
    """Token flatness against token entropy; a cell is darker the more tokens it holds (logarithmic)."""
    figure, ax = _axes(title, WIDE, 270)
    low, high = _flatness_range(flatness, vocab_size)
    x = np.geomspace(low, high, 57)
    y = np.linspace(0, max(float(entropy.max()), 0.1) * 1.001, 41)
    counts, _, _ = np.histogram2d(np.maximum(flatness, low), np.maximum(entropy, 0), (x, y))
    shade = np.log1p(counts.T) / np.log1p(counts.max())
    # Shades are opacities, so that empty cells show the page whatever its theme.
    cells = np.empty((*shade.shape, 4))
    cells[..., :3] = mpl.colors.to_rgb(ARM_STYLES["flatness"][0])
    cells[..., 3] = np.where(shade > 0, 0.12 + 0.88 * shade, 0)
    ax.pcolormesh(x, y, cells, rasterized=True)
    _log_flatness_axis(ax, low, high)
    ax.set_ylabel("entropy, nats")
    _choices_axis(ax, vocab_size)
    return _svg(figure, title)


@mpl.rc_context(_STYLE)
def kept_shares(title: str, groups: Sequence[str], counts: Sequence[int], shares: dict[str, Sequence[float]]) -> str:
    """Share of each source's samples that an arm kept, in percent: a group of bars a source, a bar an arm.

    Args:
      groups, counts: sources and how many samples each has.
      shares: arm -> share in [0, 1] of each group.
    """
    thickness = 0.78 / len(shares)
    figure, ax = _axes(title, NARROW, max(250, 62 + len(groups) * (10 + 11 * len(shares))))
    for k, (arm, values) in enumerate(shares.items()):
        y = np.arange(len(groups)) + (k - (len(shares) - 1) / 2) * thickness
        ax.barh(y, 100 * np.asarray(values), thickness * 0.86, color=ARM_STYLES[arm][0], linewidth=0)
        for at, value in zip(y, values):
            ax.annotate(f"{100 * value:.0f}", (100 * value, at), (4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(range(len(groups)), [f"{_short(group)} ({count})" for group, count in zip(groups, counts)])
    ax.set_ylim(len(groups) - 0.45, -0.55)
    ax.set_xlim(0, 112)
    ax.set_xlabel("% of its samples")
    ax.grid(axis="x")
    _bare_left(ax)
    return _svg(figure, title)


@mpl.rc_context(_STYLE)
def length_histogram(title: str, kept: np.ndarray, dropped: np.ndarray, arm: str) -> str:
    """Counted tokens a sample: kept filled, dropped as an outline, on the same bins."""
    both = np.concatenate([kept, dropped])
    figure, ax = _axes(title, NARROW, 250)
    edges = np.histogram_bin_edges(both, bins=min(30, max(6, round(len(both) ** 0.5))))
    ax.hist(kept, edges, histtype="stepfilled", color=ARM_STYLES[arm][0], alpha=0.8, linewidth=0)
    ax.hist(dropped, edges, histtype="step", color=_INK, linewidth=1.3)
    ax.set_xlabel("counted tokens")
    ax.set_ylabel("samples")
    ax.grid(axis="y")
    return _svg(figure, title)


@mpl.rc_context(_STYLE)
def curves(title: str, series: dict[str, tuple[Sequence[float], Sequence[float]]], *, dashed=None, percent: bool = False) -> str:
    """One line an arm over training steps; `dashed` holds a second set of lines in the same colours."""
    figure, ax = _axes(title, NARROW, 250)
    for style, lines in (("-", series), ((0, (3, 1.5)), dashed or {})):
        for arm, (steps, values) in lines.items():
            colour, marker, _ = ARM_STYLES[arm]
            values = (100 if percent else 1) * np.asarray(values, float)
            ax.plot(steps, values, linestyle=style, color=colour, marker=marker, markevery=[-1], markersize=5.5, linewidth=1.5)
    ax.set_xlabel("step")
    ax.set_xlim(left=0)
    ax.grid(axis="y")
    return _svg(figure, title)


@mpl.rc_context(_STYLE)
def alpha_by_depth(title: str, arms: Sequence[Arm]) -> str:
    """Acceptance rate by draft depth with intervals, in percent."""
    figure, ax = _axes(title, NARROW, 250)
    for k, arm in enumerate(arms):
        colour, marker, _ = ARM_STYLES[arm.name]
        alpha, low, high = (100 * np.array(arm.report[name], float) for name in ("alpha", "alpha_low", "alpha_high"))
        depth = np.arange(1, len(alpha) + 1) + 0.07 * (k - (len(arms) - 1) / 2)
        ax.vlines(depth, low, high, color=colour, linewidth=2, alpha=0.5)
        ax.plot(depth, alpha, marker=marker, color=colour, markersize=5.5)
    ax.set_xticks(range(1, len(arms[0].report["alpha"]) + 1))
    ax.set_ylim(0, 100)
    ax.set_xlabel("draft depth")
    ax.set_ylabel("accepted, % of reached")
    ax.grid(axis="y")
    return _svg(figure, title)


@mpl.rc_context(_STYLE)
def accepted_lengths(title: str, arms: Sequence[Arm]) -> str:
    """Share of verifications that accepted exactly i draft tokens, in percent."""
    thickness = 0.8 / len(arms)
    figure, ax = _axes(title, NARROW, 250)
    for k, arm in enumerate(arms):
        counts = np.array(arm.report["accept_counts"], float)
        x = np.arange(len(counts)) + (k - (len(arms) - 1) / 2) * thickness
        ax.bar(x, 100 * counts / max(counts.sum(), 1), thickness * 0.88, color=ARM_STYLES[arm.name][0], linewidth=0)
    ax.set_xticks(range(len(arms[0].report["accept_counts"])))
    ax.set_xlabel("draft tokens accepted")
    ax.set_ylabel("% of verifications")
    ax.grid(axis="y")
    return _svg(figure, title)


@mpl.rc_context(_STYLE)
def tau_by_source(title: str, arms: Sequence[Arm]) -> str:
    """τ with its interval, a line a source, the arms one above the other."""
    sources = list(arms[0].report["per_source"])
    counts = [record["n_prompts"] for record in arms[0].report["per_source"].values()]
    step = 0.7 / len(arms)
    figure, ax = _axes(title, NARROW, max(250, 70 + len(sources) * (8 + 9 * len(arms))))
    for k, arm in enumerate(arms):
        for y, source in enumerate(sources):
            record = arm.report["per_source"][source]
            dot = arm_dot(arm, record, "tau")
            if dot.value is not None:
                _interval_mark(ax, dot, dot.value, y + (k - (len(arms) - 1) / 2) * step)
    for y in range(1, len(sources)):
        ax.axhline(y - 0.5, color=_RULE, linewidth=0.8)
    ax.axvline(1, color=_MUTED, linewidth=1, linestyle=(0, (2, 2)))
    ax.set_yticks(range(len(sources)), [f"{_short(source)} ({count})" for source, count in zip(sources, counts)])
    ax.set_ylim(len(sources) - 0.5, -0.5)
    ax.set_xlim(left=0.95)
    ax.set_xlabel("tokens per verification")
    ax.grid(axis="x")
    _bare_left(ax)
    return _svg(figure, title)


def source_groups(sources: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
    """(label of each sample, label -> colour): the commonest sources by name, the rest as one."""
    names, counts = np.unique(np.asarray(sources, dtype=object).astype(str), return_counts=True)
    ranked = list(names[np.argsort(-counts, kind="stable")])
    shown = sorted(ranked[: len(SOURCE_COLOURS)])
    colours = dict(zip(shown, SOURCE_COLOURS))
    if len(ranked) > len(shown):
        colours[OTHER] = OTHER_COLOUR
    return np.array([name if name in shown else OTHER for name in map(str, sources)], dtype=object), colours


def _short(name: str) -> str:
    """A label that leaves room for the data."""
    return name if len(name) <= 14 else name[:13] + "…"


def _interval_mark(ax: Axes, dot: Dot, x: float, y: float) -> None:
    if dot.low is not None:
        ax.plot([dot.low, dot.high], [y, y], color=dot.colour, linewidth=2.4, alpha=0.5, solid_capstyle="butt")
    ax.plot([x], [y], dot.marker, color=dot.colour, markersize=6.5)


def _bare_left(ax: Axes) -> None:
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0, labelcolor=_INK)


def _choices_axis(ax: Axes, vocab_size: int) -> None:
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
    top.set_xlabel("effective number of choices", color=_MUTED)


def _flatness_range(flatness: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """From the lower bound 1/√V to the flattest token."""
    low = vocab_size**-0.5
    return low, 1.001 * max(float(flatness.max()), 1.5 * low)


def _log_flatness_axis(ax: Axes, low: float, high: float) -> None:
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ticks = [t for t in (m * 10.0**e for e in range(-4, 1) for m in (1, 2, 5)) if low <= t <= high]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_xlabel("token flatness")


def _axes(title: str, width: int, height: int) -> tuple[Figure, Axes]:
    """A figure of one titled axes, `width` × `height` CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.suptitle(title, x=0.0, ha="left")
    return figure, figure.add_subplot()


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element that stands inside an HTML page."""
    stream = io.StringIO()
    # The salt names clip paths and markers: stable, so that a page is reproducible, and different between panels.
    with mpl.rc_context({"svg.hashsalt": title}):
        figure.savefig(stream, format="svg", transparent=True, dpi=200, metadata=dict.fromkeys(_METADATA))
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    kind = "narrow" if width == NARROW else "wide"
    opening = _OPEN.format(kind, width, height, width, height, html.escape(title))
    text = re.sub(r"<svg [^>]*>", lambda _: opening, text, count=1, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Layer names repeat from panel to panel, but ids must not; nothing refers to these.
    text = re.sub(r'<g id="[a-z]\w*?_\d+">', "<g>", text).replace("xlink:href", "href")
    for colour, variable in _THEME.items():
        text = text.replace(colour, variable)
    return text
