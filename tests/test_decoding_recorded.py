"""What is recorded while the target answers: plain decoding's tokens, and the states and scores of a pass over them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import TOY_LENGTHS, toy_draft, toy_prompts, toy_target

from jsfdd.base.mesh import make_mesh, shard_rows, to_host
from jsfdd.base.records import TokenScores
from jsfdd.decoding.generate import make_generate, prepare_params
from jsfdd.decoding.recorded import make_recorded, tail_tokens
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.models.target import final_state, head_logits, hidden_states
from jsfdd.scoring.flatness import token_scores
from jsfdd.scoring.prompt_state import directions

CONFIG, PARAMS = toy_target(0, num_layers=3)
LONGEST, TAIL, LAYERS = 12, (19, 9), (1, 2)
STOPS = (19, 30)  # the first is the template's end of turn; both are said, and some answers are cut
SETUP = DecodeSetup(target=CONFIG, max_new_tokens=LONGEST, stop_tokens=STOPS)
DTYPES = {"float32": 2e-5, "bfloat16": 8e-3}


@functools.cache
def recorded(temperature=0.0, dtype="float32", devices=1):
    mesh = make_mesh(data=devices)
    decode = make_recorded(SETUP, mesh, tail=TAIL, layers=LAYERS, dtype=dtype)
    return to_host(decode(prepare_params(PARAMS, (), mesh), shard_rows(toy_prompts(), mesh), temperature))


@jax.jit
def whole_pass(tokens):
    hidden = hidden_states(CONFIG, PARAMS, tokens[None], LAYERS)[0]
    return hidden, token_scores(head_logits(CONFIG, PARAMS, final_state(CONFIG, hidden)), jnp.roll(tokens, -1))


def texts(out):
    """Of each row: (prompt length, its tokens with the answer and what follows it)."""
    prompts = np.asarray(toy_prompts().tokens)
    for b, length in enumerate(TOY_LENGTHS):
        answer = out.tokens[b, : out.lengths[b]]
        after = TAIL[1:] if answer[-1] == TAIL[0] else TAIL
        yield length, np.array([*prompts[b, :length], *answer, *after], np.int32)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_the_answers_are_those_of_plain_decoding(temperature):
    mesh = make_mesh(data=1)
    plain = to_host(make_generate(SETUP, mesh)(prepare_params(PARAMS, (), mesh), toy_prompts(), temperature))
    out = recorded(temperature)
    np.testing.assert_array_equal(out.lengths, plain.lengths)
    np.testing.assert_array_equal(out.stats.accept_counts, plain.stats.accept_counts)
    for b, length in enumerate(plain.lengths):
        np.testing.assert_array_equal(out.tokens[b, :length], plain.tokens[b, :length])


@pytest.mark.parametrize("temperature, dtype", [(0.0, "float32"), (1.3, "float32"), (0.0, "bfloat16")])
def test_states_and_scores_are_those_of_a_pass_over_the_whole_text(temperature, dtype):
    """At any temperature the scores are of the distribution as it is."""
    out = recorded(temperature, dtype)
    for b, (prompt, text) in enumerate(texts(out)):
        hidden, scores = jax.device_get(whole_pass(np.pad(text, (0, 40 - len(text)))))
        n = out.lengths[b]
        parts = out.prompt_hidden[b, :prompt], out.hidden[b, : n - 1], out.tail_hidden[b]
        found = np.concatenate(parts)[: len(text)].astype(np.float32)
        assert len(found) == len(text)
        scale = np.abs(hidden[: len(text)]).max()
        np.testing.assert_allclose(found, hidden[: len(text)], rtol=DTYPES[dtype], atol=DTYPES[dtype] * scale)
        for name in TokenScores._fields:
            expected = getattr(scores, name)[prompt : prompt + n - 1]
            np.testing.assert_allclose(getattr(out.scores, name)[b, : n - 1], expected, rtol=1e-4, atol=1e-5, err_msg=name)
            assert not getattr(out.scores, name)[b, n - 1 :].any()
        mean = hidden[:prompt, -CONFIG.hidden_size :].mean(axis=0)
        np.testing.assert_allclose(out.prompts[b], mean @ directions(CONFIG.hidden_size), rtol=1e-4, atol=1e-5)


def test_the_answers_of_these_tests_end_in_every_way():
    out = recorded()
    ends = [out.tokens[b, length - 1] for b, length in enumerate(out.lengths)]
    assert {19, 30} < {*ends} and out.lengths.max() == LONGEST


def test_devices_change_nothing():
    for one, four in zip(jax.tree.leaves(recorded(1.3)), jax.tree.leaves(recorded(1.3, devices=4))):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(four, np.float32), rtol=1e-5, atol=1e-5)


def test_what_follows_an_answer():
    last = jnp.array([7, 3, 20])
    assert tail_tokens(last, (7, 9)).tolist() == [[7, 9, 0], [3, 7, 9], [20, 7, 9]]
    assert tail_tokens(last, ()).tolist() == [[7], [3], [20]]


def test_drafts_are_refused():
    setup = DecodeSetup(target=CONFIG, drafts=(toy_draft(CONFIG)[0],), num_draft_tokens=2, max_new_tokens=4)
    with pytest.raises(ValueError, match="leave the drafts out"):
        make_recorded(setup, make_mesh(data=1), tail=(), layers=(), dtype="float32")
