"""Hidden states and logits against transformers/torch, from fixtures that golden/make_golden.py wrote.

Tolerance: both sides compute in float32 and differ in summation order, in `rsqrt`, and in cos and sin of angles, which
over a few layers gives errors around 1e-6 of the largest value (4e-6 over SmolLM2's 30 layers). 2e-5 leaves room for
other machines' matmuls, while any mistake that these models are made to show (a wrong rope, norm, window or scale) is
1e-3 and more.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsfdd.models.target import head_logits, hidden_states
from jsfdd.weights import huggingface
from jsfdd.weights import target as load

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "qwen3_moe", "mixtral")


def relative_error(got, expected) -> float:
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def run(config, params, tokens):
    hidden = jax.jit(lambda p, t: hidden_states(config, p, t))(params, jnp.asarray(tokens))
    return hidden, head_logits(config, params, hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_transformers(family):
    config = huggingface.read_config(GOLDEN / family)
    params = huggingface.read_params(GOLDEN / family, config)
    expected = np.load(GOLDEN / family / "expected.npz")
    hidden, logits = run(config, params, expected["tokens"])
    assert relative_error(hidden, expected["hidden"]) < TOLERANCE
    assert relative_error(logits, expected["logits"]) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_bfloat16_is_close(family):
    """bfloat16 parameters run through, hidden states keep the dtype, and logits agree as far as its 8 bits allow."""
    config = huggingface.read_config(GOLDEN / family)
    params = huggingface.read_params(GOLDEN / family, config, jnp.bfloat16)
    expected = np.load(GOLDEN / family / "expected.npz")
    hidden, logits = run(config, params, expected["tokens"])
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert relative_error(logits, expected["logits"]) < 0.05


@pytest.mark.parametrize(
    "family, change",
    [
        ("llama", dict(rope=dict(kind="default"))),
        ("llama", dict(rms_norm_eps=1e-3)),
        ("qwen3", dict(rope=dict(kind="default"))),
        ("gemma3", dict(sliding_window=6)),
        ("gemma3", dict(query_scale=None)),
        ("gemma3", dict(rope=dict(factor=1.0))),
        ("gemma3", dict(local_rope=None)),
        ("gemma3", dict(activation="silu")),
        ("qwen3_moe", dict(experts=dict(normalised=True))),
        ("qwen3_moe", dict(experts=dict(chosen=2))),
        ("mixtral", dict(experts=dict(normalised=False))),
    ],
)
def test_the_fixtures_notice(family, change):
    """A wrong setting moves the logits far beyond the tolerance, so the test above means something."""
    config = huggingface.read_config(GOLDEN / family)
    params = huggingface.read_params(GOLDEN / family, config)
    for part in ("rope", "experts"):
        if isinstance(change.get(part), dict):
            change = {part: dataclasses.replace(getattr(config, part), **change[part])}
    expected = np.load(GOLDEN / family / "expected.npz")
    _, logits = run(dataclasses.replace(config, **change), params, expected["tokens"])
    assert relative_error(logits, expected["logits"]) > 50 * TOLERANCE


@pytest.fixture(scope="module")
def smollm2():
    target = load.load_target("smollm2")
    expected = np.load(GOLDEN / "smollm2.npz")
    hidden, logits = run(target.config, target.params, expected["tokens"])
    return hidden[0], logits[0], expected


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2):
    """The same GGUF file, read and dequantised by transformers."""
    hidden, logits, expected = smollm2
    at = expected["positions"]
    assert relative_error(hidden[at], expected["hidden"]) < TOLERANCE
    assert relative_error(logits[at][:, expected["vocabulary_ids"]], expected["logits"]) < TOLERANCE


@pytest.mark.slow
def test_smollm2_whole_distributions_agree(smollm2):
    _, logits, expected = smollm2
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), expected["logsumexp"], rtol=1e-4)
    # The two largest logits are nowhere closer than 0.0057; the tolerance, at logits up to 38, is 0.001: no tie flips.
    assert np.array_equal(np.argmax(np.asarray(logits), -1), expected["argmax"])
