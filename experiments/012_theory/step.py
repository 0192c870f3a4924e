"""The paper's trust-region step, exactly: r* = argmin KL(p‖r) over all distributions r with KL(r‖q) ≤ θ.

If KL(p‖q) ≤ θ, r* is p. Otherwise the budget is used up, and with u = r/q and a = p/q the Lagrangian's stationary point is

    a = u·(λ·log u + μ),   λ > 0.

Multiplied by q and summed, with Σ q·u = 1 and Σ q·u·log u = θ, it gives 1 = λθ + μ: μ is no unknown. What is left for each
u is solved by Lambert's W, w = W(x) with w·e^w = x:

    log u = w − 1/λ + θ,   w = W(a/λ · e^(1/λ − θ)),

and λ is the one number at which Σ q·u = 1. The problem is convex in r, so that this point is the minimum. For a small budget
it is the mixture r = q + ε(p − q), and so

    ΔL1 = ‖p − q‖₁ − ‖p − r‖₁ → √(2θ) · ‖p − q‖₁ / √χ²,   χ² = Σ p²/q − 1.

With q uniform Σ p²/q is 1/flatness², which is all that flatness and this step have to do with each other.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.optimize.elementwise import find_root
from scipy.special import wrightomega

_LOG_MULTIPLIER = (-16.0, 40.0)  # where log λ is looked for: from r = p but for 10⁻⁷ to a step of 10⁻¹⁷


def budgeted_step(log_p: Float[np.ndarray, "N K"], log_q: Float[np.ndarray, "N K"], theta: float) -> Float[np.ndarray, "N K"]:
    """r* of each row, by log-probabilities; p may be 0 (−inf), and where q is 0 so must p be.

    Args:
      log_p, log_q: of K events.
      theta: the budget, in nats.
    """
    with np.errstate(invalid="ignore"):  # −inf − −inf: an event that neither has
        log_a = np.where(np.isneginf(log_p), -np.inf, log_p - log_q)
    p, q = np.exp(log_p), np.exp(log_q)
    r = p.copy()
    rows = np.flatnonzero(kl(p, log_p, log_q) > theta)

    def ratio(log_multiplier, row):
        inverse = np.exp(-log_multiplier)[:, None]
        log_scaled = log_a[row] - log_multiplier[:, None]  # log a/λ
        w = wrightomega(log_scaled + inverse - theta)  # W(e^x), which does not overflow
        # a/λ = u·w: a large w, of which 1/λ would be taken away, is divided by instead.
        return np.exp(np.where(w > 1, log_scaled - np.log(np.maximum(w, 1)), w - inverse + theta))

    def mass(log_multiplier, row):
        return np.sum(q[row] * ratio(log_multiplier, row), axis=1) - 1

    if len(rows):
        multiplier = find_root(mass, _LOG_MULTIPLIER, args=(rows,))
        assert multiplier.success.all()
        r[rows] = q[rows] * ratio(multiplier.x, rows)
    return r


def kl(p: Float[np.ndarray, "N K"], log_p: Float[np.ndarray, "N K"], log_q: Float[np.ndarray, "N K"]) -> np.ndarray:
    """KL(p‖q) of each row, nats."""
    with np.errstate(invalid="ignore"):
        return np.sum(np.where(p > 0, p * (log_p - log_q), 0.0), axis=1)


def gain(p: Float[np.ndarray, "N K"], q: Float[np.ndarray, "N K"], r: Float[np.ndarray, "N K"]) -> Float[np.ndarray, " N"]:
    """ΔL1 = ‖p − q‖₁ − ‖p − r‖₁: twice what the step adds to the chance that the draft's token is accepted."""
    return np.sum(np.abs(p - q), axis=1) - np.sum(np.abs(p - r), axis=1)


def small_step_gain(p: Float[np.ndarray, "N K"], q: Float[np.ndarray, "N K"], theta: float) -> Float[np.ndarray, " N"]:
    """ΔL1 to first order in √θ."""
    chi_square = np.sum(np.where(p > 0, p**2 / np.maximum(q, 1e-300), 0.0), axis=1) - 1
    return np.sqrt(2 * theta) * np.sum(np.abs(p - q), axis=1) / np.sqrt(chi_square)
