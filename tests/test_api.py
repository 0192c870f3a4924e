"""The front door: light to open, every name behind it, and the functions that take records whole."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import loaded_target, toy_chats

import jsfdd
from jsfdd.models.draft import EagleLayer
from jsfdd.models.target import embed_tokens, head_logits

TARGET = loaded_target()
TOKENS = np.random.default_rng(0).integers(0, 258, (2, 12)).astype(np.int32)


def test_importing_jsfdd_imports_nothing_heavy():
    code = (
        "import sys; import jsfdd; dir(jsfdd)\n"
        "print([name for name in ('numpy', 'jax', 'flax', 'transformers', 'pyarrow', 'rich') if name in sys.modules])\n"
        "jsfdd.Recipe\n"
        "print([name for name in ('jax', 'flax', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_every_name_is_there():
    assert set(jsfdd.__all__) <= set(dir(jsfdd)) and len(jsfdd.__all__) < 35
    for name in jsfdd.__all__:
        assert callable(getattr(jsfdd, name)), name
    with pytest.raises(AttributeError, match="no attribute 'scores'; it has .*score"):
        jsfdd.scores  # noqa: B018


def test_draft_logits_stand_beside_the_targets_of_the_next_token():
    draft = jsfdd.init_draft(TARGET, jax.random.key(0))
    hidden = jsfdd.hidden_states(TARGET, TOKENS)
    q = jsfdd.draft_logits(TARGET, draft, hidden, TOKENS)
    embedding = embed_tokens(TARGET.config, TARGET.params, jnp.asarray(TOKENS[:, 1:]))
    predicted = EagleLayer(draft.config).apply({"params": draft.params}, embedding, hidden[:, :-1])
    np.testing.assert_allclose(q, head_logits(TARGET.config, TARGET.params, predicted), rtol=1e-4, atol=1e-5)
    # What is at t depends on the tokens up to t + 1 and on no later one.
    changed = TOKENS.copy()
    changed[:, 7:] = 5
    again = jsfdd.draft_logits(TARGET, draft, jsfdd.hidden_states(TARGET, changed), changed)
    np.testing.assert_allclose(again[:, :6], q[:, :6], rtol=1e-4, atol=1e-5)
    assert np.abs(again[:, 6] - q[:, 6]).max() > 1e-3


def test_a_draft_vocabulary_rules_tokens_out():
    draft = jsfdd.init_draft(TARGET, jax.random.key(0), vocabulary=(3, 5, 257))
    q = jsfdd.draft_logits(TARGET, draft, jsfdd.hidden_states(TARGET, TOKENS), TOKENS)
    assert np.isfinite(q[..., [3, 5, 257]]).all() and np.isneginf(np.delete(q, [3, 5, 257], axis=-1)).all()


def test_score_takes_chats_or_samples():
    chats = toy_chats()
    table = jsfdd.score(TARGET, chats, per_token=True, progress=False)
    samples, _ = jsfdd.tokenize_chats(chats, TARGET.tokenizer, max_length=2048)
    again = jsfdd.score(TARGET, samples, progress=False)
    assert table.ids == again.ids == ("c0", "c1") and table.tokens is not None
    np.testing.assert_array_equal(table["flatness"], again["flatness"])
    # The table's flatness is the mean of token_flatness over the tokens that count.
    logits = jsfdd.head_logits(TARGET, jsfdd.hidden_states(TARGET, samples[0].tokens[None]))
    flatness = np.asarray(jsfdd.token_flatness(logits))[0]
    np.testing.assert_allclose(table["flatness"][0], flatness[samples[0].counted].mean(), rtol=1e-5)
    foreign = jsfdd.foreign_target(None, TARGET.params["embed"]["embedding"], TARGET.params["head"]["kernel"].T, TARGET.config)
    with pytest.raises(ValueError, match="foreign has no tokenizer"):
        jsfdd.score(foreign, chats)
