"""Answers in one call are those of the loop, and of the slow obvious decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import damped_target, loaded_target, often_right, toy_draft

from jsfdd.base.mesh import make_mesh
from jsfdd.decoding.answers import generate
from jsfdd.decoding.settings import TreeShape
from jsfdd.models.draft import Draft
from jsfdd.models.target import head_logits, hidden_states

PROMPTS = ["hello", "a longer question, over and over: " + "why? " * 12, "hello"]
SHORT = ["hello", "why?", "hello"]  # of one width, and so of one program
OPTIONS = {"max_new_tokens": 10, "mesh": make_mesh(data=1)}


@pytest.fixture(scope="module")
def models():
    target = damped_target()
    return target, Draft(*often_right(target))


@pytest.mark.parametrize("tree, prompts", [(None, PROMPTS), (TreeShape(2, 3, 6), SHORT)], ids=["chain", "tree"])
def test_with_a_draft_the_text_is_the_same(models, tree, prompts):
    target, draft = models
    plain = generate(target, prompts, **OPTIONS)
    fast = generate(target, prompts, draft=draft, num_draft_tokens=2, tree=tree, **OPTIONS)
    assert fast.text == plain.text and len(plain.text) == 3
    assert all(np.array_equal(a, b) for a, b in zip(fast.tokens, plain.tokens, strict=True))
    assert plain.tau is None and 1 < fast.tau <= 3


def test_the_text_is_the_argmax_of_the_whole_text_read_again(models):
    target, _ = models
    (text,), (tokens,), _ = generate(target, PROMPTS[:1], **OPTIONS)
    read = jax.jit(lambda ids: head_logits(target.config, target.params, hidden_states(target.config, target.params, ids)))
    ids = target.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )
    for token in tokens:
        padded = jnp.zeros((1, 64), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
        assert int(jnp.argmax(read(padded)[0, len(ids) - 1])) == token
        ids.append(int(token))
    assert text == target.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


def test_what_is_sampled_depends_on_seed_and_place(models):
    target, _ = models
    one = generate(target, SHORT, temperature=1.0, seed=1, **OPTIONS)
    assert one.text == generate(target, SHORT, temperature=1.0, seed=1, batch_size=1, **OPTIONS).text
    assert one.text[0] != one.text[2]
    assert one.text != generate(target, SHORT, temperature=1.0, seed=2, **OPTIONS).text


def test_what_it_cannot_answer(models):
    target, _ = models
    assert generate(target, [], **OPTIONS) == ([], [], None)
    with pytest.raises(ValueError, match=r"prompt prompts\[0\]: .* context of 1024"):
        generate(target, ["a" * 1100], **OPTIONS)
    with pytest.raises(TypeError, match="give a list"):
        generate(target, "hello", **OPTIONS)
    other = Draft(*toy_draft(loaded_target().config.__class__(**{**vars(target.config), "vocab_size": 300})))
    with pytest.raises(ValueError, match="vocab_size is 300"):
        generate(target, PROMPTS, draft=other, **OPTIONS)
