"""Greedy decoding of real text: SmolLM2, two answers, and the draft that comes with jsfdd."""

import jax
import numpy as np
import pytest

from jsfdd.base.mesh import make_mesh
from jsfdd.data.batches import pad_rows
from jsfdd.data.template import render_prompt
from jsfdd.decoding.generate import make_generate, prepare_drafts
from jsfdd.decoding.prompts import prompt_batch
from jsfdd.decoding.settings import TreeShape, decode_setup
from jsfdd.decoding.state import DecodeParams
from jsfdd.models.target import head_logits, hidden_states
from jsfdd.weights.draft import check_draft, load_draft
from jsfdd.weights.target import load_target

NEW_TOKENS, WIDTH = 24, 96
PROMPTS = ("Write a short story about a lighthouse.", "List ten facts about the Moon.")
pytestmark = pytest.mark.slow
TIE = 1e-3  # two logits closer than this may change places when a sum is ordered differently


@pytest.fixture(scope="module")
def target():
    jax.config.update("jax_disable_most_optimizations", False)  # of a scan there is little to optimise, and much to run
    yield load_target("smollm2")
    jax.config.update("jax_disable_most_optimizations", True)


def test_chain_and_tree_write_the_targets_own_choices(target):
    """Every token is the largest logit when the target reads the whole text again, which is what plain decoding writes.

    Layers are a scan, as on accelerators: thirty of them one after the other compile for long and take the weights twice.
    """
    draft, draft_params, _ = load_draft("smollm2")
    check_draft(target, draft, "smollm2")
    params = DecodeParams(target.params, target.params, prepare_drafts([draft_params], target.params))
    ids = [render_prompt(target.tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS]
    batch = prompt_batch(ids, range(len(ids)), len(ids), seed=0)
    read = jax.jit(lambda params, tokens: head_logits(target.config, params, hidden_states(target.config, params, tokens)))
    for name, tree in {"chain": None, "tree": TreeShape(3, 3, 8)}.items():
        setup = decode_setup(target, [draft], num_draft_tokens=3, max_new_tokens=NEW_TOKENS, tree=tree)
        out = jax.tree.map(np.asarray, make_generate(setup, make_mesh(data=1))(params, batch, 0.0))
        accepted, steps = out.stats.accepted.sum(), out.stats.accept_counts.sum()
        assert accepted > 0.5 * steps, f"{name}: {accepted} draft tokens accepted in {steps} steps: a draft that lost its worth"
        texts = [[*prompt, *tokens[:length]] for prompt, tokens, length in zip(ids, out.tokens, out.lengths, strict=True)]
        logits = np.asarray(read(target.params, pad_rows([np.array(text, np.int32) for text in texts], (len(ids), WIDTH))))
        for row, (prompt, text) in enumerate(zip(ids, texts, strict=True)):
            assert len(text) == len(prompt) + NEW_TOKENS or text[-1] in target.stop_tokens
            for t in range(len(prompt), len(text)):
                behind = logits[row, t - 1].max() - logits[row, t - 1, text[t]]
                assert behind < TIE, f"{name}, {PROMPTS[row]!r}: token {t - len(prompt)} is {behind} behind the largest"
