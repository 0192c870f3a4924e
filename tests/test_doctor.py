"""The doctor finds nothing wrong with a healthy draft, and names every fault that is planted."""

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from alphabet import alphabet_chats, alphabet_target
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy import write_target
from transformers import PreTrainedTokenizerFast

from jsfdd.base.files import read_json
from jsfdd.base.mesh import make_mesh
from jsfdd.commands import export, train
from jsfdd.commands.cli import main
from jsfdd.commands.doctor import DoctorConfig, doctor
from jsfdd.commands.export import ExportConfig
from jsfdd.commands.inputs import identity_of
from jsfdd.commands.options import from_options
from jsfdd.commands.train import TrainConfig
from jsfdd.data import template
from jsfdd.data.batches import Shape, pad_rows
from jsfdd.data.chat import Chat, Message, read_chats
from jsfdd.data.template import tokenize_chats
from jsfdd.decoding import generate
from jsfdd.doctor.check_acceptance import (
    TARGET_ROPE,
    Readings,
    check_agreement,
    check_decoded,
    check_rope,
    check_variants,
    faults_of,
    read_with_draft,
)
from jsfdd.doctor.check_data import check_data, check_tokenizer
from jsfdd.doctor.check_draft import check_architecture, check_record
from jsfdd.doctor.check_hidden import check_data_choices, check_stored, check_target_text
from jsfdd.doctor.examine import examine
from jsfdd.doctor.findings import Diagnosis, Finding, Span, print_diagnosis, supervised_spans
from jsfdd.doctor.reader import Choices, DecodedText, Reader, decode_texts
from jsfdd.models.architecture import Rope
from jsfdd.models.draft import Draft
from jsfdd.models.target import head_logits, hidden_states
from jsfdd.training import train as training
from jsfdd.training.batch import TrainingData
from jsfdd.training.recipe import Recipe
from jsfdd.weights.draft import load_draft
from jsfdd.weights.target import load_target

pytestmark = pytest.mark.slow

