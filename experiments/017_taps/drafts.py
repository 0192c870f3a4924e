"""Train the drafts of experiment 017: a maths draft, a chat draft and mixed drafts of two sizes. See README.md."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from experiments.pool.counts import runs_of, tau
from experiments.pool.pool import SMOKE, Arm, Pool, open_pool, pool_parser, run_arm
from jsfdd.selection.mixture import mixture
from jsfdd.selection.sfdd import how_many

HERE = Path(__file__).parent

MATHS, CHAT = ("math_gsm8k", "math_aqua"), ("chat_sharegpt", "instruct_roleplay")
TRAININGS = {"EAGLE-2": {}, "HASS": dict(draft_steps=3)}


def arms(pool: Pool, training: str, size: int, seed: int, epochs: int, flattest: bool) -> dict[str, Arm]:
    """The four drafts: specialists of `size` chats, mixtures of as many and of twice as many; the small one is in the large.

    `flattest`: of the flattest half of either subject.
    """
    labelled = [
        dataclasses.replace(sample, source="maths" if sample.source in MATHS else "chat")
        for sample in pool.samples
        if sample.source in MATHS + CHAT
    ]
    if flattest:
        scores = dict(zip(pool.table.ids, pool.table["flatness"]))
        subjects = {name: [sample for sample in labelled if sample.source == name] for name in ("maths", "chat")}
        labelled = [
            sample
            for name, subject in subjects.items()
            for sample in sorted(subject, key=lambda sample: -scores[sample.id])[: how_many(0.5, len(subject))]
        ]
    shares = {"maths": {"maths": 1.0}, "chat": {"chat": 1.0}, "mixed small": None, "mixed large": None}
    arms_by_name = {}
    for name, weights in shares.items():
        total = 2 * size if name == "mixed large" else size
        ids = [sample.id for sample in mixture(labelled, weights or {"maths": 0.5, "chat": 0.5}, "samples", total, 0)]
        chosen = ", flattest" if flattest else ""
        arms_by_name[f"{training} {name}{chosen} seed {seed}"] = Arm(
            ids, TRAININGS[training] | {"seed": seed, "epochs": epochs}
        )
    return arms_by_name


def main() -> None:
    parser = pool_parser(__doc__, epochs=5)
    parser.set_defaults(chats=16 if SMOKE else 860)  # 430 hold too few of each source
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--size", type=int, default=4 if SMOKE else 150, help="chats of a specialist")
    parser.add_argument("--flattest", action="store_true", help="from the flattest half of maths and of chat")
    options = parser.parse_args()
    pool = open_pool(options)
    sources = np.array([prompt.source for prompt in pool.prompts])
    for seed in options.seeds:
        for training in options.trainings:
            for name, arm in arms(pool, training, options.size, seed, options.epochs, options.flattest).items():
                print(table_row(name, run_arm(pool, name, arm), sources), flush=True)


def table_row(name: str, row: dict, sources: np.ndarray) -> str:
    """Markdown: chats, CPU seconds of training, and τ as a chain at T = 0 on each benchmark and on all."""
    runs, benchmarks = runs_of({0: row}), dict.fromkeys(sources.tolist())
    taus = [f"{benchmark} {tau(runs, 'T=0', np.flatnonzero(sources == benchmark)):.3f}" for benchmark in benchmarks]
    return f"| {name} | {row['samples']} | {row['cpu_seconds']:.0f} s | {' | '.join(taus)} | all {tau(runs, 'T=0'):.3f} |"


if __name__ == "__main__":
    main()
