"""What happens to tokens of different flatness while a draft trains (the paper's figure 2). See README.md."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from experiments.pool.pool import SMOKE, Pool, open_pool, pool_parser
from experiments.results import write_results
from jsfdd.base.hardware import describe_hardware
from jsfdd.data.batches import epoch_batches, make_batches
from jsfdd.data.held_out import split_held_out
from jsfdd.evaluation.intervals import interval, resample_ratios
from jsfdd.models.draft import EagleLayer, allowed_tokens
from jsfdd.models.target import embed_tokens, head_logits
from jsfdd.scoring.table import read_token_scores
from jsfdd.training.batch import TrainingData, device_batch
from jsfdd.training.step import init_state, make_optimizer
from jsfdd.training.train import train

matplotlib.use("Agg")
HERE = Path(__file__).parent

BINS = 10
FIGURES = ("cross_entropy", "l1", "gradient", "acceptance")


def main() -> None:
    options = pool_parser(__doc__, epochs=6).parse_args()
    pool = open_pool(options)
    kept, held_out = split_held_out(pool.samples, 0.15)
    flatness, owner = _flatness(pool, held_out)
    edges = np.quantile(flatness, np.linspace(0, 1, BINS + 1))
    bins = np.clip(np.searchsorted(edges, flatness, side="right") - 1, 0, BINS - 1)
    look = _make_look(pool, held_out)
    looks = [look(init_state(pool.draft, make_optimizer(pool.recipe, 1), 0).params)]

    def probe(params: dict) -> dict:
        looks.append(look(params))
        return {"tau": float(1 + looks[-1][3].mean())}  # of the first depth alone; only the log reads it

    steps_an_epoch = len(epoch_batches([len(s.tokens) for s in kept], pool.shapes, 0, 0))
    train(
        pool.loaded.target, TrainingData(kept, pool.store, pool.soft_targets), TrainingData([], pool.store), pool.recipe,
        pool.loaded.mesh, out=options.work / "dynamics", identity=pool.loaded.identity, draft=pool.draft, shapes=pool.shapes,
        probe=probe, probe_every=steps_an_epoch,
    )  # fmt: skip
    looks = np.stack(looks)  # [epoch, figure, token]
    results = {
        "hardware": describe_hardware(), "train_samples": len(kept), "held_out_samples": len(held_out),
        "held_out_tokens": len(flatness), "epochs": options.epochs, "steps_an_epoch": steps_an_epoch,
        "flatness_edges": edges.tolist(), "by_epoch_and_bin": _by_bin(looks, bins),
    }  # fmt: skip
    results["change_of_l1"] = _changes(looks, bins, owner)
    out = options.work if SMOKE else HERE
    write_results(out / "results.jsonl", results)
    _plot(looks, bins, out / "dynamics.png")


def _flatness(pool: Pool, samples) -> tuple[np.ndarray, np.ndarray]:
    """(flatness, number of the sample) of every token that a draft is trained to match, in order."""
    scores = read_token_scores(pool.work / "token_scores.parquet")
    values, owners = [], []
    for number, sample in enumerate(samples):
        places = _loss_places(sample)
        values.append(scores[sample.id].flatness[places])
        owners.append(np.full(len(places), number))
    return np.concatenate(values), np.concatenate(owners)


def _loss_places(sample) -> np.ndarray:
    """Where the scores lie that a draft is trained to match: the pairing needs a token to the left."""
    counted = np.flatnonzero(sample.counted)
    return counted[counted >= 1]


def _make_look(pool: Pool, samples):
    """`look(draft_params) -> [4, tokens]`: FIGURES at every counted token of the samples, in order."""
    target = pool.loaded.target
    data = TrainingData(samples, pool.store)
    lengths = [len(sample.tokens) for sample in samples]
    allowed = jnp.asarray(allowed_tokens(pool.draft))

    @jax.jit
    def of_batch(params, batch):
        hidden = batch.hidden.astype(jnp.float32)
        embedding = embed_tokens(target.config, target.params, batch.tokens[:, 1:])
        predicted = EagleLayer(pool.draft).apply({"params": params}, embedding, hidden[:, :-1])

        def of_row(pair):
            truth, guess = pair
            p = jax.nn.softmax(head_logits(target.config, target.params, truth), axis=-1)
            log_q = jax.nn.log_softmax(jnp.where(allowed, head_logits(target.config, target.params, guess), -jnp.inf), axis=-1)
            q = jnp.exp(log_q)
            # Over the draft's vocabulary alone: what it cannot say it cannot learn.
            cross_entropy = -jnp.sum(jnp.where(allowed, p * jnp.where(allowed, log_q, 0.0), 0.0), axis=-1)
            l1 = jnp.sum(jnp.abs(p - q), axis=-1)
            mass = jnp.sum(jnp.where(allowed, p, 0.0), axis=-1, keepdims=True)
            gradient = jnp.linalg.norm(jnp.where(allowed, mass * q - p, 0.0), axis=-1)  # of the cross entropy by the logits
            return jnp.stack([cross_entropy, l1, gradient, 1 - l1 / 2])

        shape = (-1, 16, hidden.shape[2])
        blocks = (hidden[:, 1:].reshape(-1, hidden.shape[2]), predicted.reshape(-1, hidden.shape[2]))
        size = blocks[0].shape[0]
        blocks = jax.tree.map(lambda x: jnp.pad(x, ((0, -size % 16), (0, 0))).reshape(shape), blocks)
        losses = jax.lax.map(of_row, blocks).swapaxes(0, 1).reshape(len(FIGURES), -1)[:, :size]
        return losses.reshape(len(FIGURES), *batch.tokens[:, 1:].shape)

    def look(params) -> np.ndarray:
        by_sample = {}
        for plan in make_batches(lengths, pool.shapes):
            rows = np.asarray(of_batch(params, device_batch(data, plan.indices, plan.shape, pool.loaded.mesh)))
            for row, i in zip(rows.swapaxes(0, 1), plan.indices):
                by_sample[i] = row[:, _loss_places(samples[i]) - 1]  # the loss at t is of the distribution scored at t + 1
        return np.concatenate([by_sample[i] for i in range(len(samples))], axis=1)

    return look


def _by_bin(looks, bins) -> list[dict]:
    return [
        {name: [float(figures[i][bins == b].mean()) for b in range(BINS)] for i, name in enumerate(FIGURES)}
        for figures in looks
    ]


def _changes(looks, bins, owner) -> dict:
    """Mean fall of ‖p − q‖₁ per bin from before training to the end, and in the last epoch; 95% over samples."""
    changes = {}
    for name, earlier in (("in all", looks[0]), ("last epoch", looks[-2])):
        fall = earlier[1] - looks[-1][1]
        rows = []
        for b in range(BINS):
            in_bin = bins == b
            sums = np.bincount(owner[in_bin], weights=fall[in_bin], minlength=owner.max() + 1)
            counts = np.bincount(owner[in_bin], minlength=owner.max() + 1)
            low, high = interval(resample_ratios(sums[:, None], counts[:, None], 0)[:, 0])
            rows.append({"mean": float(fall[in_bin].mean()), "low": low, "high": high})
        changes[name] = rows
    return changes


def _plot(looks, bins, path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    titles = ("cross entropy (nats)", "‖p − q‖₁", "gradient norm ‖q − p‖₂", "acceptance Σ min(p, q)")
    colours = plt.cm.viridis(np.linspace(0, 0.95, BINS))
    for i, (axis, title) in enumerate(zip(axes, titles)):
        for b in range(BINS):
            axis.plot([figures[i][bins == b].mean() for figures in looks[1:]], color=colours[b], label=f"tenth {b + 1}")
        axis.set(title=title, xlabel="epoch", xticks=range(len(looks) - 1), xticklabels=range(1, len(looks)))
    axes[-1].legend(fontsize=6, title="of flatness", title_fontsize=6)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