ROPE = Rope(1e4, "linear", factor=4.0)
LENGTH = 128  # of the longest conversations; most are shorter
SHORT = dict(num_draft_tokens=2, max_new_tokens=40)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(target directory, chat file, training run) of the alphabet."""
    folder = tmp_path_factory.mktemp("alphabet")
    target = write_target(folder / "target", target=alphabet_target(rope=ROPE))
    data = alphabet_chats(folder / "chats.jsonl")
    config = from_options(
        TrainConfig, target=str(target), data=(data,), out=folder / "run", max_length=LENGTH, batch_tokens=1024, epochs=16,
        learning_rate=3e-3, hidden_noise=0.0, held_out_share=0.1,
    )  # fmt: skip
    train.run(config, train.prepare(config))
    return target, data, folder / "run"


@pytest.fixture(scope="module")
def healthy(inputs):
    """What the checks take, made once: (target, chats, samples, draft config, params, record, texts, reader of them)."""
    directory, data, run = inputs
    target = load_target(str(directory))
    chats = read_chats([data])
    samples, _ = tokenize_chats(chats, target.tokenizer, LENGTH)
    config, params, record = load_draft(run)
    prompts = [(chat.id, template.render_prompt(target.tokenizer, chat.messages[:1])) for chat in chats[:4]]
    texts = decode_texts(target, Draft(config, params), prompts, **SHORT)
    return target, chats, samples, config, params, record, texts, Reader(target, LENGTH)


def _by_name(findings):
    found = {finding.name: finding for finding in findings}
    assert len(found) == len(findings)
    return found


def _severities(findings):
    return {finding.name: finding.severity for finding in findings if finding.severity != "ok"}


# --- The whole ------------------------------------------------------------------------------------------------------


def test_a_healthy_draft_has_no_finding(inputs, tmp_path, capsys):
    directory, data, run = inputs
    arguments = ["doctor", "--target", str(directory), "--data", str(data), "--draft", str(run)]
    assert main([*arguments, "--max-new-tokens", "40", "--out", str(tmp_path)]) == 0
    report = read_json(tmp_path / "doctor.json")
    assert report["worst"] == "ok", [finding for finding in report["findings"] if finding["severity"] != "ok"]
    assert len(report["findings"]) == 26
    assert report["config"]["max_new_tokens"] == 40
    assert all(finding["seen"].endswith(".") and not finding["remedy"] for finding in report["findings"])
    printed = capsys.readouterr().out
    assert "⟦abcdefghij" in printed and "<|im_end|>⟧" in printed and "\x1b" not in printed
    assert all(f"{finding['name']}: {finding['seen']}" in printed for finding in report["findings"])


def test_wrong_input_is_exit_code_2(inputs, tmp_path, capsys):
    directory, data, _ = inputs
    assert main(["doctor", "--target", str(directory), "--data", str(data), "--draft", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_an_exported_draft_with_faults_in_its_config(inputs, tmp_path, capsys):
    """Rope scaling dropped, a short context, another eps and other heads of the same shapes: all named, exit code 1."""
    directory, data, run = inputs
    export.export(ExportConfig(draft=run, out=tmp_path / "draft"))
    settings = json.loads((tmp_path / "draft" / "config.json").read_text())
    settings |= {"rope_scaling": None, "max_position_embeddings": 128, "rms_norm_eps": 1e-6}
    (tmp_path / "draft" / "config.json").write_text(json.dumps(settings))
    config = ["--target", str(directory), "--data", str(data), "--draft", str(tmp_path / "draft")]
    assert main(["doctor", *config, "--max-new-tokens", "40", "--out", str(tmp_path)]) == 1
    found = {finding["name"]: finding for finding in read_json(tmp_path / "doctor.json")["findings"]}
    bad = {name: finding["severity"] for name, finding in found.items() if finding["severity"] in ("warning", "error")}
    assert bad == {"rope": "error", "max-position": "warning", "rms-eps": "warning"}
    assert "linear scaling, factor 4" in found["rope"]["seen"] and "no scaling" in found["rope"]["seen"]
    assert found["training-record"]["severity"] == "note"
    assert "→" in capsys.readouterr().out


def test_a_draft_of_another_target_is_not_run(inputs, tmp_path):
    directory, data, run = inputs
    export.export(ExportConfig(draft=run, out=tmp_path / "draft"))
    other = alphabet_target()
    params = {
        **other.params,
        "embed": {"embedding": jnp.pad(other.params["embed"]["embedding"], ((0, 42), (0, 0)))},
        "head": {"kernel": jnp.pad(other.params["head"]["kernel"], ((0, 0), (0, 42)))},
    }
    other = other._replace(config=dataclasses.replace(other.config, vocab_size=300), params=params)
    target = write_target(tmp_path / "target", target=other)
    diagnosis = doctor(from_options(DoctorConfig, target=str(target), data=(data,), draft=(tmp_path / "draft",)))
    found = _by_name(diagnosis.findings)
    assert found["vocabulary"].severity == "error" and "300" in found["vocabulary"].seen and "258" in found["vocabulary"].seen
    assert found["rope"].severity == "error"
    assert "not examined" in found["decoded-acceptance"].seen and "draft-agreement" not in found


# --- Template, mask, tokenizer --------------------------------------------------------------------------------------


def _data_findings(tokenizer, chats, max_length=512):
    samples, summary = tokenize_chats(chats, tokenizer, max_length)
    return _by_name(check_data(tokenizer, chats, samples, summary, [257]))


@pytest.fixture
def tokenizer(healthy):
    """A copy of the toy tokenizer whose template a test may change."""
    original = healthy[0].tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=original.backend_tokenizer, chat_template=original.chat_template)


def test_a_template_that_prompts_as_it_does_not_write(healthy, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif", "assistant: {% endif")
    found = _data_findings(tokenizer, healthy[1])
    assert _severities(found.values()) == {"template-prefix": "error", "loss-mask": "note"}
    assert "For 40 of 40 answers" in found["template-prefix"].seen


def test_a_template_that_drops_earlier_answers_is_only_a_warning_where_they_are_few(healthy, tokenizer):
    """As reasoning templates do with thoughts: the last answer's prompt has them no more."""
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content if loop.last or message.role == 'user' else message.content.split('@')[-1] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = (Message(role="user", content="q"), Message(role="assistant", content="thought@answer"))
    chats = [*healthy[1][:9], Chat("two", "toy", turns + turns, "file:1")]
    found = _data_findings(tokenizer, chats)
    assert found["template-prefix"].severity == "ok"  # the thought of the first answer is gone from both renderings
    chats = [Chat("open", "toy", turns + turns[:1], "file:1"), *healthy[1][:9]]
    assert _data_findings(tokenizer, chats)["loss-mask"].severity == "ok"


