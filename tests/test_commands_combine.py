"""Drafts by name, and what --combine makes of them or says of those that do not belong together."""

from pathlib import Path

import jax
import numpy as np
import pytest
from toy import toy_config, toy_draft

from jsfdd.commands import evaluate
from jsfdd.commands.evaluate import EvaluateConfig
from jsfdd.commands.options import from_options
from jsfdd.decoding.settings import Combine
from jsfdd.models.draft import Draft
from jsfdd.weights import draft as draft_files


@pytest.fixture
def trained(monkeypatch):
    """Drafts that are there by their paths alone: runs/NAME-of-TARGET, trained for that target, or exported/NAME."""
    config = toy_config()

    def load(path, num_layers):
        _, _, target = path.name.partition("-of-")
        return Draft(*toy_draft(config, seed=len(path.name)), {"target": target * 8} if target else None)

    monkeypatch.setattr(draft_files, "load_draft", load)


def _measured(*paths, **options):
    names = tuple(map(Path, paths))
    config = from_options(EvaluateConfig, target="t", prompts=(Path("p"),), out=Path("o"), draft=names, **options)
    return evaluate.measured_teams(config.drafts, toy_config().num_layers)


def test_drafts_trained_for_other_targets_are_refused(trained):
    with pytest.raises(ValueError, match=r"drafts a-of-one and b-of-two .* different targets \(fingerprints oneoneoneone…"):
        _measured("exported/x", "runs/a-of-one", "runs/b-of-two", combine="average")
    assert list(_measured("exported/x", "runs/a-of-one", "runs/bb-of-one", combine="average")) == ["average"]


def test_what_is_measured(trained):
    assert list(_measured("exported/x", "exported/yy")) == ["x", "yy"]
    only = _measured("exported/x", "exported/yy", combine="route", tree_nodes=9)
    assert list(only) == ["route"]
    assert list(only["route"].drafts) == ["x", "yy"] and only["route"].combine == Combine("route")
    assert list(_measured("a/x", "x")) == ["a-x", "x"]
    with pytest.raises(ValueError, match="given twice"):
        _measured("exported/x", "exported/x")


def test_an_average_has_equal_weights(trained):
    mean = _measured("exported/x", "exported/yy", combine="average")["average"].params[0]
    one, two = (toy_draft(toy_config(), seed=length)[1] for length in (1, 2))
    assert jax.tree.all(jax.tree.map(lambda m, a, b: np.allclose(m, (a + b) / 2, atol=1e-6), mean, one, two))
