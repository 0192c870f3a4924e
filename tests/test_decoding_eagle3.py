"""EAGLE-3 drafts in the one decoding loop: chains, trees, ensembles with EAGLE-2 drafts, and replay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import compiled_decoder, often_right, toy_prompts, toy_target, toy_tokenizer

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import Prompt
from jsfdd.decoding.drafting import read_states
from jsfdd.decoding.ensemble import average_drafts
from jsfdd.decoding.generate import prepare_params
from jsfdd.decoding.settings import Combine, DecodeSetup, Team, TreeShape
from jsfdd.evaluation.acceptance import acceptance_figures
from jsfdd.evaluation.evaluate import evaluate
from jsfdd.evaluation.replay import make_judge, record, walk
from jsfdd.evaluation.replay_trees import make_tree_replay
from jsfdd.models.draft import Draft, draft_config, init_draft
from jsfdd.models.target import hidden_states
from jsfdd.weights.target import Target

TREE = TreeShape(3, 3, 9)


@functools.cache
def target():
    """Its hidden state is its last token's embedding, but for a little of its layers."""
    config, params = toy_target(0, vocab_size=258, max_position=1024, num_layers=4, num_kv_heads=4)
    for part, name in (("attention", "o_proj"), ("mlp", "down_proj")):
        params["layers"][part][name]["kernel"] = 0.3 * params["layers"][part][name]["kernel"]
    return Target(config, params, toy_tokenizer(), "toy", "toy", (257,))


@functools.cache
def draft(layers=(0, 2, 3), vocabulary=()):
    """An EAGLE-3 draft that is often right: each head attends to its own token, and passes its embedding through.

    Of fc and the MLP it has a little, so that streams and states matter.
    """
    config = target().config
    shape = draft_config(config, vocabulary=vocabulary, kind="eagle3", target_layers=layers)
    params = init_draft(shape, jax.random.key(len(layers)), target().params["head"]["kernel"].T)
    width = config.hidden_size
    through = jnp.concatenate([jnp.eye(width), jnp.zeros((width, width))])
    little = {name: 0.05 * params["layer"]["attention"][name]["kernel"] for name in ("q_proj", "k_proj", "v_proj")}
    scale = {"q_proj": 3.0, "k_proj": 3.0, "v_proj": 1.0}
    attention = {name: {"kernel": scale[name] * through + little[name]} for name in little}
    attention["o_proj"] = {"kernel": jnp.eye(width)}
    params["layer"]["attention"] = attention
    params["fc"] = jax.tree.map(lambda x: 0.15 * x, params["fc"])
    params["layer"]["mlp"]["down_proj"] = jax.tree.map(lambda x: 0.3 * x, params["layer"]["mlp"]["down_proj"])
    return Draft(shape, params)


def eagle2():
    return Draft(*often_right(target()))


def decoded(drafts, temperature, tree=None, combine=None):
    models = prepare_params(target().params, [one.params for one in drafts])
    setup = DecodeSetup(
        target=target().config, drafts=tuple(one.config for one in drafts), num_draft_tokens=3 if drafts else 0,
        max_new_tokens=20, tree=tree, combine=combine,
    )  # fmt: skip
    return compiled_decoder(setup)(models, toy_prompts(vocab=258), jnp.float32(temperature))


@pytest.mark.parametrize("temperature, tree, team", [
    (0.0, None, ["three"]), (0.8, TREE, ["three"]), (0.8, TREE, ["three", "two"]), (0.0, TREE, ["three", "other layers"]),
], ids=str)  # fmt: skip
def test_text_is_plain_decodings(temperature, tree, team):
    drafts = {"three": draft(), "two": eagle2(), "other layers": draft((1, 3))}
    plain = decoded([], temperature)
    fast = decoded([drafts[name] for name in team], temperature, tree, Combine("merge") if len(team) > 1 else None)
    np.testing.assert_array_equal(plain.tokens, fast.tokens)
    steps, accepted = np.asarray(fast.stats.accept_counts).sum(), np.asarray(fast.stats.accepted).sum()
    assert 0.2 * steps < accepted < 2.9 * steps, "a draft that is never right, or always, would prove nothing"
    if len(team) > 1:
        assert np.asarray(fast.shares.accepted).sum(0).min() > 0