def test_a_template_without_end_of_turn(healthy, tokenizer):
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = _data_findings(tokenizer, healthy[1])
    assert _severities(found.values()) == {"end-of-turn": "warning"}


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_mask(healthy, tokenizer, monkeypatch, shift):
    right = template.assistant_mask
    monkeypatch.setattr(template, "assistant_mask", lambda *arguments: np.roll(right(*arguments), shift))
    found = _data_findings(tokenizer, healthy[1])
    assert found["loss-mask"].severity == "error"
    assert f"in {found['loss-mask'].figures['answers']} of" in found["loss-mask"].seen


def test_an_answer_that_was_cut_short_has_a_right_mask_without_an_end(tokenizer, monkeypatch):
    messages = (Message(role="user", content="a"), Message(role="assistant", content="bcd", truncated=True))
    chats = [Chat("c0", "toy", messages, "file:1")]
    assert _data_findings(tokenizer, chats)["loss-mask"].severity == "ok"
    right = template.assistant_mask
    monkeypatch.setattr(template, "assistant_mask", lambda *arguments: np.roll(right(*arguments), -1))
    assert _data_findings(tokenizer, chats)["loss-mask"].severity == "error"


def test_skipped_conversations_and_prompts_that_are_nearly_all(healthy, tokenizer):
    user = "ab" * 400
    chats = [
        Chat(f"c{i}", "toy", (Message(role="user", content=user), Message(role="assistant", content=answer)), f"file:{i}")
        for i, answer in enumerate(["abc", "abc", "abc", ""])
    ]
    found = _data_findings(tokenizer, chats, max_length=2048)
    assert found["skipped-conversations"].severity == "warning" and found["skipped-conversations"].figures["no_counted"] == 1
    assert found["supervised-share"].severity == "warning" and found["supervised-share"].figures["counted"] == 9


