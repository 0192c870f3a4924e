"""Greedy decoding of real text: SmolLM2, two answers, with a draft that is right often enough to matter.

No training: a draft whose layer adds nothing is a linear map from (embedding, hidden) to the next hidden state, and least
squares over a few of the demo's conversations finds it.
"""

import json
from importlib.resources import files

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsfdd.base.mesh import make_mesh
from jsfdd.data.batches import pad_rows
from jsfdd.data.template import render_prompt
from jsfdd.decoding.generate import make_generate, prepare_drafts
from jsfdd.decoding.prompts import prompt_batch
from jsfdd.decoding.settings import TreeShape, decode_setup
from jsfdd.decoding.state import DecodeParams
from jsfdd.models.draft import draft_config, init_draft
from jsfdd.models.target import embed_tokens, head_logits, hidden_states
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


def _linear_draft(target):
    """Ridge regression of h_{t+1} on (embedding of x_{t+1}, h_t) over some two thousand tokens."""
    demo = files("jsfdd.data.demo")
    texts = [json.loads(line)["messages"] for line in (demo / "chats.jsonl").read_text().splitlines()[:240:24]]
    tokens = [target.tokenizer.apply_chat_template(messages, return_dict=False)[:256] for messages in texts]
    padded = np.zeros((len(tokens), 256), np.int32)
    for row, ids in enumerate(tokens):
        padded[row, : len(ids)] = ids
    config, params = target.config, target.params
    hidden = np.asarray(jax.jit(hidden_states, static_argnums=0)(config, params, padded))
    embedding = np.asarray(embed_tokens(config, params, padded))
    pairs = [
        (np.concatenate([embedding[row, 1 : len(ids)], hidden[row, : len(ids) - 1]], axis=1), hidden[row, 1 : len(ids)])
        for row, ids in enumerate(tokens)
    ]
    x, y = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    ridge = 3e-3 * np.trace(x.T @ x) / x.shape[1]
    kernel = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
    draft = draft_config(config)
    shapes = jax.eval_shape(lambda: init_draft(draft, jax.random.key(0)))
    draft_params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    draft_params["fc"]["kernel"] = jnp.asarray(kernel, jnp.float32)
    draft_params["layer"]["mlp_norm"]["scale"] = jnp.ones(config.hidden_size)
    return draft, draft_params


def test_chain_and_tree_write_the_targets_own_choices(target):
    """Every token is the largest logit when the target reads the whole text again, which is what plain decoding writes.

    Layers are a scan, as on accelerators: thirty of them one after the other compile for long and take the weights twice.
    """
    draft, draft_params = _linear_draft(target)
    params = DecodeParams(target.params, target.params, prepare_drafts([draft_params], target.params))
    ids = [render_prompt(target.tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS]
    batch = prompt_batch(ids, range(len(ids)), len(ids), seed=0)
    read = jax.jit(lambda params, tokens: head_logits(target.config, params, hidden_states(target.config, params, tokens)))
    for name, tree in {"chain": None, "tree": TreeShape(3, 3, 8)}.items():
        setup = decode_setup(target, [draft], num_draft_tokens=3, max_new_tokens=NEW_TOKENS, tree=tree)
        out = jax.tree.map(np.asarray, make_generate(setup, make_mesh(data=1))(params, batch, 0.0))
        accepted, steps = out.stats.accepted.sum(), out.stats.accept_counts.sum()
        assert accepted > 0.1 * steps, f"{name}: {accepted} draft tokens accepted in {steps} steps prove little"
        assert steps < 0.93 * (out.lengths.sum() - len(ids))
        texts = [[*prompt, *tokens[:length]] for prompt, tokens, length in zip(ids, out.tokens, out.lengths, strict=True)]
        logits = np.asarray(read(target.params, pad_rows([np.array(text, np.int32) for text in texts], (len(ids), WIDTH))))
        for row, (prompt, text) in enumerate(zip(ids, texts, strict=True)):
            assert len(text) == len(prompt) + NEW_TOKENS or text[-1] in target.stop_tokens
            for t in range(len(prompt), len(text)):
                behind = logits[row, t - 1].max() - logits[row, t - 1, text[t]]
                assert behind < TIE, f"{name}, {PROMPTS[row]!r}: token {t - len(prompt)} is {behind} behind the largest"
