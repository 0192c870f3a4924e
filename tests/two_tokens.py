"""Is text drawn from a target? The first two tokens of many trials against their exact joint distribution."""

import jax
import numpy as np

TRIALS = 50_000


def joint_of_trials(trial, vocab_size):
    """(share of each pair of tokens [V, V], what each trial tells): `trial(key) -> (first, second, told)`, TRIALS times."""
    keys = jax.random.split(jax.random.key(0), TRIALS)
    first, second, told = jax.jit(lambda keys: jax.lax.map(trial, keys, batch_size=10_000))(keys)
    joint = np.zeros((vocab_size, vocab_size))
    np.add.at(joint, (np.asarray(first), np.asarray(second)), 1 / TRIALS)
    return joint, np.asarray(told)


def deviation(joint, target):
    """Pearson's statistic against the target's own joint from token 0, in standard deviations from its mean.

    target: row x is the distribution of the token after x.
    """
    exact = target[0][:, None] * target
    cells = exact * TRIALS > 5
    statistic = np.sum((joint[cells] - exact[cells]) ** 2 / exact[cells]) * TRIALS
    freedom = cells.sum() - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)