def test_a_class_that_reads_other_tokens(tmp_path, healthy):
    """GPT-2's class, named over a tokenizer that splits digits, rebuilds GPT-2's own splitting without that."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate([*alphabet, "12"])}
    backend = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    ours = PreTrainedTokenizerFast(tokenizer_object=backend)
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert check_tokenizer(tmp_path, ours, healthy[1]).severity == "ok"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    found = check_tokenizer(tmp_path, ours, healthy[1])
    assert found.severity == "error" and "'12'" in found.seen
    assert check_tokenizer(tmp_path / "model.gguf", ours, healthy[1]).severity == "note"


# --- The training's record ------------------------------------------------------------------------------------------


def test_another_template_tokenizer_or_target_than_in_training(inputs, healthy, tmp_path):
    directory, data, _ = inputs
    target, chats, samples, _, _, record, *_ = healthy

    def identity(target, dtype="float32", files=(data,)):
        return identity_of(target, files, LENGTH, dtype)

    def tokenized(target):
        return tokenize_chats(chats, target.tokenizer, LENGTH)[0]

    assert _severities(check_record(record, identity(target), samples)) == {}
    assert _severities(check_record(None, identity(target), samples)) == {"training-record": "note"}

    changed = shutil.copytree(directory, tmp_path / "changed")
    text = (changed / "tokenizer.json").read_text()
    assert '"a": ' in text
    vocabulary = json.loads(text)
    a, b = (vocabulary["model"]["vocab"][letter] for letter in "ab")
    vocabulary["model"]["vocab"] |= {"a": b, "b": a}
    (changed / "tokenizer.json").write_text(json.dumps(vocabulary))
    other = load_target(str(changed))
    found = check_record(record, identity(other), tokenized(other))
    assert _severities(found) == {"training-tokens": "error"}

    other.tokenizer.chat_template = target.tokenizer.chat_template.replace("\n", "  \n")
    settings = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-6}))
    other = load_target(str(changed))._replace(tokenizer=other.tokenizer)
    found = check_record(record, identity(other, "bfloat16"), tokenized(other))
    assert _severities(found) == {
        "training-target": "warning", "training-template": "error", "training-dtype": "note", "training-tokens": "error",
    }  # fmt: skip
    elsewhere = identity(target, files=[directory / "config.json"])
    assert _severities(check_record(record, elsewhere, samples)) == {"training-tokens": "note"}


def test_configs_that_disagree(healthy):
    target, draft = healthy[0].config, healthy[3].decoder
    changes = {
        "vocabulary": dict(vocab_size=99), "hidden-size": dict(hidden_size=40), "heads": dict(num_heads=2, head_dim=16),
        "rms-eps": dict(rms_norm_eps=1e-6), "max-position": dict(max_position=100),
    }  # fmt: skip
    assert _severities(check_architecture(target, draft)) == {}
    for name, change in changes.items():
        assert list(_severities(check_architecture(target, dataclasses.replace(draft, **change)))) == [name]


def test_ropes_are_compared_by_what_they_do(healthy):
    target = healthy[0].config
    renamed = dataclasses.replace(target, rope=dataclasses.replace(ROPE, original_max_position=99))
    assert check_rope(target, renamed, None, []).severity == "ok"
    divisors = dataclasses.replace(target, rope=Rope(1e4, frequency_divisors=(4.0,) * 4))
    assert check_rope(target, divisors, None, []).severity == "ok"
    assert check_rope(target, dataclasses.replace(target, rope=Rope(1e4)), None, []).severity == "error"


def test_the_rope_that_a_draft_was_trained_with_is_told_by_its_agreement(healthy):
    """A config that lost the target's rope is an error; a draft that does better with its own was trained so."""
    target, texts = healthy[0].config, [DecodedText("a", np.zeros(203, np.int32), 1, [2], [True])]
    draft = dataclasses.replace(target, rope=Rope(1e4))

    def choices(right):
        gap = np.ones(201)
        gap[:right] = 0.0
        return [Choices(gap, gap, gap, gap)]

    for given, other, severity, words in (
        (20, 120, "error", "it was trained with the target's"),
        (120, 20, "note", "rope of its own"),
        (120, 118, "error", "too little difference"),
    ):
        found = check_rope(target, draft, Readings(choices(given), {TARGET_ROPE: choices(other)}), texts)
        assert found.severity == severity and words in found.seen


# --- Reading whole --------------------------------------------------------------------------------------------------


def test_choices_are_those_of_the_whole_logits(healthy):
    target, _, samples, *_, reader = healthy
    tokens = samples[0].tokens
    logits = np.asarray(head_logits(target.config, target.params, hidden_states(target.config, target.params, tokens[None])))[0]
    choices = reader.choices(reader.read(tokens).hidden, tokens)
    assert len(choices.token) == len(tokens) - 1
    for t in range(len(tokens) - 1):
        order, scale = np.sort(logits[t].astype(np.float64)), np.abs(logits[t]).max()
        assert choices.token[t] == np.argmax(logits[t])
        assert choices.lead[t] == pytest.approx((order[-1] - order[-2]) / scale, abs=1e-5)
        assert choices.gap[t] == pytest.approx((order[-1] - logits[t, tokens[t + 1]]) / scale, abs=1e-5)
        assert choices.probability[t] == pytest.approx(1 / np.exp(order - order[-1]).sum(), rel=1e-4)


def test_decoded_steps_cover_the_answer(healthy):
    """Step for step: a step's first guess is at the place where the step's tokens begin, and an accepted one is the text."""
    _, _, _, config, params, _, texts, reader = healthy
    for text in texts:
        assert text.step_tokens[0] == text.prompt_length + 1 and np.all(np.diff(text.step_tokens) > 0)
        assert np.diff([*text.step_tokens, len(text.tokens)]).max() <= SHORT["num_draft_tokens"] + 1
        # A rejected first guess ends its step with one token.
        lengths = np.diff([*text.step_tokens, len(text.tokens)])
        assert np.all(lengths[~np.array(text.step_accepted)] == 1)


