"""Hidden states that another program wrote: scores and drafts as from our own pass, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy import damped_target, loaded_target, write_target

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import Sample
from jsfdd.commands import score
from jsfdd.commands import train as commands_train
from jsfdd.commands.inputs import load
from jsfdd.commands.options import from_options
from jsfdd.commands.score import ScoreConfig
from jsfdd.commands.stores import hidden_states_of
from jsfdd.commands.train import TrainConfig
from jsfdd.hidden.capture import store_hidden
from jsfdd.hidden.imported import ImportedStates, check_head, find_states, needed
from jsfdd.models.attention import causal_view
from jsfdd.models.target import final_norm, head_logits, residual_stream
from jsfdd.scoring.metrics import column_names
from jsfdd.scoring.score import score_samples
from jsfdd.training.batch import TrainingData
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.recipe import Recipe
from jsfdd.training.train import train
from jsfdd.weights.target import load_target

LAYERS = (0, 1)
PROMPT, ANSWER, LENGTH = 6, 12, 20


@pytest.fixture(scope="module")
def target():
    target = loaded_target()
    uneven = jnp.linspace(0.2, 2.0, target.config.hidden_size)  # so that a second norm changes something
    return target._replace(params=target.params | {"norm": {"scale": uneven * target.params["norm"]["scale"]}})


@jax.jit
def streams_of(params, tokens):
    """The streams that enter LAYERS, and that after the last layer: [B, T, n, D]."""
    config = loaded_target().config
    last, entered, _ = residual_stream(config, params, tokens, causal_view(*tokens.shape), None, LAYERS)
    return jnp.stack([*entered, last], axis=2)


@pytest.fixture(scope="module")
def answers(target):
    """Samples of a prompt, the target's greedy answer, and two tokens of the template; and their streams."""
    config, params = target.config, target.params
    rng = np.random.default_rng(3)
    tokens = np.zeros((8, LENGTH), np.int32)
    tokens[:, :PROMPT] = rng.integers(0, 256, (8, PROMPT))
    for place in range(PROMPT, PROMPT + ANSWER):
        final = final_norm(config, params, streams_of(params, tokens)[:, place - 1, -1])
        tokens[:, place] = np.argmax(head_logits(config, params, final), axis=-1)
    tokens[:, PROMPT + ANSWER :] = 10, 11
    mask = np.zeros(LENGTH, bool)
    mask[PROMPT : PROMPT + ANSWER] = True
    samples = [Sample(f"s{i}", "ab"[i % 2], row, mask) for i, row in enumerate(tokens)]
    return samples, np.asarray(streams_of(params, tokens))


def write_states(directory, samples, streams, length=PROMPT + ANSWER - 1):
    """As vLLM writes what it read while it answered: all but the last token."""
    directory.mkdir(exist_ok=True)
    for i, sample in enumerate(samples):
        states = np.ascontiguousarray(streams[i, :length])
        tensors = {"hidden_states": states, "token_ids": sample.tokens[:length].astype(np.int64)}
        save_file(tensors, directory / f"{7 - i}-{i:04x}.safetensors")
        (directory / f"{7 - i}-{i:04x}.safetensors.lock").touch()
    return directory


def imported(target, directory, samples, **options):
    found = find_states(directory, samples, target.config, longest=LENGTH)
    return ImportedStates(found, target.config, np.asarray(target.params["norm"]["scale"]), **options)


def without_layers(target):
    return target._replace(params={name: part for name, part in target.params.items() if name != "layers"})


@pytest.mark.slow
def test_scores_and_drafts_are_those_of_our_own_pass(target, answers, tmp_path):
    samples, streams = answers
    mesh, quiet = make_mesh(), {"progress": False}
    for kind, layers in (("eagle", ()), ("eagle3", LAYERS)):
        directory = write_states(tmp_path / kind, samples, streams if layers else streams[:, :, -1:])
        states = imported(target, directory, samples, layers=layers)
        own = store_hidden(target, samples, mesh, directory=tmp_path / f"own-{kind}", dtype="float32", layers=layers, **quiet)
        for sample in samples:
            read = needed(sample)
            np.testing.assert_allclose(states[sample.id][:read], own[sample.id][:read], atol=2e-5)
            assert not states[sample.id][read:].any()  # the server never computed them, and nothing that counts reads them
        outer = without_layers(target)
        ours = score_samples(target, samples, mesh, **quiet)
        theirs = score_samples(outer, samples, mesh, hidden=states, **quiet)
        for name in column_names():
            np.testing.assert_allclose(theirs[name], ours[name], rtol=2e-4, err_msg=name)
        np.testing.assert_allclose(theirs.prompt_states, ours.prompt_states, atol=1e-5)
        if layers:
            continue  # a draft of each kind would take two compilations; the states are what differs
        recipe = Recipe(epochs=1, draft_kind=kind, target_layers=layers, held_out_share=0.0, soft_targets="none")
        drafts = []
        for number, (of, hidden) in enumerate(((target, own), (outer, states))):
            draft = draft_of(target.config, recipe, samples)
            data, none = TrainingData(samples, hidden), TrainingData([], hidden)
            out = tmp_path / f"{kind}-{number}"
            drafts.append(train(of, data, none, recipe, mesh, out=out, draft=draft, identity={}, **quiet).draft.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *drafts)