def test_what_a_draft_reads_matters():
    """Other streams, an earlier state or another head are another draft: none of its parts is left out."""

    def accepted(changed):
        return np.asarray(decoded([Draft(draft().config, changed)], 0.0).stats.accept_counts).tolist()

    params = draft().params
    whole = accepted(params)
    for part in ("fc", "norm", "head"):
        kernel = jax.tree.map(
            lambda x: jnp.roll(x, 1, axis=0) * jnp.linspace(-1, 1, x.shape[0]).reshape(-1, *[1] * (x.ndim - 1)), params[part]
        )
        assert accepted(params | {part: kernel}) != whole, part


PROMPTS = [Prompt(f"p{i}", "even", ("hi" * (i + 1),)) for i in range(3)]


def hidden_of(recorded, layers):
    read = jax.jit(lambda tokens: hidden_states(target().config, target().params, tokens, layers))
    longest = max(len(sample.tokens) for sample in recorded.samples)
    padded = {sample.id: np.pad(sample.tokens, (0, longest - len(sample.tokens))) for sample in recorded.samples}
    return {sample.id: np.asarray(read(padded[sample.id][None]))[0, : len(sample.tokens)] for sample in recorded.samples}


@pytest.mark.slow
def test_replay_counts_are_the_decoders():
    """Chains and trees, with a vocabulary of its own; and an EAGLE-2 draft reads the same hidden states."""
    mesh, options = make_mesh(), dict(temperature=0.0, max_new_tokens=16, batch_size=4, seed=0)
    recorded = record(target(), PROMPTS, mesh, ahead=4, **options)
    three, two = draft(vocabulary=tuple(range(0, 258, 2))), eagle2()
    hidden = hidden_of(recorded, three.config.target_layers)
    for one, trees in ((three, (None, TREE)), (two, (None,))):
        for tree in trees:
            report = evaluate(target(), {"d": one}, PROMPTS, mesh, num_draft_tokens=3, tree=tree, **options)["d"]
            if tree is None:
                judge = make_judge(target(), hidden, recorded, one.config, mesh, num_draft_tokens=3, batch_tokens=256)
                counts = walk(recorded, judge(one.params))
            else:
                setup = DecodeSetup(
                    target=target().config, drafts=(one.config,), num_draft_tokens=3, max_new_tokens=16,
                    stop_tokens=target().stop_tokens, tree=tree,
                )  # fmt: skip
                counts, _ = make_tree_replay(target(), hidden, recorded, setup, mesh)([one.params])
            figures = acceptance_figures(counts, np.ones(len(PROMPTS), bool), seed=0)
            assert figures["tau"] > 1.1
            for name, value in figures.items():
                assert report[name] == value, (one.config.kind, tree, name)


def test_drafts_of_two_kinds_are_not_averaged():
    with pytest.raises(ValueError, match="cannot be combined: kind is eagle3 and eagle"):
        average_drafts({"a": draft(), "b": eagle2()}, [0.5, 0.5])
    averaged = average_drafts({"a": draft(), "b": draft()}, [0.5, 0.5])
    assert averaged.config == draft().config and Team({"a": averaged}).configs[0].kind == "eagle3"


def test_a_layer_that_the_target_does_not_have_is_named():
    with pytest.raises(ValueError, match="layer 9, and the target has 4"):
        DecodeSetup(
            target=target().config, drafts=(dataclasses.replace(draft().config, target_layers=(1, 9)),), num_draft_tokens=1,
            max_new_tokens=1,
        )  # fmt: skip


def test_a_draft_finds_its_own_streams_among_others():
    one, other = draft((1, 3)), draft((0, 3))
    models = prepare_params(target().params, [one.params, other.params])
    hidden = jax.random.normal(jax.random.key(0), (1, 2, 4 * 32))
    parts = jnp.split(hidden, 4, axis=-1)
    together = DecodeSetup(
        target=target().config, drafts=(one.config, other.config), num_draft_tokens=3, max_new_tokens=1, tree=TREE,
        combine=Combine("merge"),
    )  # fmt: skip
    assert together.layers == (0, 1, 3)
    for number, places in ((0, (1, 2, 3)), (1, (0, 2, 3))):
        alone = DecodeSetup(target=target().config, drafts=(together.drafts[number],), num_draft_tokens=1, max_new_tokens=1)
        own = jnp.concatenate([parts[i] for i in places], axis=-1)
        expected = read_states(alone, models._replace(drafts=models.drafts[number : number + 1]), 0, own)
        np.testing.assert_array_equal(read_states(together, models, number, hidden), expected)