# --- Hidden states --------------------------------------------------------------------------------------------------


def test_stored_hidden_states_and_what_they_are_instead(healthy):
    target, _, samples, *_, reader = healthy
    samples = samples[:3]
    whole = {sample.id: reader.read(sample.tokens) for sample in samples}
    earlier = {sample.id: reader.read(sample.tokens, depth=1) for sample in samples}
    length = {sample.id: len(sample.tokens) for sample in samples}

    def check(rows):
        return check_stored(reader, samples, {name: np.asarray(rows(name))[: length[name]] for name in length})

    assert check(lambda name: whole[name].hidden.astype(jnp.bfloat16)).severity == "ok"
    for rows, words in (
        (lambda name: whole[name].stream, "before the target's final norm"),
        (lambda name: jnp.roll(whole[name].hidden, -1, axis=0), "position late"),
        (lambda name: jnp.roll(whole[name].hidden, 1, axis=0), "position early"),
        (lambda name: earlier[name].stream, "layer before the last, before"),
        (lambda name: earlier[name].hidden, "layer before the last, with"),
        (lambda name: -whole[name].hidden, "other weights"),
    ):
        found = check(rows)
        assert found.severity == "error" and words in found.seen
    found = check_stored(reader, samples, {sample.id: whole[sample.id].hidden[:5] for sample in samples})
    assert found.severity == "error" and "another number" in found.seen
    assert check_stored(reader, samples, {}).severity == "note"


def test_a_tokenizer_of_another_model_makes_data_that_the_target_does_not_know(healthy):
    _, _, samples, *_, reader = healthy
    assert check_data_choices(reader, samples[:3]).severity == "ok"
    other_ids = np.random.default_rng(0).permutation(258).astype(np.int32)
    other = [dataclasses.replace(sample, tokens=other_ids[sample.tokens]) for sample in samples[:3]]
    found = check_data_choices(reader, other)
    assert found.severity == "warning" and found.figures["agreement"] < 0.5 * found.figures["expected"]


# --- Acceptance -----------------------------------------------------------------------------------------------------


def _variants(healthy, kernel):
    """Findings on a draft with another fc kernel, over the same texts: they are the target's own."""
    _, _, _, config, params, _, texts, reader = healthy
    readings = read_with_draft(reader, Draft(config, {**params, "fc": {"kernel": jnp.asarray(kernel)}}), texts)
    return _by_name(
        [check_agreement(readings, texts), *check_variants(faults_of(reader.target.config, config), readings, texts)]
    )


def test_swapped_fc_inputs(healthy):
    kernel = healthy[4]["fc"]["kernel"]
    found = _variants(healthy, jnp.roll(kernel, 32, axis=0))
    assert found["fc-halves"].severity == "error" and "fc inputs are swapped" in found["fc-halves"].seen
    assert {found[name].severity for name in ("final-norm", "pairing")} <= {"ok", "note"}


def test_a_draft_trained_before_the_final_norm(healthy):
    """The stream is the hidden state over the norm's scale, but for a factor near 1: fc takes the scale in."""
    kernel, scale = healthy[4]["fc"]["kernel"], healthy[0].params["norm"]["scale"]
    found = _variants(healthy, jnp.concatenate([kernel[:32], kernel[32:] * scale[:, None]]))
    assert found["final-norm"].severity == "error" and "before the target's final norm" in found["final-norm"].seen
    assert {found[name].severity for name in ("fc-halves", "pairing")} <= {"ok", "note"}


def test_a_draft_trained_on_pairs_off_by_one(healthy):
    """A linear map takes every letter's embedding to the next one's, so fc can be made to expect the letter before."""
    target, kernel = healthy[0], healthy[4]["fc"]["kernel"]
    letters = np.asarray(target.params["embed"]["embedding"])[target.tokenizer.encode("abcdefghijklmnopqrstuvwxyz ")]
    to_next, *_ = np.linalg.lstsq(letters, np.roll(letters, -1, axis=0), rcond=None)
    found = _variants(healthy, jnp.concatenate([to_next.astype(np.float32) @ kernel[:32], kernel[32:]]))
    assert found["pairing"].severity == "error" and "off by one" in found["pairing"].seen
    assert {found[name].severity for name in ("fc-halves", "final-norm")} <= {"ok", "note"}


