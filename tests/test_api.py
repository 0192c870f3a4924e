"""The front door: light to open, every name behind it, and the functions that take records whole."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from toy import loaded_target, toy_chats, toy_target

import jsfdd
from jsfdd.base.mesh import make_mesh
from jsfdd.data.batches import pad_rows
from jsfdd.data.held_out import split_held_out
from jsfdd.hidden.capture import make_recompute
from jsfdd.models.draft import EagleLayer
from jsfdd.models.target import embed_tokens, head_logits, hidden_states

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
    q = np.asarray(jsfdd.draft_logits(TARGET, draft, hidden, TOKENS))
    embedding = embed_tokens(TARGET.config, TARGET.params, jnp.asarray(TOKENS[:, 1:]))
    predicted = jax.jit(EagleLayer(draft.config).apply)({"params": draft.params}, embedding, np.asarray(hidden)[:, :-1])
    np.testing.assert_allclose(q, head_logits(TARGET.config, TARGET.params, predicted), rtol=1e-4, atol=1e-5)
    # What is at t depends on the tokens up to t + 1 and on no later one.
    changed = TOKENS.copy()
    changed[:, 7:] = 5
    again = np.asarray(jsfdd.draft_logits(TARGET, draft, jsfdd.hidden_states(TARGET, changed), changed))
    np.testing.assert_allclose(again[:, :6], q[:, :6], rtol=1e-4, atol=1e-5)
    assert np.abs(again[:, 6] - q[:, 6]).max() > 1e-3


def test_a_draft_vocabulary_rules_tokens_out():
    draft = jsfdd.init_draft(TARGET, jax.random.key(0), vocabulary=(3, 5, 257))
    q = np.asarray(jsfdd.draft_logits(TARGET, draft, jsfdd.hidden_states(TARGET, TOKENS), TOKENS))
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


@pytest.fixture(scope="module")
def samples():
    random = np.random.default_rng(1)
    lengths = random.integers(12, 60, 20)
    return [
        jsfdd.Sample(f"s{i}", "toy", random.integers(0, 258, n).astype(np.int32), np.arange(n) >= n // 3)
        for i, n in enumerate(lengths)
    ]


RECIPE = jsfdd.Recipe(epochs=2, held_out_share=0.2, soft_targets="none")


@pytest.fixture(scope="module")
def kept(samples):
    return jsfdd.select(jsfdd.score(TARGET, samples, progress=False), 0.5)


@pytest.fixture(scope="module")
def trained(samples, kept):
    return jsfdd.train(TARGET, samples, kept, RECIPE, seed=3, progress=False)


def assert_same_draft(found, expected, exact=False):
    assert found.config == expected.config
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(a, b) if exact else np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_training_is_a_function_of_its_arguments_and_continues_in_its_directory(samples, kept, trained, tmp_path):
    fresh = jsfdd.init_draft(TARGET, jax.random.key(0))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(fresh.params), jax.tree.leaves(trained.params)))
    again = jsfdd.train(TARGET, samples, kept, RECIPE, seed=3, out=tmp_path / "run", progress=False)
    assert_same_draft(again, trained, exact=True)
    assert_same_draft(jsfdd.load_draft(tmp_path / "run"), trained, exact=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert_same_draft(
        jsfdd.train(TARGET, samples, kept, RECIPE, seed=3, out=tmp_path / "run", progress=False), trained, exact=True
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="seed"):
        jsfdd.train(TARGET, samples, kept, RECIPE, seed=4, out=tmp_path / "run", progress=False)


def test_only_what_was_kept_and_not_held_out_is_trained_on(samples, kept, trained):
    held_out = {sample.id for sample in split_held_out(samples, RECIPE.held_out_share)[1]}
    others = [sample for sample in samples if sample.id not in kept.ids or sample.id in held_out]
    changed = {s.id: jsfdd.Sample(s.id, s.source, s.tokens[::-1].copy(), s.assistant_mask) for s in others}
    assert held_out & set(kept.ids) and set(kept.ids) - held_out and held_out - set(kept.ids)
    scrambled = [changed.get(sample.id, sample) for sample in samples]
    assert_same_draft(jsfdd.train(TARGET, scrambled, kept, RECIPE, seed=3, progress=False), trained, exact=True)


def test_a_foreign_target_trains_the_same_draft_from_a_function_or_from_arrays(samples, kept, trained):
    @jax.jit
    def states(tokens):
        return hidden_states(TARGET.config, TARGET.params, tokens)

    embedding, head = TARGET.params["embed"]["embedding"], TARGET.params["head"]["kernel"].T
    foreign = jsfdd.foreign_target(states, embedding, head, TARGET.config)
    assert_same_draft(jsfdd.train(foreign, samples, kept, RECIPE, seed=3, progress=False), trained)
    padded = pad_rows([s.tokens for s in samples], (len(samples), 64))
    hidden = np.asarray(states(padded)).astype(ml_dtypes.bfloat16)
    arrays = {s.id: rows[: len(s.tokens)] for s, rows in zip(samples, hidden)}
    only_a_head = jsfdd.foreign_target(None, embedding, head, TARGET.config)
    assert_same_draft(jsfdd.train(only_a_head, samples, kept, RECIPE, hidden=arrays, seed=3, progress=False), trained)
    hidden_of = make_recompute(foreign, make_mesh(), "bfloat16")
    assert_same_draft(jsfdd.train(foreign, samples, kept, RECIPE, hidden=hidden_of, seed=3, progress=False), trained)
    with pytest.raises(ValueError, match="foreign is a foreign target: decoding needs its layers"):
        jsfdd.evaluate(foreign, trained, ["Why?"])


def test_recipes_that_weigh_tokens_are_sent_to_the_room(samples):
    with pytest.raises(ValueError, match="jsfdd.selection.tokens"):
        jsfdd.train(TARGET, samples, recipe=jsfdd.Recipe(token_retain_ratio=0.5))


def test_evaluate_agrees_with_its_report(trained):
    result = jsfdd.evaluate(TARGET, trained, ["Why?", "How so?"], max_new_tokens=12)
    assert result.tau == result.report["tau"] >= 1 and result.tau_low <= result.tau <= result.tau_high
    assert result.same_text_share == 1.0 and len(result.report["prompts"]) == 2


def test_wrong_arguments_are_named():
    draft, chats = jsfdd.init_draft(TARGET, jax.random.key(0)), toy_chats()
    foreign = jsfdd.foreign_target(
        None, np.zeros((258, 32), np.float32), np.zeros((258, 32), np.float32), TARGET.config, name="theirs"
    )
    for call, error, words in (
        (lambda: jsfdd.evaluate(TARGET, draft, "Why?"), TypeError, "one string"),  # not four prompts of one letter
        (lambda: jsfdd.evaluate(TARGET, draft, []), ValueError, "no prompt"),
        (lambda: jsfdd.evaluate(TARGET, draft, ["a"], temperature=-1), ValueError, "temperature is -1"),
        (lambda: jsfdd.evaluate(TARGET, draft, ["a"], max_new_tokens=0), ValueError, "max_new_tokens is 0"),
        (lambda: jsfdd.evaluate(TARGET, draft, ["a"], batch_size=0), ValueError, "batch_size is 0"),
        (lambda: jsfdd.generate(TARGET, ["a"], temperature=float("nan")), ValueError, "temperature is nan"),
        (lambda: jsfdd.generate(foreign, ["a"]), ValueError, "theirs is a foreign target"),
        (lambda: jsfdd.score(TARGET, chats, max_length=-3), ValueError, "max_length is -3"),
        (lambda: jsfdd.train(TARGET, chats, jsfdd.Recipe()), TypeError, "recipe=…"),
        (lambda: jsfdd.hidden_states(TARGET, TOKENS[0]), ValueError, r"must be \[B, T\]"),
        (lambda: jsfdd.hidden_states(TARGET, TOKENS * 0 + 9999), ValueError, "tokens has 9999, but the target knows"),
        (lambda: jsfdd.export(draft, "nowhere", "vlm"), ValueError, "'vlm' is unknown; choose from vllm"),
        (lambda: jsfdd.export(draft, "nowhere", dtype="int4"), ValueError, "'int4' is unknown"),
        (lambda: jsfdd.Recipe(token_loss="mse"), ValueError, "--token-loss: got 'mse', but it must be one of cross_entropy"),
        (lambda: jsfdd.Recipe(soft_targets="mean"), ValueError, "--soft-targets"),
        (lambda: jsfdd.Recipe(compute_dtype="int8"), ValueError, "compute_dtype"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_an_eagle3_draft_from_first_to_last():
    """Its logits depend on the streams, training keeps them, and a second training starts from the first."""
    config, params = toy_target(0, vocab_size=258, max_position=1024, num_layers=8)
    target = TARGET._replace(config=config, params=params, fingerprint="deep")
    with pytest.raises(ValueError, match="2 layers, fewer than 7"):
        jsfdd.init_draft(TARGET, jax.random.key(0), kind="eagle3")
    fresh = jsfdd.init_draft(target, jax.random.key(0), kind="eagle3")
    np.testing.assert_array_equal(fresh.params["head"]["rows"], params["head"]["kernel"].T)
    hidden = np.asarray(jsfdd.hidden_states(target, TOKENS, fresh.config.target_layers))
    streams, final = np.zeros_like(hidden), np.zeros_like(hidden)
    streams[..., :32], final[..., -32:] = 1, 1
    q = np.asarray(jsfdd.draft_logits(target, fresh, hidden, TOKENS))
    assert np.abs(jsfdd.draft_logits(target, fresh, hidden + streams, TOKENS) - q).max() > 1e-3
    np.testing.assert_array_equal(jsfdd.draft_logits(target, fresh, hidden + final, TOKENS), q)
    samples, _ = jsfdd.tokenize_chats(toy_chats(), target.tokenizer, max_length=64)
    recipe = jsfdd.Recipe(draft_kind="eagle3", draft_steps=2, epochs=1, held_out_share=0.0, soft_top_k=8)
    trained = jsfdd.train(target, samples, recipe=recipe, init=fresh, progress=False)
    assert trained.config == fresh.config
    assert 0 < np.abs(trained.params["fc"]["kernel"] - fresh.params["fc"]["kernel"]).max() < 0.1