def test_the_head_fits_its_own_states(target, answers, tmp_path):
    samples, streams = answers
    fit = check_head(without_layers(target), imported(target, write_states(tmp_path / "s", samples, streams), samples), samples)
    assert fit.top1 == 1.0 and fit.tokens >= 60


def test_without_a_token_after_two_of_an_answer_the_head_is_not_tried(target, answers, tmp_path):
    samples, streams = answers
    last_two = np.arange(LENGTH) >= LENGTH - 2
    short = [dataclasses.replace(sample, assistant_mask=last_two) for sample in samples]
    found = imported(target, write_states(tmp_path / "s", short, streams, LENGTH - 1), short)
    with pytest.raises(ValueError, match=f"{tmp_path}.*: no sample has a token after two"):
        check_head(without_layers(target), found, short)


def test_other_states_are_named(target, answers, tmp_path):
    samples, streams = answers
    scale = np.asarray(target.params["norm"]["scale"])
    final = np.asarray(final_norm(target.config, target.params, streams[:, :, -1]))
    wrong = {
        "state -2 from the end": streams[:, :, [0, 2, 1]],
        "no norm is applied": final[:, :, None],
        "the token after it": np.roll(streams, -1, axis=1),
        "the token before it": np.roll(streams, 1, axis=1),
        "another model": np.random.default_rng(0).normal(size=streams.shape).astype(np.float32) * 3 * scale,
    }
    for number, (words, states) in enumerate(wrong.items()):
        found = imported(target, write_states(tmp_path / str(number), samples, states), samples)
        with pytest.raises(ValueError, match=words):
            check_head(without_layers(target), found, samples)


def rewritten(directory, file, **changes):
    path = directory / file
    save_file(load_file(path) | changes, path)
    return directory


