"""What losses, HASS, draft vocabularies and token selection do to τ, on the pool of experiment 014. See README.md."""

from __future__ import annotations

from pathlib import Path

from experiments.pool.choices import by_metric
from experiments.pool.pool import Arm, Pool, open_pool, pool_parser, run_arm, token_weights_of

HERE = Path(__file__).parent

TOP_K = dict(soft_targets="top_k", soft_top_k=128)  # distances other than cross entropy, over the target's 128 likeliest tokens


def recipes(pool: Pool, seed: int) -> dict[str, Arm]:
    """Arms on the flattest half at the pool's epochs, unless the name says otherwise."""
    half = by_metric(pool, "flatness", 0.5, 0)
    kept = [sample for sample in pool.samples if sample.id in set(half)]
    epochs = pool.recipe.epochs
    tokens = {
        metric: token_weights_of(pool, kept, metric=metric, weighting="hard", retain_ratio=0.5, seed=seed)
        for metric in ("flatness", "random")
    }
    options = {
        "half": {},
        "half, CE weight 1": dict(token_weight=1.0),
        "half, CE alone": dict(token_weight=1.0, hidden_weight=0.0),
        "half, top-k targets 8": TOP_K | dict(soft_top_k=8),
        "half, top-k targets 32": TOP_K | dict(soft_top_k=32),
        "half, top-k targets 128": TOP_K,
        "half, top-k targets 256": TOP_K | dict(soft_top_k=256),
        "half, reverse KL": TOP_K | dict(token_loss="reverse_kl"),
        "half, total variation": TOP_K | dict(token_loss="total_variation"),
        "half, hybrid": TOP_K | dict(token_loss="hybrid"),
        "half, half the epochs": dict(epochs=epochs // 2),  # HASS's steps
        "half, HASS 3, half the epochs": dict(draft_steps=3, epochs=epochs // 2),
        "half, HASS 3 and top-k loss, half the epochs": dict(draft_steps=3, hass_top_k_weight=1.0, epochs=epochs // 2),
        "half, three halves of the epochs": dict(epochs=3 * epochs // 2),  # HASS's arithmetic
        "half, 4k vocabulary": dict(draft_vocab=4096),
        "half, 16k vocabulary": dict(draft_vocab=16384),
        "half, full vocabulary": dict(draft_vocab=0),
    }
    arms = {f"{name} seed {seed}": Arm(half, changes | {"seed": seed}) for name, changes in options.items()}
    for metric, weights in tokens.items():
        arms[f"half, {metric} half of the tokens seed {seed}"] = Arm(half, {"seed": seed}, weights)
    everything = [sample.id for sample in pool.samples]
    arms[f"full, half the epochs seed {seed}"] = Arm(everything, {"seed": seed, "epochs": epochs // 2})
    return arms


def main() -> None:
    parser = pool_parser(__doc__, epochs=4)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", help="parts of names; all unless given")
    options = parser.parse_args()
    pool = open_pool(options)
    for seed in options.seeds:
        for name, arm in recipes(pool, seed).items():
            if not options.only or any(part in name for part in options.only):
                run_arm(pool, name, arm)


if __name__ == "__main__":
    main()
