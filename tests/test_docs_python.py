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
