"""The stages on a toy target: the commands, and what each one's result is to the bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

OPTIONS = ["--max-length", "128", "--batch-tokens", "512"]
TRAINING = ["--epochs", "4", "--held-out-share", "0.2", "--save-every", "5"]
DECODING = ["--max-new-tokens", "8", "--num-draft-tokens", "2"]
STAGES = ("respond", "score", "train", "evaluate", "export", "run")
# Parts of names that hold no result.
TIMES = ("seconds", "per_second", "speedup", "cost_ratio", "hardware", "versions", "examples", "config")


def make_inputs(folder: Path) -> None:
    """Target, chats, prompts and a trained draft, once."""
    # The toy target is the tests'; run.sh adds their folder to the path.
    from toy import write_chats, write_prompts, write_target

    from jsfdd.commands.cli import main

    if (folder / "draft" / "checkpoints").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_target(folder / "target")
    write_chats(folder / "chats.jsonl", 60)
    write_prompts(folder / "prompts.jsonl")
    assert main(command("train", folder, folder / "draft")) == 0


def command(stage: str, inputs: Path, out: Path) -> list[str]:
    """The words after `jsfdd`. `keep` is respond with hidden states kept."""
    target, data = ["--target", str(inputs / "target")], ["--data", str(inputs / "chats.jsonl")]
    prompts, draft = ["--prompts", str(inputs / "prompts.jsonl")], ["--draft", str(inputs / "draft")]
    words = {
        "respond": [*target, *data, *DECODING, "--batch-size", "4"],
        "keep": [*target, *data, *DECODING, "--batch-size", "4", "--keep-hidden", "flatness"],
        "score": [*target, *data, *OPTIONS, "--per-token", "--keep-hidden", "flatness", "random"],
        "train": [*target, *data, *OPTIONS, *TRAINING],
        "evaluate": [*target, *prompts, *draft, *DECODING],
        "export": draft,
        "run": [*target, *data, *prompts, *OPTIONS, *TRAINING, *DECODING, "--arms", "full", "flatness"],
    }[stage]
    return ["respond" if stage == "keep" else stage, *words, "--out", str(result_path(stage, out))]


def result_path(stage: str, out: Path) -> Path:
    return {"respond": out / "answers.jsonl", "keep": out / "answers.jsonl", "export": out / "draft"}.get(stage, out)


def result(stage: str, out: Path) -> dict[str, str]:
    """name -> digest, of all that a stage wrote and that does not hold times."""
    from jsfdd.base.files import read_json
    from jsfdd.hidden.store import HiddenStore

    digests = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if path.suffix in (".parquet", ".safetensors") or path.name in ("metrics.jsonl", "answers.jsonl", "selection.json"):
            if "scores.parts" not in name:
                digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name in ("report.json", "summary.json"):
            digests[name] = json.dumps(_without_times(read_json(path)), sort_keys=True)
        elif path.name == "manifest.json":
            store, sha = HiddenStore.open(path.parent, None, verify=True), hashlib.sha256()
            for sample in sorted(store):
                sha.update(sample.encode() + store[sample].tobytes())
            digests[name] = sha.hexdigest()
    return digests | {"draft " + str(path.relative_to(out)): _draft_digest(path.parent) for path in out.rglob("checkpoints")}


def left_over(out: Path) -> list[str]:
    """Files that a finished stage should not leave."""
    marks = (".tmp", ".partial", "orbax-checkpoint-tmp", ".lock")
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if any(mark in path.name for mark in marks))


def _without_times(value):
    if isinstance(value, dict):
        return {key: _without_times(part) for key, part in value.items() if not any(word in key for word in TIMES)}
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def _draft_digest(run: Path) -> str:
    import jax
    import numpy as np

    from jsfdd.weights.checkpoint import read_trained_draft

    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(read_trained_draft(run / "checkpoints").params):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()