def test_a_useless_draft_is_called_so_without_a_false_cause(healthy):
    noise = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    found = _variants(healthy, noise)
    assert found.pop("draft-agreement").severity == "warning"
    assert {finding.severity for finding in found.values()} == {"note"}


LAYERS = (1, 2)


@pytest.fixture(scope="module")
def healthy_eagle3(tmp_path_factory):
    """(draft, texts, reader) of an EAGLE-3 draft that names every letter, on a target whose layers do more."""
    folder = tmp_path_factory.mktemp("eagle3")
    target = alphabet_target(num_layers=4)
    chats = read_chats([alphabet_chats(folder / "chats.jsonl")])
    samples, _ = tokenize_chats(chats, target.tokenizer, LENGTH)
    read = jax.jit(hidden_states, static_argnums=(0, 3))
    tokens = pad_rows([sample.tokens for sample in samples], Shape(len(samples), LENGTH))
    states = np.asarray(read(target.config, target.params, tokens, LAYERS))
    hidden = {sample.id: row[: len(sample.tokens)] for sample, row in zip(samples, states)}
    recipe = Recipe(draft_kind="eagle3", target_layers=LAYERS, draft_steps=1, epochs=16, learning_rate=3e-3)
    data, held_out = TrainingData(samples, hidden), TrainingData([], hidden)
    draft = training.train(target, data, held_out, recipe, make_mesh(1), out=folder / "run", progress=False).draft
    prompts = [(chat.id, template.render_prompt(target.tokenizer, chat.messages[:1])) for chat in chats[:4]]
    return draft, decode_texts(target, draft, prompts, **SHORT), Reader(target, LENGTH)


def _eagle3_findings(draft, texts, reader):
    readings = read_with_draft(reader, draft, texts)
    faults = faults_of(reader.target.config, draft.config)
    return readings, _by_name([check_agreement(readings, texts), *check_variants(faults, readings, texts)])


def test_a_healthy_eagle3_draft_has_no_finding(healthy_eagle3):
    draft, texts, reader = healthy_eagle3
    readings, found = _eagle3_findings(*healthy_eagle3)
    assert found["draft-agreement"].severity == "ok" and found["draft-agreement"].figures["agreement"] > 0.9
    assert {finding.severity for finding in found.values()} <= {"ok", "note"} and found["pairing"].severity == "ok"
    decoded = check_decoded(reader, readings, texts, reader.target.tokenizer)
    assert decoded.severity == "ok" and decoded.figures["decoded"] > 0.9