def test_files_that_do_not_belong(target, answers, tmp_path):
    samples, streams = answers
    found = lambda directory, of=samples: find_states(directory, of, target.config, longest=LENGTH)  # noqa: E731

    def refused(words, directory, kind=ValueError, of=samples):
        with pytest.raises(kind, match=words):
            found(directory, of)

    refused("no such directory", tmp_path / "none", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused("no .safetensors file", tmp_path / "empty", FileNotFoundError)
    make = lambda name, **options: write_states(tmp_path / name, samples, streams, **options)  # noqa: E731
    assert found(make("good")).unused == 0
    refused("has its prompt alone.*include_output_tokens", make("prompts", length=PROMPT), FileNotFoundError)
    refused("ends after 16 tokens, of which 17", make("short", length=PROMPT + ANSWER - 2), FileNotFoundError)
    other = dataclasses.replace(samples[2], id="other", tokens=np.where(np.arange(LENGTH) == 4, 99, samples[2].tokens))
    refused(
        f"sample other.*has token {samples[2].tokens[4]} at 4 and the sample 99", make("tokens"), FileNotFoundError, [other]
    )
    first = "0-0007.safetensors"
    narrow = np.zeros((3, 1, 16), np.float32)
    refused("another model", rewritten(make("width"), first, hidden_states=narrow))
    refused("token_ids are int64", rewritten(make("count"), first, token_ids=np.zeros(3, np.int64)))
    refused("have type I32", rewritten(make("dtype"), first, hidden_states=streams[0].astype(np.int32)))
    refused(
        "1 states a token, and 1-0006.safetensors has 3",
        rewritten(make("mixed"), first, hidden_states=np.ascontiguousarray(streams[7, :17, :1])),
    )
    cut = make("cut") / first
    cut.write_bytes(cut.read_bytes()[:-40])
    refused("not a whole safetensors file", cut.parent)
    save_file({"token_ids": np.zeros(2, np.int64)}, make("lacks") / first)
    refused("no tensor hidden_states", tmp_path / "lacks")
    refused("token_ids have type F32", rewritten(make("floats"), first, token_ids=np.zeros(17, np.float32)))
    (make("link") / "x.safetensors").symlink_to("nowhere")
    refused("x.safetensors: not there, or a link to nothing", tmp_path / "link", FileNotFoundError)
    (make("directory") / "x.safetensors").mkdir()
    refused("x.safetensors: .* no plain file", tmp_path / "directory", FileNotFoundError)
    broken = rewritten(make("nan"), first, hidden_states=np.full_like(streams[7, :17], np.nan))
    with pytest.raises(ValueError, match="not finite"):
        imported(target, broken, samples)["s7"]
    large = rewritten(make("large"), first, hidden_states=np.full_like(streams[7, :17], 1e30))  # its squares are no float32
    with pytest.raises(ValueError, match="beyond 1e.15"):
        imported(target, large, samples)["s7"]
    with pytest.raises(ValueError, match="layers 0 1 2, in this order"):
        imported(target, write_states(tmp_path / "one", samples, streams[:, :, -1:]), samples, layers=LAYERS)


def test_of_a_target_only_its_ends_are_read(tmp_path):
    """A mixture of experts, quantised, its layers' file missing."""
    write_target(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = load_file(tmp_path / "model.safetensors")
    ends = {name: tensor for name, tensor in whole.items() if ".layers." not in name}
    own = load_target(str(tmp_path))
    assert load_target(str(tmp_path), layers=False).fingerprint == own.fingerprint
    (tmp_path / "model.safetensors").unlink()
    save_file(ends, tmp_path / "model-2.safetensors")
    weight_map = {name: f"model-{2 if name in ends else 1}.safetensors" for name in whole}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]}}
    for changes in (
        {},
        {"quantization_config": {"quant_method": "fp8"}},
        {"model_type": "olmoe", "num_experts": 4, **rope},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        outer = load_target(str(tmp_path), layers=False)
        assert set(outer.params) == {"embed", "norm", "head"}
        np.testing.assert_array_equal(outer.params["head"]["kernel"], own.params["head"]["kernel"])
        assert dataclasses.replace(outer.config, family="llama") == own.config
    (tmp_path / "config.json").write_text(json.dumps(config | changes | {"logit_scale": 0.5}))
    with pytest.raises(ValueError, match="logit_scale"):
        load_target(str(tmp_path), layers=False)


@pytest.mark.slow
def test_commands_read_no_layers(tmp_path, capsys):
    target = damped_target()  # its likeliest next token is the last one
    target = target._replace(params=target.params | {"head": {"kernel": 0.2 * target.params["embed"]["embedding"].T}})
    directory = str(write_target(tmp_path / "target", target=target))
    with (tmp_path / "chats.jsonl").open("w") as file:
        for i, letter in enumerate("abcdef"):
            messages = [{"role": "user", "content": letter * 3}, {"role": "assistant", "content": letter * (9 + i)}]
            file.write(json.dumps({"id": letter, "messages": messages}) + "\n")
    shared = {"target": directory, "data": (tmp_path / "chats.jsonl",)}
    own = score.score(from_options(ScoreConfig, **shared, out=tmp_path / "own"))
    inputs = score.prepare(from_options(ScoreConfig, **shared, out=tmp_path / "own"))
    states = tmp_path / "states"
    states.mkdir()
    for sample in inputs.samples:
        length = needed(sample)
        streams = np.asarray(streams_of(target.params, sample.tokens[None]))[0, :length]
        save_file(
            {"hidden_states": streams, "token_ids": sample.tokens[:length].astype(np.int64)},
            states / f"{sample.id}.safetensors",
        )
    whole = load_file(tmp_path / "target/model.safetensors")
    save_file({name: x for name, x in whole.items() if ".layers." not in name}, tmp_path / "target/model.safetensors")
    config = from_options(ScoreConfig, **shared, out=tmp_path / "theirs", hidden_from=states)
    prepared = score.prepare(config)
    assert "of the target no layers" in score.describe(config, prepared).words
    theirs = score.score(config)
    for name in column_names():
        np.testing.assert_allclose(theirs[name], own[name], rtol=2e-4, err_msg=name)
    assert "head(norm(h))" in capsys.readouterr().err
    # Other states in the same directory: scores of the old ones are not taken for theirs.
    path = states / "a.safetensors"
    changed = load_file(path)
    save_file(changed | {"hidden_states": 1.1 * changed["hidden_states"]}, path)
    with pytest.raises(ValueError, match="scores of another run .*hidden_from"):
        score.prepare(config)
    with pytest.raises(ValueError, match="leave --keep-hidden out"):
        from_options(ScoreConfig, **shared, out=tmp_path / "x", hidden_from=states, keep_hidden=("full",))
    config = from_options(TrainConfig, **shared, out=tmp_path / "draft", hidden_from=states, hidden_dtype="bfloat16")
    prepared = commands_train.prepare(config)
    assert f"read hidden states from {states}" in commands_train.describe(config, prepared).words
    read = hidden_states_of(config, load(config, prepared.inputs), prepared.kept)
    assert read["b"].dtype == "bfloat16" and read["b"].shape == (
        len(prepared.inputs.samples[1].tokens),
        target.config.hidden_size,
    )
    for changes, words in (
        ({"hidden_dtype": "int8"}, "bfloat16 or float32"),
        ({"probe_prompts": (tmp_path / "chats.jsonl",)}, "probe"),
    ):
        with pytest.raises(ValueError, match=words):
            commands_train.prepare(from_options(TrainConfig, **shared, out=tmp_path / "draft", hidden_from=states, **changes))
