"""Figures 1a and 1b of the paper, checked: ΔL1 of one budgeted step and flatness, against the width of p. See README.md.

Densities live on a grid of K points. Four steps from q = N(0, 1) towards p = N(m, σ²) under a budget of θ nats:

    exact          argmin KL(p‖r) s.t. KL(r‖q) ≤ θ over all r                              (`step.py`)
    gaussian       the same over Gaussian r alone
    paper          the Gaussian with the moments of (1−t)·p + t·q, t so that KL(r‖q) = θ: the paper's closed form
    mixture        (1−s)·p + s·q with s so that KL(q‖r) = θ: the exact minimum if the budget is turned round
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from scipy.optimize import brentq, minimize
from scipy.special import log_softmax, softmax

from jsfdd.report.panel import MUTED, STYLE

from .record import record
from .step import budgeted_step, gain, kl, small_step_gain

HERE = Path(__file__).parent
THETA = 2.0  # the paper's
SMOKE = os.environ.get("SMOKE") == "1"
MEANS = (0.0, 2.0, 3.0, 5.0)
WIDTHS = np.geomspace(0.1, 5, 9 if SMOKE else 61)
X = np.linspace(-34, 34, 2001 if SMOKE else 13601)
SCALES = np.geomspace(0.1, 10, 9 if SMOKE else 61)
STEPS = ("exact", "gaussian", "paper", "mixture")


def normal(mean: float, width: float) -> Float[np.ndarray, " K"]:
    """log-probabilities on X."""
    return log_softmax(-((X - mean) ** 2) / (2 * width**2))


def gaussian_kl(mean: float, variance: float) -> float:
    """KL(N(mean, variance) ‖ N(0, 1))."""
    return (variance + mean**2 - 1 - np.log(variance)) / 2


def best_gaussian(mean: float, width: float) -> tuple[float, float]:
    """(mean, variance) of the Gaussian r that minimises KL(p‖r) with KL(r‖q) ≤ θ: by looking along the whole edge."""
    if gaussian_kl(mean, width**2) <= THETA:
        return mean, width**2
    # On the edge mean² = 2θ + 1 + log variance − variance, which must not be negative.
    variance = np.exp(np.linspace(-6, 2, 400_001))
    square = 2 * THETA + 1 + np.log(variance) - variance
    variance, on_edge = variance[square >= 0], np.sqrt(square[square >= 0])
    best = np.argmin((width**2 + (mean - on_edge) ** 2) / variance + np.log(variance))
    return on_edge[best], variance[best]


def paper_gaussian(mean: float, width: float) -> tuple[float, float]:
    """(mean, variance) of the paper's closed form, with the smallest t that keeps to the budget."""

    def moments(t):
        return (1 - t) * mean, (1 - t) * width**2 + t + t * (1 - t) * mean**2

    if gaussian_kl(*moments(0.0)) <= THETA:
        return moments(0.0)
    return moments(brentq(lambda t: gaussian_kl(*moments(t)) - THETA, 0.0, 1.0))


