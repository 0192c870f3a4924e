"""The code of docs/python.md and docs/jax.md runs as it stands there, block after block, on a toy for the packaged model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from toy import loaded_target

import jsfdd

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[1] / "docs"


def run_page(page: str) -> dict:
    """Run a page's blocks one after another; the names that they leave."""
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/{page}, block {number + 1}", "exec"), names)
    return names


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with chats.jsonl, where `load_target` gives a toy."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Why {i}?"},
                {"role": "assistant", "content": "Because of " + "x" * (i % 7)},
            ]
        }
        for i in range(24)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jsfdd, "load_target", lambda name: loaded_target())
    return tmp_path


def test_a_model_of_another_framework_gets_a_draft(place):
    names = run_page("jax.md")
    assert names["draft"].config.decoder.hidden_size == 32 and (place / "mine-vllm" / "config.json").is_file()
    assert names["table"]["flatness"].shape == (24,)


def test_the_page_runs(place):
    names = run_page("python.md")
    assert names["result"].tau >= 1 and (place / "draft-vllm" / "model.safetensors").is_file()
    assert names["table"]["flatness"].shape == (24,) and np.all(names["verdict"].num_accepted >= 0)


def test_the_notebook_of_the_design(place, monkeypatch):
    """DESIGN §6, line for line, but for what is not there yet: a packaged draft, and selection within clusters."""
    target = jsfdd.load_target("smollm2")
    import jax

    draft = jsfdd.init_draft(target, jax.random.key(0))
    monkeypatch.setattr(jsfdd, "load_draft", lambda name: draft)
    chats, prompts = jsfdd.read_chats(["chats.jsonl"]), ["Why is the sky blue?"]
    recipe = jsfdd.Recipe(epochs=1)
    tokens = np.arange(10, dtype=np.int32)[None, :]
    keys, draft_tokens = jax.random.split(jax.random.key(0), 1), tokens[:, 1:]

    target = jsfdd.load_target("smollm2")
    draft = jsfdd.load_draft("smollm2")  # noqa: E702
    hidden = jsfdd.hidden_states(target, tokens)
    logits = jsfdd.head_logits(target, hidden)  # noqa: E702
    jsfdd.token_flatness(logits)
    q = jsfdd.draft_logits(target, draft, hidden, tokens)
    jsfdd.verify(keys, draft_tokens, q, logits, temperature=1.0)
    out = jsfdd.generate(target, ["Why is the sky blue?"], draft=draft, max_new_tokens=64)
    out.text, out.tau  # noqa: B018, E702
    table = jsfdd.score(target, chats)
    kept = jsfdd.select(table, 0.5, within="source")  # noqa: E702
    draft = jsfdd.train(target, chats, kept, recipe)
    tau = jsfdd.evaluate(target, draft, prompts).tau  # noqa: E702
    assert tau >= 1 and out.tau >= 1
