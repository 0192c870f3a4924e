"""τ of drafts of SmolLM2 on the prompts of 023, by replay: with the tokens that they propose, and with all. See README.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from experiments.pool.judge import Judge
from experiments.pool.pool import PROMPTS, pick_prompts, recorded_answers
from experiments.results import read_results, write_results
from jsfdd.base.hardware import describe_hardware
from jsfdd.base.mesh import make_mesh
from jsfdd.models.draft import layers_read
from jsfdd.weights.draft import load_draft
from jsfdd.weights.target import load_target

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=Path, required=True, help="folder with " + ", ".join(f"{n}.jsonl" for n in PROMPTS))
    parser.add_argument("--work", type=Path, required=True, help="directory for the recorded answers; continued")
    parser.add_argument("--whole-head", action="store_true", help="judge each with the target's whole head too")
    parser.add_argument("--results", type=Path, help="results.jsonl to write a row for each draft to")
    parser.add_argument("--write", type=Path, help="write eight prompts of each benchmark to this file, and judge nothing")
    parser.add_argument("drafts", nargs="*", help="NAME=DIRECTORY")
    options = parser.parse_args()
    if options.write is not None:
        rows = [
            {"id": prompt.id, "source": prompt.source, "turns": prompt.turns[:1]}
            for prompt in pick_prompts(options.prompts, dict.fromkeys(PROMPTS, 8))
        ]
        options.write.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    target, mesh = load_target("smollm2"), make_mesh()
    prompts = pick_prompts(options.prompts, PROMPTS)
    layers = layers_read(target.config, "eagle3")  # so that drafts of either kind can be judged
    judge = Judge(target, mesh, *recorded_answers(target, mesh, prompts, options.work, "answers_0.0", layers=layers))
    results = {} if options.results is None else read_results(options.results) | {"hardware": describe_hardware()}
    for name, _, directory in (text.partition("=") for text in options.drafts):
        draft = load_draft(directory)
        heads = {"": draft.config}
        if options.whole_head and draft.config.vocabulary:
            heads[", all tokens"] = dataclasses.replace(draft.config, vocabulary=())
        for suffix, config in heads.items():
            counts = judge(config, draft.params)
            results[name + suffix] = {kind: figures(counts[kind], [p.source for p in prompts]) for kind in counts}
            print(name + suffix, {kind: round(row["tau"], 3) for kind, row in results[name + suffix].items()}, flush=True)
            if options.results is not None:
                write_results(options.results, results)


def figures(counts: dict, sources: list[str]) -> dict:
    """τ with 95% over prompts, of all and by source, and the share accepted at each depth that was reached."""
    emitted, steps = np.array(counts["emitted"]), np.array(counts["steps"])
    random = np.random.default_rng(0).integers(0, len(steps), (4000, len(steps)))
    low, high = np.percentile(emitted[random].sum(axis=1) / steps[random].sum(axis=1), [2.5, 97.5])
    rows = {name: [i for i, source in enumerate(sources) if source == name] for name in dict.fromkeys(sources)}
    return {
        "tau": float(emitted.sum() / steps.sum()), "low": float(low), "high": float(high),
        "by_source": {name: float(emitted[at].sum() / steps[at].sum()) for name, at in rows.items()},
        "alpha": [round(a / r, 4) if r else None for a, r in zip(counts["accepted"], counts["reached"])],
        "emitted": counts["emitted"], "steps": counts["steps"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