def reversed_budget_mixture(log_p: Float[np.ndarray, " K"], log_q: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """(1−s)·p + s·q with KL(q‖r) = θ."""
    p, q = np.exp(log_p), np.exp(log_q)

    def spent(s):
        log_r = np.logaddexp(np.log1p(-s) + log_p, np.log(s) + log_q)
        return kl(q[None], log_q[None], log_r[None])[0] - THETA

    s = brentq(spent, 1e-9, 1 - 1e-9) if spent(1e-9) > 0 else 0.0
    return (1 - s) * p + s * q


def gaussian_gains(mean: float) -> dict[str, list[float]]:
    """ΔL1 of the four steps, and KL(p‖r) that they reach, for p = N(mean, σ²) of every width."""
    log_q = normal(0, 1)
    log_p = np.stack([normal(mean, width) for width in WIDTHS])
    p, q = np.exp(log_p), np.broadcast_to(np.exp(log_q), log_p.shape)
    reached = {
        "exact": budgeted_step(log_p, np.broadcast_to(log_q, log_p.shape), THETA),
        "gaussian": np.stack([np.exp(normal(m, v**0.5)) for m, v in (best_gaussian(mean, w) for w in WIDTHS)]),
        "paper": np.stack([np.exp(normal(m, v**0.5)) for m, v in (paper_gaussian(mean, w) for w in WIDTHS)]),
        "mixture": np.stack([reversed_budget_mixture(row, log_q) for row in log_p]),
    }
    with np.errstate(divide="ignore"):
        distance = {f"kl_{name}": kl(p, log_p, np.log(r)).tolist() for name, r in reached.items()}
    return {name: gain(p, q, r).tolist() for name, r in reached.items()} | distance


def family_gains(theta: float) -> dict[str, list[float]]:
    """ΔL1 of the exact step from the family's member of scale 1 to that of every other."""
    shapes = {
        "exponential": lambda x, scale: -x / scale,
        "half-normal": lambda x, scale: -(x**2) / (2 * scale**2),
        "uniform draft, exponential": lambda x, scale: -x / scale,
        "uniform draft, half-normal": lambda x, scale: -(x**2) / (2 * scale**2),
    }
    x = np.linspace(0, 30, X.size)
    gains = {}
    for name, shape in shapes.items():
        log_p = np.stack([log_softmax(shape(x, scale)) for scale in SCALES])
        log_q = log_softmax(np.zeros(x.size) if name.startswith("uniform") else shape(x, 1.0))
        log_q = np.broadcast_to(log_q, log_p.shape)
        gains[name] = gain(np.exp(log_p), np.exp(log_q), budgeted_step(log_p, log_q, theta)).tolist()
    return gains


def flatness_of_gaussians() -> dict[str, list[float]]:
    """Flatness of a Gaussian on V points of [−1, 1], and the paper's limit √(σ√π / 1)."""
    grid = np.linspace(-1, 1, 2048)
    widths = np.geomspace(1e-4, 3, 81)
    p = np.stack([softmax(-(grid**2) / (2 * width**2)) for width in widths])
    flatness = 1 / np.sqrt(grid.size * np.sum(p**2, axis=1))
    return {"width": widths.tolist(), "flatness": flatness.tolist(), "limit": np.sqrt(widths * np.sqrt(np.pi)).tolist()}


def check_exactness(trials: int) -> dict[str, float]:
    """The exact step against a general optimiser, on random distributions of 8 events; largest differences."""
    random = np.random.default_rng(0)
    differences, excess = [], []
    for _ in range(trials):
        p, q = (0.99 * random.dirichlet(np.full(8, 0.3), 2)) + 0.01 / 8
        theta = random.choice([0.01, 0.1, 0.5])
        exact_step = budgeted_step(np.log(p)[None], np.log(q)[None], theta)[0]
        optimum = minimize(
            lambda z, p=p: -np.sum(p * log_softmax(z)), np.log(q), method="SLSQP", options=dict(ftol=1e-13, maxiter=1000),
            constraints=[dict(type="ineq", fun=lambda z, q=q, t=theta: t - np.sum(softmax(z) * (log_softmax(z) - np.log(q))))],
        )  # fmt: skip
        differences.append(float(np.abs(softmax(optimum.x) - exact_step).max()))
        excess.append(float(np.sum(p * (np.log(softmax(optimum.x)) - np.log(exact_step)))))  # how much better the optimiser is
    p, q = random.dirichlet(np.full(50, 3.0), 2)
    tiny = 1e-7
    step = budgeted_step(np.log(p)[None], np.log(q)[None], tiny)
    first_order = gain(p[None], q[None], step)[0] / small_step_gain(p[None], q[None], tiny)[0]
    return {
        "largest_difference_of_r": max(differences),
        "most_that_the_optimiser_gains": max(excess),
        "first_order": first_order,
    }


def rising_share(values: list[float]) -> float:
    """Over all pairs of widths: the share in which the wider p has the larger ΔL1 (1: monotone, 0.5: none)."""
    values = np.asarray(values)
    wider, narrower = np.tril_indices(len(values), -1)
    return float(np.mean(values[wider] > values[narrower] + 1e-12))


def draw(results: dict) -> None:
    """families.png: ΔL1 against σ for the four steps and three distances, the two families, and flatness against σ."""
    colours = {"exact": "#0072B2", "gaussian": "#44AA99", "paper": "#D55E00", "mixture": "#8A8A8A"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(11, 6.6))
        for ax, mean in zip(axes[0], ("0.0", "3.0", "5.0")):
            for name, colour in colours.items():
                style = dict(linewidth=2.4) if name == "exact" else dict(linewidth=1.3)
                ax.plot(results["widths"], results["gaussian"][mean][name], color=colour, label=name, **style)
            logarithmic(ax, (0.1, 0.2, 0.5, 1, 2, 5), "σ of p")
            ax.set_title(f"p = N({float(mean):g}, σ²), q = N(0, 1), θ = 2")
            ax.set_ylim(0, 2.05)
            ax.set_ylabel("ΔL1")
        axes[0, 2].legend(frameon=False, loc=(0.03, 0.4))
        families = results["families"]["0.1"]
        for ax, prefix, title in zip(axes[1], ("", "uniform draft, "), ("q of scale 1, θ = 0.1", "q uniform, θ = 0.1")):
            for name, line in {"exponential": "-", "half-normal": "--"}.items():
                ax.plot(results["scales"], families[prefix + name], line, color="#A02C6B", label=f"p {name}")
            logarithmic(ax, (0.1, 0.3, 1, 3, 10), "scale of p")
            ax.set_title(title)
            ax.set_ylim(0, 0.5)
            ax.set_ylabel("ΔL1")
        axes[1, 1].legend(frameon=False, loc="lower right")
        curve, ax = results["flatness_of_gaussians"], axes[1, 2]
        ax.plot(curve["width"], curve["limit"], color=MUTED, linewidth=1.2, label="√(σ√π)")
        ax.plot(curve["width"], curve["flatness"], color="#0072B2", label="flatness")
        logarithmic(ax, (0.0001, 0.001, 0.01, 0.1, 1), "σ of p")
        ax.set_yscale("log")
        ax.set_ylim(0.01, 1.3)
        ax.set_yticks((0.01, 0.03, 0.1, 0.3, 1), ("0.01", "0.03", "0.1", "0.3", "1"))
        ax.minorticks_off()
        ax.set_title("Gaussian on 2,048 points of [−1, 1]")
        ax.legend(frameon=False)
        for ax in axes.flat:
            ax.grid()
        figure.savefig(HERE / "families.png", dpi=80)


def logarithmic(ax: Axes, ticks: Sequence[float], label: str) -> None:
    """A logarithmic x axis with plain numbers."""
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(label)


def main() -> None:
    curve = flatness_of_gaussians()
    slopes = np.gradient(np.log(curve["flatness"]), np.log(curve["width"]))
    half = [width for width, slope in zip(curve["width"], slopes) if abs(slope - 0.5) < 0.05]
    gaussian = {str(mean): gaussian_gains(mean) for mean in MEANS}
    results = {
        "theta": THETA,
        "widths": WIDTHS.tolist(),
        "scales": SCALES.tolist(),
        "check": check_exactness(4 if SMOKE else 60),
        "gaussian": gaussian,
        "gaussian_rising_share": {mean: {name: rising_share(rows[name]) for name in STEPS} for mean, rows in gaussian.items()},
        "families": (families := {str(theta): family_gains(theta) for theta in (0.1, THETA)}),
        "families_rising_share": {t: {name: rising_share(v) for name, v in rows.items()} for t, rows in families.items()},
        "flatness_of_gaussians": curve,
        "flatness_slope_is_half_between": [half[0], half[-1]],
    }
    for key in ("check", "gaussian_rising_share", "families_rising_share", "flatness_slope_is_half_between"):
        print(key, json.dumps(results[key], indent=1))
    if not SMOKE:
        record("families", results)
        draw(results)


if __name__ == "__main__":
    main()