@pytest.mark.parametrize("name, served, says", [
    ("stream-order", (2, 1), "exchange the parts of fc.weight's input"),
    ("stream-layers-up", (0, 1), "layers 0, 1: write 1, 2"),
    ("stream-layers-down", (2, 3), "layers 2, 3: write 1, 2"),
])  # fmt: skip
def test_an_eagle3_draft_on_other_streams(healthy_eagle3, name, served, says):
    """fc also reads directions that its own streams hardly have and the streams that are served have a lot of."""
    draft, texts, reader = healthy_eagle3
    right, wrong = (
        np.concatenate(
            [reader.read(text.tokens, entered=(0, 1, 2, 3)).states(layers)[: len(text.tokens), :-32] for text in texts]
        )
        for layers in (LAYERS, served)
    )
    _, directions = scipy.linalg.eigh(wrong.T @ wrong, right.T @ right + 1e-4 * np.eye(64))
    noise = directions[:, -4:] @ np.random.default_rng(0).standard_normal((4, 32))
    kernel = np.asarray(draft.params["fc"]["kernel"])
    kernel = kernel + noise * (3 * np.std(right @ kernel) / np.std(wrong @ noise))
    if name == "stream-order":  # a draft's layers ascend, so that the file has fc's parts the other way round
        kernel, served = np.roll(kernel, 32, axis=0), LAYERS
    params = {**draft.params, "fc": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    config = dataclasses.replace(draft.config, target_layers=served)
    _, found = _eagle3_findings(Draft(config, params), texts, reader)
    planted = found.pop(name)
    assert planted.severity == "error" and says in planted.remedy
    assert "error" not in {finding.severity for finding in found.values()}


def test_the_decoders_verdicts_are_those_of_reading_whole(healthy, monkeypatch):
    """And not where the decoder shows the draft each hidden state with the wrong token, or emits another token."""
    target, chats, _, config, params, _, texts, reader = healthy
    readings = read_with_draft(reader, Draft(config, params), texts)
    found = check_decoded(reader, readings, texts, target.tokenizer)
    assert found.severity == "ok" and found.figures["steps"] > 40
    assert found.figures["decoded"] == found.figures["teacher_forced"] > 0.9
    assert check_target_text(reader, texts, target.tokenizer).severity == "ok"

    prompts = [(text.id, text.tokens[: text.prompt_length].tolist()) for text in texts]
    observe = generate.observe

    def observe_other_tokens(setup, params, state, hidden, following, count, **whole):
        return observe(setup, params, state, hidden, jnp.roll(following, 1, axis=1), count, **whole)

    # A stream is compiled once for a setup, so each of these has to be made anew.
    generate.make_stream.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(generate, "observe", observe_other_tokens)
        wrong = decode_texts(target, Draft(config, params), prompts, **SHORT)
    assert check_target_text(reader, wrong, target.tokenizer).severity == "ok"
    found = check_decoded(reader, read_with_draft(reader, Draft(config, params), wrong), wrong, target.tokenizer)
    assert found.severity == "error" and found.figures["prompt"] == texts[0].id
    assert found.figures["position"] == texts[0].prompt_length + 1

    verify = generate.verify
    generate.make_stream.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(generate, "verify", lambda *a: verify(*a)._replace(next_token=verify(*a).next_token + 1))
        wrong = decode_texts(target, Draft(config, params), prompts, **SHORT)
    generate.make_stream.cache_clear()
    found = check_target_text(reader, wrong, target.tokenizer)
    assert found.severity == "error" and found.figures["prompt"] == texts[0].id


def test_without_a_draft_target_and_data_alone_are_examined(healthy, inputs):
    target, chats, samples, *_ = healthy
    _, summary = tokenize_chats(chats, target.tokenizer, LENGTH)
    diagnosis = examine(target, inputs[0], chats, samples, summary, {}, None, None, conversations=2, **SHORT)
    assert diagnosis.worst == "ok" and len(diagnosis.findings) == 9


# --- What a person sees ---------------------------------------------------------------------------------------------


def _printed(**console):
    spans = (Span("<user>\x1b[31m", False), Span("answer\n", True))
    findings = (Finding("one", "ok", "Fine."), Finding("two", "error", "Not fine.", "mend it"))
    stream = io.StringIO()
    print_diagnosis(Diagnosis(findings, "s", spans), Console(file=stream, highlight=False, **console))
    return stream.getvalue()


def test_colour_where_there_is_a_terminal_and_brackets_elsewhere(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = _printed()
    assert "⟦answer\n⟧" in plain and "\x1b" not in plain
    assert "error    two: Not fine.\n         → mend it\n" in plain and plain.endswith("1 error, 1 ok\n")
    coloured = _printed(force_terminal=True, color_system="standard")
    assert "⟦" not in coloured and "\x1b[30;42manswer" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦answer\n⟧" in _printed(force_terminal=True)


def test_spans_are_the_masks_runs_and_long_samples_are_cut(healthy):
    target, _, samples, *_ = healthy
    sample = samples[0]
    spans = supervised_spans(sample, target.tokenizer)
    assert "".join(span.text for span in spans) == target.tokenizer.decode(sample.tokens)
    assert [span.supervised for span in spans] == [False, True, False]
    long = dataclasses.replace(sample, tokens=np.tile(sample.tokens, 9), assistant_mask=np.tile(sample.assistant_mask, 9))
    assert f"({9 * len(sample.tokens) - 240} more tokens)" in supervised_spans(long, target.tokenizer)[-1].text
