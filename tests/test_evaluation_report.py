"""The report page, from a small synthetic run directory."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jsfdd.config import RunConfig
from jsfdd.evaluation import plots
from jsfdd.evaluation.report import costs, verdict, write_report
from jsfdd.evaluation.run_files import read_run

VOCAB = 49152
HOSTILE = '<script>alert("x")</script>'
SOURCES = ("code", "explain", "maths", "summarise", HOSTILE)
ARMS = {"full": (1.00, 2.31), "flatness": (0.51, 2.24), "random": (0.50, 2.12)}  # share of tokens, τ
WORDS = ("The", " sky", " looks", " blue", " because", " air", " scatters", " short", " waves", ".", "\n", " A", " sum", " of")
GAMMA = 4


def write_run(run: Path, *, num_samples: int = 60, num_prompts: int = 20, seed: int = 0) -> Path:
    """A run directory with every file that a report reads; its figures are plausible and mean nothing."""
    rng = np.random.default_rng(seed)
    run.mkdir(parents=True)
    config = RunConfig(target="smollm2", data=(Path("chat.jsonl"),), prompts=(Path("prompts.jsonl"),), out=run)
    _write_json(run / "config.json", config.to_json())
    samples = _write_scores(run, num_samples, rng)
    ranked = sorted(samples, key=lambda name: -samples[name]["mean"])
    half = num_samples // 2
    kept = {"full": ranked, "flatness": ranked[:half], "random": list(rng.permutation(ranked)[:half])}
    examples = [ranked[i] for i in (0, 1, half, -2, -1)]
    _write_json(run / "texts.json", [_text(name, samples[name]) for name in examples])
    rows = []
    for arm, (share, tau) in ARMS.items():
        directory = run / "arms" / arm
        directory.mkdir(parents=True)
        threshold = samples[ranked[half - 1]]["mean"] if arm == "flatness" else None
        _write_json(directory / "selection.json", {"ids": [str(i) for i in kept[arm]], "metric": arm, "threshold": threshold})
        steps = round(400 * share)
        _write_metrics(directory / "metrics.jsonl", steps, tau, rng)
        report = _report(tau, num_prompts, rng)
        _write_json(directory / "report.json", report)
        tokens = round(share * sum(len(s["flatness"]) for s in samples.values()))
        rows.append(
            {"arm": arm, "samples": len(kept[arm]), "tokens": 2 * tokens, "counted_tokens": tokens, "steps": steps}
            | {"train_seconds": 96.0 * share, "held_out": {"loss": 1.0, "agreement": 0.6, "acceptance": 0.5}}
            | {name: report[name] for name in report if name.startswith(("tau", "speedup"))}
        )
    _write_json(
        run / "summary.json",
        {
            "versions": {"jsfdd": "0.1.0", "jax": "0.10.2"},
            "hardware": {"platform": "cpu", "device_kind": "cpu", "num_devices": 1, "num_processes": 1, "cpu_cores": 2},
            "target": {"name": "SmolLM2-135M-Instruct", "fingerprint": "9f1c2a77", "vocab_size": VOCAB},
            "data": {"read": num_samples + 1, "kept": num_samples, "truncated": 2, "dropped": ["s-empty"]}
            | {"tokens": 24680, "counted_tokens": 12340, "padding_share": 0.124},
            "seconds": {"load": 3.1, "tokenize": 0.6, "score": 41.5, "hidden": 22.0, "evaluate": 88.2},
            "arms": rows,
            "differences": [
                {"a": "flatness", "b": "full", "tau_difference": -0.07, "low": -0.15, "high": 0.01},
                {"a": "random", "b": "full", "tau_difference": -0.19, "low": -0.27, "high": -0.11},
                {"a": "random", "b": "flatness", "tau_difference": -0.12, "low": -0.20, "high": -0.03},
            ],
        },
    )
    return run


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def _write_scores(run: Path, num_samples: int, rng) -> dict[str, dict]:
    samples = {}
    for i in range(num_samples):
        source = SOURCES[i % len(SOURCES)]
        length = int(rng.integers(20, 90)) if i else 0  # the first sample has no counted token
        counted = np.zeros(length + 12, bool)
        counted[10 : 10 + length] = True
        choices = np.exp(rng.exponential(0.5 + 0.25 * (i % len(SOURCES)) + 0.3 * rng.random(), counted.shape))
        flatness = np.where(counted, np.minimum(np.sqrt(choices / VOCAB), 1), 0).astype(np.float32)
        entropy = np.where(counted, np.log(choices) * rng.uniform(1.0, 1.5, counted.shape), 0).astype(np.float32)
        mean = float(flatness[counted].mean()) if length else -1.0
        samples[f"s-{i:03d}"] = {"source": source, "counted": counted, "flatness": flatness, "entropy": entropy, "mean": mean}
    tokens = {name: [s[name].tolist() for s in samples.values()] for name in ("counted", "flatness", "entropy")}
    pq.write_table(pa.table({"id": list(samples), **tokens}), run / "token_scores.parquet")
    means = {name: [_mean(s[name][s["counted"]]) for s in samples.values()] for name in ("flatness", "entropy")}
    columns = {"source": [s["source"] for s in samples.values()], "num_tokens": [int(s["counted"].sum()) for s in samples.values()]}
    pq.write_table(pa.table({"id": list(samples), **columns, **means}), run / "scores.parquet")
    return samples


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _text(name: str, sample: dict) -> dict:
    pieces = ["<|im_start|>", "user", "\n", HOSTILE, " Why", "?", "<|im_end|>", "\n", "<|im_start|>", "assistant"]
    pieces += [WORDS[i % len(WORDS)] for i in range(len(sample["counted"]) - 10)]
    flatness = [float(f) if c else None for f, c in zip(sample["flatness"], sample["counted"])]
    return {"id": name, "source": sample["source"], "pieces": pieces, "flatness": flatness}


def _write_metrics(path: Path, steps: int, tau: float, rng) -> None:
    lines = []
    for step in range(10, steps + 1, 10):
        done = step / steps
        loss = 0.35 + 1.4 * np.exp(-5 * done) + 0.05 * rng.standard_normal()
        lines.append({"step": step, "epoch": int(9.99 * done), "loss": loss, "agreement": 0.5, "acceptance": 0.4})
        if step % (steps // 10) < 10:
            shares = {"agreement": 0.25 * tau * (1 - np.exp(-4 * done)), "acceptance": 0.2 * tau * (1 - np.exp(-4 * done))}
            lines.append({"step": step, "epoch": int(9.99 * done), "held_out": {"loss": float(loss) + 0.1, **shares}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _report(tau: float, num_prompts: int, rng) -> dict:
    alpha = [(tau - 1) / tau * 0.95**i for i in range(GAMMA)]
    reached = 1000 * np.cumprod([1.0, *alpha])
    per_source = {s: _around("tau", tau + 0.1 * i, 0.2) | {"n_prompts": num_prompts // len(SOURCES)} for i, s in enumerate(SOURCES)}
    return {
        **_around("tau", tau, 0.11), **_around("tau_macro", tau + 0.03, 0.12), **_around("speedup", 0.8 * tau, 0.06),
        **_around("tokens_per_second", 31.0 * tau, 2.0), **_around("baseline_tokens_per_second", 38.7, 1.0), "l": tau - 1,
        "alpha": alpha, "alpha_low": [a - 0.04 for a in alpha], "alpha_high": [a + 0.04 for a in alpha],
        "accept_counts": [*(int(a - b) for a, b in zip(reached, reached[1:])), int(reached[-1])],
        "n_prompts": num_prompts, "same_text_share": 1.0, "compile_seconds": 12.5, "per_source": per_source,
        "examples": [{"id": "p1", "prompt": f"Explain {HOSTILE}", "text": "A tag & nothing more."}],
    }  # fmt: skip


def _around(name: str, value: float, width: float) -> dict:
    return {name: value, f"{name}_low": value - width, f"{name}_high": value + width}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run) -> str:
    return write_report(run).read_text(encoding="utf-8")
