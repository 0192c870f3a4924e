"""The report's panels: one function per panel, from figures to an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from jsfdd.base.numbers import decimals, percent, significant
from jsfdd.report.panel import (
    INK,
    MUTED,
    NARROW,
    RULE,
    STYLE,
    WIDE,
    arm_style,
    bare_left,
    choices_axis,
    log_flatness_axis,
    new_axes,
    short,
    to_image,
)
from jsfdd.report.run_files import Arm

_MANY_POINTS = 3000  # more points are drawn as one embedded bitmap: a phone cannot open a page of 100,000 circles


@dataclasses.dataclass(frozen=True)
class Dot:
    """A labelled value with its interval; None if a figure does not exist."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    colour: str = INK
    marker: str = "o"


def arm_dot(arm: Arm, record: dict, name: str) -> Dot:
    """The figure `name` of an arm, with its interval, in the arm's colour."""
    colour, marker, _ = arm_style(arm.name)
    return Dot(arm.name, record[name], record[f"{name}_low"], record[f"{name}_high"], colour, marker)


@mpl.rc_context(STYLE)
def intervals(title: str, dots: Sequence[Dot], reference: float, unit: str, text: Callable[[float], str]) -> Markup:
    """One line per dot, with its interval and value; a dashed line marks `reference`, which is always in view."""
    figure, ax = new_axes(title, WIDE, 66 + 27 * len(dots))
    measured = [dot for dot in dots if dot.value is not None]
    for y, dot in enumerate(dots):
        if dot.value is None:
            ax.text(0.5, y, "not measured", color=MUTED, transform=ax.get_yaxis_transform(), va="center", ha="center")
            continue
        _interval_mark(ax, dot, dot.value, y)
        ax.annotate(
            text(dot.value), (dot.high if dot.high is not None else dot.value, y),
            (7, 0), textcoords="offset points", va="center", fontweight="bold",
        )  # fmt: skip
    edges = [reference, *(x for dot in measured for x in (dot.value, dot.low, dot.high) if x is not None)]
    span = (max(edges) - min(edges)) or 1.0
    ax.set_xlim(min(edges) - 0.05 * span, max(edges) + 0.22 * span)
    ax.axvline(reference, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    ax.set_yticks(range(len(dots)), [dot.label for dot in dots])
    ax.set_ylim(len(dots) - 0.4, -0.6)
    ax.set_xlabel(unit)
    ax.grid(axis="x")
    bare_left(ax)
    description = "; ".join(f"{dot.label} {_dot_words(dot, text)}" for dot in dots)
    return to_image(figure, title, description)


@mpl.rc_context(STYLE)
def cost_and_gain(title: str, arms: Sequence[Arm]) -> Markup:
    """τ with its interval against the seconds from conversations to draft, one point per arm."""
    figure, ax = new_axes(title, WIDE, 66 + 27 * max(len(arms), 4))
    for arm in arms:
        dot = arm_dot(arm, arm.row, "tau")
        if dot.value is None:
            continue
        x = _cost(arm)
        if dot.low is not None:
            ax.plot([x, x], [dot.low, dot.high], color=dot.colour, linewidth=2, alpha=0.55)
        ax.plot([x], [dot.value], dot.marker, color=dot.colour, markersize=7)
        ax.annotate(arm.name, (x, dot.value), (8, 0), textcoords="offset points", va="center")
    ax.set_xlim(0, 1.25 * max(map(_cost, arms)))
    ax.margins(y=0.25)
    ax.set_xlabel("seconds from conversations to draft")
    ax.set_ylabel("τ", rotation=0, labelpad=10, va="center")
    ax.grid()
    description = "; ".join(f"{arm.name} τ {decimals(arm.row['tau'])} for {decimals(_cost(arm), 0)} s" for arm in arms)
    return to_image(figure, title, description)


@mpl.rc_context(STYLE)
def source_histogram(
    title: str,
    values: np.ndarray,
    groups: np.ndarray,
    colours: dict[str, str],
    vocab_size: int,
    threshold: float | None = None,
) -> Markup:
    """Sample flatness, stacked by source; the arrow marks what the flatness arm keeps."""
    figure, ax = new_axes(title, WIDE, 270)
    edges = np.histogram_bin_edges(values, bins=min(40, max(8, round(2 * len(values) ** 0.5))))
    bottom = np.zeros(len(edges) - 1)
    for name, colour in colours.items():
        counts, _ = np.histogram(values[groups == name], edges)
        ax.bar(edges[:-1], counts, np.diff(edges), bottom, align="edge", color=colour, linewidth=0)
        bottom += counts
    ax.set_ylim(0, 1.18 * bottom.max())
    if threshold is not None:
        ax.axvline(threshold, color=INK, linewidth=1.2)
        ax.annotate(
            "kept by flatness →", (threshold, 1), (5, -10), xycoords=ax.get_xaxis_transform(),
            textcoords="offset points", fontweight="bold",
        )  # fmt: skip
    ax.set_xlim(max(0.0, edges[0]), edges[-1])
    ax.set_xlabel("sample flatness")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylabel("samples")
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.grid(axis="y")
    choices_axis(ax, vocab_size)
    description = f"{len(values)} samples of {len(colours)} sources, {_range_words(values)}"
    return to_image(figure, title, description)


@mpl.rc_context(STYLE)
def flatness_against_entropy(
    title: str, flatness: np.ndarray, entropy: np.ndarray, groups: np.ndarray, colours: dict[str, str], vocab_size: int
) -> Markup:
    """Sample flatness against sample entropy, one point per sample, coloured by source."""
    figure, ax = new_axes(title, WIDE, 270)
    # Draw all points in file order with one call. Drawn source by source, the last source would cover the others.
    ax.scatter(
        flatness, entropy, s=14, c=[colours[name] for name in groups], alpha=0.75, linewidths=0,
        rasterized=len(flatness) > _MANY_POINTS,
    )  # fmt: skip
    ax.set_xlim(left=max(0.0, ax.get_xlim()[0]))
    ax.set_xlabel("sample flatness")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylabel("mean entropy, nats")
    ax.grid()
    choices_axis(ax, vocab_size)
    description = f"{len(flatness)} samples, flatness {_range_words(flatness)}; entropy {_range_words(entropy)}"
    return to_image(figure, title, description)


@mpl.rc_context(STYLE)
def token_histogram(title: str, flatness: np.ndarray, vocab_size: int) -> Markup:
    """Token flatness; both axes are logarithmic, since most tokens are nearly certain and a few nearly uniform."""
    figure, ax = new_axes(title, WIDE, 270)
    low, high = _flatness_range(flatness, vocab_size)
    edges = np.geomspace(low, high, 41)
    # Rounding can put a certain token just below the bound 1/√V; it belongs in the first bin.
    ax.hist(np.maximum(flatness, low), edges, histtype="stepfilled", color=arm_style("flatness")[0], linewidth=0)
    ax.set_yscale("log")
    decades = [10**e for e in range(10) if 10**e <= ax.get_ylim()[1]]
    ax.set_yticks(decades, [f"{n:,}" for n in decades])
    log_flatness_axis(ax, low, high)
    ax.set_ylabel("tokens")
    ax.grid(axis="y")
    choices_axis(ax, vocab_size)
    description = f"{len(flatness)} tokens, {_range_words(flatness)}"
    return to_image(figure, title, description)


@mpl.rc_context(STYLE)
def entropy_density(title: str, flatness: np.ndarray, entropy: np.ndarray, vocab_size: int) -> Markup:
    """Token flatness against token entropy; darker cells hold more tokens, on a logarithmic scale."""
    figure, ax = new_axes(title, WIDE, 270)
    low, high = _flatness_range(flatness, vocab_size)
    x = np.geomspace(low, high, 57)
    y = np.linspace(0, max(float(entropy.max()), 0.1) * 1.001, 41)
    counts, _, _ = np.histogram2d(np.maximum(flatness, low), np.maximum(entropy, 0), (x, y))
    shade = np.log1p(counts.T) / np.log1p(counts.max())
    # Shades are opacities, so that empty cells show the page's background in every theme.
    cells = np.empty((*shade.shape, 4))
    cells[..., :3] = mpl.colors.to_rgb(arm_style("flatness")[0])
    cells[..., 3] = np.where(shade > 0, 0.12 + 0.88 * shade, 0)
    ax.pcolormesh(x, y, cells, rasterized=True)
    log_flatness_axis(ax, low, high)
    ax.set_ylabel("entropy, nats")
    choices_axis(ax, vocab_size)
    description = f"{len(flatness)} tokens, flatness {_range_words(flatness)}; entropy {_range_words(entropy)}"
    return to_image(figure, title, description)


@mpl.rc_context(STYLE)
def kept_shares(title: str, groups: Sequence[str], counts: Sequence[int], shares: dict[str, Sequence[float]]) -> Markup:
    """Share of each source's samples that an arm kept, in percent: one group of bars per source, one bar per arm.

    Args:
      groups, counts: the sources, and the number of samples of each.
      shares: arm -> share in [0, 1] of each group.
    """
    thickness = 0.78 / len(shares)
    figure, ax = new_axes(title, NARROW, max(250, 62 + len(groups) * (10 + 11 * len(shares))))
    for k, (arm, values) in enumerate(shares.items()):
        y = np.arange(len(groups)) + (k - (len(shares) - 1) / 2) * thickness
        ax.barh(y, 100 * np.asarray(values), thickness * 0.86, color=arm_style(arm)[0], linewidth=0)
        for height, value in zip(y, values, strict=True):
            label, end = f"{100 * value:.0f}", (100 * value, height)
            ax.annotate(label, end, (4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(range(len(groups)), [f"{short(group)} ({count})" for group, count in zip(groups, counts, strict=True)])
    ax.set_ylim(len(groups) - 0.45, -0.55)
    ax.set_xlim(0, 112)
    ax.set_xlabel("% of its samples")
    ax.grid(axis="x")
    bare_left(ax)
    description = "; ".join(f"{arm} {_shares_words(groups, values)}" for arm, values in shares.items())
    return to_image(figure, title, description)


@mpl.rc_context(STYLE)
def length_histogram(title: str, kept: np.ndarray, dropped: np.ndarray, arm: str) -> Markup:
    """Counted tokens per sample: kept samples filled, dropped ones as an outline, on the same bins."""
    lengths = np.concatenate([kept, dropped])
    figure, ax = new_axes(title, NARROW, 250)
    # Lengths are integers, so bins need an integer width; otherwise some bins hold one length more than others.
    width = max(1, -(-int(lengths.max() - lengths.min()) // min(25, max(5, round(len(lengths) ** 0.5)))))
    edges = np.arange(lengths.min(), lengths.max() + width + 1, width) - 0.5
    ax.hist(kept, edges, histtype="stepfilled", color=arm_style(arm)[0], alpha=0.8, linewidth=0)
    ax.hist(dropped, edges, histtype="step", color=INK, linewidth=1.3)
    ax.set_xlabel("counted tokens")
    ax.set_ylabel("samples")
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.grid(axis="y")
    description = f"kept {_range_words(kept)}; dropped {_range_words(dropped)} counted tokens"
    return to_image(figure, title, description)


@mpl.rc_context(STYLE)
def curves(
    title: str, series: dict[str, tuple[Sequence[float], Sequence[float]]], *, dashed=None, is_share: bool = False
) -> Markup:
    """One line per arm over training steps; `dashed` holds a second set of lines in the same colours."""
    figure, ax = new_axes(title, NARROW, 250)
    for style, lines in (("-", series), ((0, (3, 1.5)), dashed or {})):
        for arm, (steps, values) in lines.items():
            colour, marker, _ = arm_style(arm)
            values = (100 if is_share else 1) * np.asarray(values, float)
            ax.plot(steps, values, linestyle=style, color=colour, marker=marker, markevery=[-1], markersize=5.5)
    ax.set_xlabel("step")
    ax.set_xlim(left=0)
    ax.grid(axis="y")
    description = "; ".join(
        f"{arm} from {_value(v[0], is_share)} to {_value(v[-1], is_share)}" for arm, (_, v) in series.items() if len(v)
    )
    return to_image(figure, title, description)


@mpl.rc_context(STYLE)
def alpha_by_depth(title: str, arms: Sequence[Arm]) -> Markup:
    """Acceptance rate by draft depth with intervals, in percent."""
    figure, ax = new_axes(title, NARROW, 250)
    for k, arm in enumerate(arms):
        colour, marker, _ = arm_style(arm.name)
        alpha, low, high = (100 * np.array(arm.report[name], float) for name in ("alpha", "alpha_low", "alpha_high"))
        depth = np.arange(1, len(alpha) + 1) + 0.07 * (k - (len(arms) - 1) / 2)
        ax.vlines(depth, low, high, color=colour, linewidth=2, alpha=0.5)
        ax.plot(depth, alpha, marker=marker, color=colour, markersize=5.5)
    ax.set_xticks(range(1, len(arms[0].report["alpha"]) + 1))
    ax.set_ylim(0, 100)
    ax.set_xlabel("draft depth")
    ax.set_ylabel("accepted, % of reached")
    ax.grid(axis="y")
    description = "; ".join(f"{arm.name} {', '.join(map(percent, arm.report['alpha']))}" for arm in arms)
    return to_image(figure, title, description)


@mpl.rc_context(STYLE)
def accepted_lengths(title: str, arms: Sequence[Arm]) -> Markup:
    """Share of verifications that accepted exactly i draft tokens, in percent."""
    thickness = 0.8 / len(arms)
    figure, ax = new_axes(title, NARROW, 250)
    for k, arm in enumerate(arms):
        counts = np.array(arm.report["accept_counts"], float)
        x = np.arange(len(counts)) + (k - (len(arms) - 1) / 2) * thickness
        ax.bar(x, 100 * counts / max(counts.sum(), 1), thickness * 0.88, color=arm_style(arm.name)[0], linewidth=0)
    ax.set_xticks(range(len(arms[0].report["accept_counts"])))
    ax.set_xlabel("draft tokens accepted")
    ax.set_ylabel("% of verifications")
    ax.grid(axis="y")
    description = "; ".join(f"{arm.name} {_counts_words(arm.report['accept_counts'])}" for arm in arms)
    return to_image(figure, title, description)


@mpl.rc_context(STYLE)
def tau_by_source(title: str, arms: Sequence[Arm]) -> Markup:
    """τ with its interval: one row per source, the arms one above the other."""
    sources = list(arms[0].report["per_source"])
    counts = [record["n_prompts"] for record in arms[0].report["per_source"].values()]
    step = 0.7 / len(arms)
    figure, ax = new_axes(title, NARROW, max(250, 70 + len(sources) * (8 + 9 * len(arms))))
    for k, arm in enumerate(arms):
        for y, source in enumerate(sources):
            record = arm.report["per_source"][source]
            dot = arm_dot(arm, record, "tau")
            if dot.value is not None:
                _interval_mark(ax, dot, dot.value, y + (k - (len(arms) - 1) / 2) * step)
    for y in range(1, len(sources)):
        ax.axhline(y - 0.5, color=RULE, linewidth=0.8)
    ax.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    ax.set_yticks(range(len(sources)), [f"{short(source)} ({count})" for source, count in zip(sources, counts, strict=True)])
    ax.set_ylim(len(sources) - 0.5, -0.5)
    ax.set_xlim(left=0.95)
    ax.set_xlabel("tokens per verification")
    ax.grid(axis="x")
    bare_left(ax)
    description = "; ".join(f"{arm.name} {_sources_words(arm)}" for arm in arms)
    return to_image(figure, title, description)


def _interval_mark(ax: Axes, dot: Dot, x: float, y: float) -> None:
    if dot.low is not None:
        ax.plot([dot.low, dot.high], [y, y], color=dot.colour, linewidth=2.4, alpha=0.5, solid_capstyle="butt")
    ax.plot([x], [y], dot.marker, color=dot.colour, markersize=6.5)


def _flatness_range(flatness: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """From the lower bound 1/√V to the flattest token."""
    low = vocab_size**-0.5
    return low, 1.001 * max(float(flatness.max()), 1.5 * low)


# --- The same in words, for those who do not see the picture ---------------------------------------------------------


def _cost(arm: Arm) -> float:
    return arm.row["cost_seconds"]["total"]


def _dot_words(dot: Dot, text: Callable[[float], str]) -> str:
    if dot.value is None:
        return "not measured"
    return text(dot.value) + ("" if dot.low is None or dot.high is None else f" ({text(dot.low)} to {text(dot.high)})")


def _range_words(values: np.ndarray) -> str:
    if not len(values):
        return "none"
    low, middle, high = (significant(float(x)) for x in np.quantile(values, (0, 0.5, 1)))
    return f"from {low} to {high}, median {middle}"


def _value(value: float, is_share: bool) -> str:
    return percent(value) if is_share else decimals(value)


def _shares_words(groups: Sequence[str], values: Sequence[float]) -> str:
    return ", ".join(f"{percent(value)} of {group}" for group, value in zip(groups, values, strict=True))


def _counts_words(counts: Sequence[int]) -> str:
    return ", ".join(f"{percent(count / max(sum(counts), 1))} accepted {i}" for i, count in enumerate(counts))


def _sources_words(arm: Arm) -> str:
    return ", ".join(f"{decimals(record['tau'])} on {source}" for source, record in arm.report["per_source"].items())
