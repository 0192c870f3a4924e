"""The examples in docstrings run, with a toy `target`, a `draft` for it, `tokens` [2, 12] and two `chats` at hand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import loaded_target, toy_chats

import jsfdd

PACKAGE = Path(jsfdd.__file__).parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(jsfdd.__path__, "jsfdd.")
    if ">>>" in Path(importlib.util.find_spec(module.name).origin).read_text()
)


@pytest.fixture(scope="module")
def at_hand():
    target = loaded_target()
    return {
        "jsfdd": jsfdd, "jax": jax, "jnp": jnp, "np": np, "target": target, "chats": toy_chats(),
        "draft": jsfdd.init_draft(target, jax.random.key(0)), "tokens": np.arange(24, dtype=np.int32).reshape(2, 12),
    }  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, at_hand, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(module, name, globs=vars(module) | at_hand):
        result = runner.run(test)
        assert not result.failed, f"{test.name}: see the output above"


def test_public_functions_have_examples():
    for name in jsfdd.__all__:
        value = getattr(jsfdd, name)
        assert value.__doc__, name
        if callable(value) and not isinstance(value, type) and value.__module__.startswith(("jsfdd.api", "jsfdd.scoring")):
            assert ">>>" in value.__doc__, name
