"""Every stage on a toy target in seconds: the whole loop, run twice, stage by stage, and from Python."""

import dataclasses
import fcntl
import json
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from toy import toy_tokenizer, write_chats, write_prompts, write_target

from jsfdd.base.files import read_json, write_json
from jsfdd.commands import evaluate, export, run, score, select, train
from jsfdd.commands import inputs as inputs_module
from jsfdd.commands.evaluate import EvaluateConfig
from jsfdd.commands.export import ExportConfig
from jsfdd.commands.options import flat, from_options, options_of
from jsfdd.commands.run import RunConfig
from jsfdd.commands.score import ScoreConfig
from jsfdd.commands.select import SelectConfig
from jsfdd.commands.train import TrainConfig
from jsfdd.data.chat import read_chats
from jsfdd.data.held_out import split_held_out
from jsfdd.data.template import tokenize_chats
from jsfdd.hidden import capture
from jsfdd.scoring.table import read_scores
from jsfdd.selection.sfdd import read_selection, write_selection
from jsfdd.training.journal import METRICS, read_lines
from jsfdd.weights import huggingface
from jsfdd.weights.draft import load_draft

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return str(write_target(folder / "target")), write_chats(folder / "chats.jsonl"), write_prompts(folder / "prompts.jsonl")


def _run_config(inputs, out, **changes):
    target, data, prompts = inputs
    values = dict(
        target=target, data=(data,), prompts=(prompts,), out=out, max_length=128, batch_tokens=512, epochs=2,
        held_out_share=0.2, max_new_tokens=8, num_draft_tokens=2, batch_size=4,
    )  # fmt: skip
    return from_options(RunConfig, **(values | changes))


def _replaced(config, **options):
    """The config with some options changed."""
    return from_options(type(config), **(flat(config) | options))


def _train(config):
    """`jsfdd train`; returns what its room does."""
    prepared = train.prepare(config)
    return train.train(config, inputs_module.load(config, prepared.inputs), prepared.kept, prepared.held_out)


def _described(command, config):
    """The outcome of a dry run."""
    return command.describe(config, command.prepare(config))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    config = _run_config(inputs, tmp_path_factory.mktemp("run") / "out")
    return config, run.run_stages(config)


def test_the_summary_tells_what_the_artifacts_hold(finished):
    config, summary = finished
    assert [row["arm"] for row in summary["arms"]] == ["full", "flatness", "random"]
    table = read_scores(config.out / "scores.parquet")
    assert len(table.ids) == 24 == summary["data"]["kept"]
    [counts] = summary["data"]["files"]
    assert (counts["file"], counts["read"], counts["kept"], counts["duplicates"]) == (str(config.chats.data[0]), 24, 24, 0)
    samples, _ = tokenize_chats(read_chats(config.chats.data), toy_tokenizer(), 128)
    held_out = {sample.id for sample in split_held_out(samples, config.recipe.held_out_share)[1]}
    assert 0 < len(held_out) < 12
    for row in summary["arms"]:
        arm = config.out / "arms" / row["arm"]
        kept = read_selection(arm / "selection.json").ids
        assert len(kept) == (24 if row["arm"] == "full" else 12)
        # The table counts what was trained on: the selection without what is held out.
        trained = set(kept) - held_out
        assert row["samples"] == len(trained)
        assert row["counted_tokens"] == sum(n for i, n in zip(table.ids, table.num_tokens) if i in trained)
        assert row["tau"] == read_json(arm / "report.json")["tau"] >= 1
        assert read_json(arm / "report.json")["same_text_share"] == 1.0
        draft = load_draft(arm / "draft").config
        assert draft.decoder.hidden_size == 32
        card = (arm / "draft" / "README.md").read_text()
        assert f"τ = {row['tau']:.3f}" in card and f"{len(kept)} conversations" in card and "samples" in card
    assert {(d["a"], d["b"]) for d in summary["differences"]} == {
        ("flatness", "full"),
        ("random", "full"),
        ("random", "flatness"),
    }
    costs = {row["arm"]: row["cost_seconds"] for row in summary["arms"]}
    assert costs["random"]["pass"] < costs["full"]["pass"] == costs["flatness"]["pass"] <= summary["seconds"]["score"] + 0.1
    assert costs["random"]["soft_targets"] < costs["full"]["soft_targets"] == summary["seconds"]["soft_targets"]
    for row in summary["arms"]:
        assert row["cost_seconds"]["total"] == pytest.approx(sum(list(row["cost_seconds"].values())[:-1]))
        assert 0 < row["train_seconds"] == row["cost_seconds"]["training"]
    (group,) = read_json(config.out / "groups.json")
    assert (group["name"], group["size"], group["arm"]) == ("all", 24, "flatness")
    assert group["kept"] == {"full": 24, "flatness": 12, "random": 12} and sum(group["sources"].values()) == 24
    shown = [group[side] for side in ("kept_examples", "dropped_examples")]
    flatness = [example["flatness"] for examples in shown for example in examples]
    assert len(flatness) == 4 and flatness == sorted(flatness, reverse=True)
    assert all(example["prompt"] and example["answer"] for examples in shown for example in examples)
    page = (config.out / "report.html").read_text()
    assert "flatness" in page and "<script>" not in page


def test_the_dry_run_foretells_the_run(finished, tmp_path):
    config, summary = finished
    plan = _described(run, _replaced(config, out=tmp_path / "out")).values
    full = plan["arms"]["full"]
    ran = summary["arms"][0]
    assert (full["samples"], full["steps"], full["tokens"]) == (ran["samples"], ran["steps"], ran["tokens"])
    assert plan["scoring"]["padding_share"] == summary["data"]["padding_share"]
    assert plan["scoring"]["counted_tokens"] == summary["data"]["counted_tokens"]
    stored = sum(path.stat().st_size for path in (config.out / "hidden").glob("*") if path.name != "manifest.json")
    assert plan["hidden_bytes"] == stored
    assert not (tmp_path / "out").exists()


def test_results_are_words_and_json(finished, monkeypatch):
    config, summary = finished
    result = run.run(config, run.prepare(config))  # finished: nothing is computed
    values = json.loads(json.dumps(result.values, default=str))
    assert values["arms"] == summary["arms"] and values["report"] == str(config.out / "report.html")
    assert all(arm in result.words for arm in config.arms) and "τ of flatness minus full" in result.words
    arm = config.out / "arms" / "full"
    evaluated = from_options(EvaluateConfig, target="t", prompts=config.prompts, draft=(arm,), out=arm)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: {"full": read_json(arm / "report.json")})
    result = evaluate.run(evaluated, None)
    figures = json.loads(json.dumps(result.values, default=str))["drafts"]["full"]
    assert figures["tau"] == summary["arms"][0]["tau"] and len(figures["alpha"]) == 2
    assert "prompts" not in figures and "examples" not in figures
    assert f"{figures['tau']:.3f}" in result.words and result.words.endswith(str(arm))


def test_a_flavour_that_cannot_hold_the_drafts_is_refused_before_training(inputs, tmp_path):
    config = _run_config(inputs, tmp_path / "out", fc_bias=True)
    with pytest.raises(ValueError, match="--flavour vllm cannot represent this draft: fc_bias"):
        run.run_stages(config)
    assert not (config.out / "scores.parquet").exists() and not (config.out / "arms").exists()


def test_export_finds_or_takes_what_its_card_tells(finished, tmp_path):
    config, _ = finished
    arm, other = config.out / "arms" / "flatness", config.out / "arms" / "full"
    shared = dict(flavour="speculators", export_dtype="bfloat16", num_draft_tokens=7)
    export.export(from_options(ExportConfig, draft=arm / "checkpoints", out=tmp_path / "a", **shared))
    settings = read_json(tmp_path / "a" / "config.json")
    assert settings["torch_dtype"] == "bfloat16"
    assert settings["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 7
    # The report says for which target; an option is stronger.
    assert settings["speculators_config"]["verifier"] == {
        "name_or_path": config.model.target,
        "architectures": ["LlamaForCausalLM"],
    }
    named = from_options(
        ExportConfig, draft=arm, out=tmp_path / "b", report=(other / "report.json",), target="org/toy", **shared
    )
    export.export(named)
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"τ = {read_json(other / 'report.json')['tau']:.3f}" in card and "org/toy" in card and "12 conversations" in card
    # From an exported directory: nothing is known but what is named.
    export.export(from_options(ExportConfig, draft=tmp_path / "b", out=tmp_path / "c", selection=arm / "selection.json"))
    card = (tmp_path / "c" / "README.md").read_text()
    assert "Not measured yet" in card and "Not known" in card and "12 conversations" in card


@pytest.mark.parametrize("name, edit, message", [
    ("report", {"tau": None}, None),
    ("report", {"alpha": ...}, "no field alpha"),
    ("selection", {"inputs": {"scores": {"target": "another"}}}, "target: found 'another'"),
])  # fmt: skip
def test_cards_are_not_made_from_other_runs(finished, tmp_path, name, edit, message):
    config, _ = finished
    arm = config.out / "arms" / "flatness"
    values = read_json(arm / f"{name}.json") | edit
    (tmp_path / "file.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    given = (tmp_path / "file.json",) if name == "report" else tmp_path / "file.json"
    config = from_options(ExportConfig, draft=arm, out=tmp_path / "draft", **{name: given})
    if message is None:
        export.export(config)
        return
    with pytest.raises(ValueError, match=message):
        export.export(config)
    assert not (tmp_path / "draft").exists()


def test_flatness_arm_keeps_the_flattest(finished):
    config, _ = finished
    table = read_scores(config.out / "scores.parquet")
    flatness = dict(zip(table.ids, table["flatness"]))
    kept = set(read_selection(config.out / "arms" / "flatness" / "selection.json").ids)
    assert min(flatness[i] for i in kept) >= max(flatness[i] for i in flatness if i not in kept)


def test_a_second_run_computes_nothing(finished, monkeypatch, capsys):
    config, summary = finished
    monkeypatch.setattr(inputs_module, "load", lambda *_: pytest.fail("loaded the target again"))
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*") if path.is_file()}
    assert run.run_stages(config) == summary
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*") if path.is_file()} == before
    assert "finished before" in capsys.readouterr().err


def test_a_mixture_is_of_what_was_selected_and_is_recorded(finished, tmp_path):
    """From hidden states that were stored for all; another mixture in the same directory is refused by name."""
    of_run, _ = finished
    selected = of_run.out / "arms" / "flatness" / "selection.json"
    shared = {name: value for name, value in flat(of_run).items() if name in options_of(TrainConfig)}
    changes = dict(selection=selected, hidden_from=of_run.out / "hidden", epochs=1, mix=("a=2", "b=1"), mix_total=3)
    config = from_options(TrainConfig, **(shared | changes | {"out": tmp_path}))
    samples, _ = tokenize_chats(read_chats(config.chats.data), toy_tokenizer(), 128)
    kept, held_out = train.training_sides(samples, read_selection(selected), config.recipe, config.mixture, config.seed)
    assert {sample.id for sample in kept} <= set(read_selection(selected).ids) - {sample.id for sample in held_out}
    assert sorted(sample.source for sample in kept) == ["a", "a", "b"] and held_out

    result = _train(config)
    assert result.samples == 3 and not (tmp_path / "hidden").exists()
    recorded = load_draft(tmp_path).record["mix"]
    assert recorded["shares"] == {"a": 2 / 3, "b": 1 / 3} and recorded["total"] == 3
    assert {source: found["samples"] for source, found in recorded["contents"].items()} == {"a": 2, "b": 1}
    assert _train(_replaced(config, mix=("b=0.5", "a=1"))).seconds == result.seconds, "the same mixture"
    for changes, named in (
        ({"mix": ("a=1", "b=1")}, "mix.shares.a: found 0.666"),
        ({"mix_total": 2}, "mix.total: found 3, expected 2"),
        ({"mix": (), "mix_total": None}, "mix: found {"),
    ):
        with pytest.raises(ValueError, match="other inputs or options") as error:
            _train(_replaced(config, **changes))
        assert named in str(error.value)


def test_an_interrupted_run_continues_to_the_same_result(inputs, finished, tmp_path, monkeypatch):
    """Stopped after scoring, after the first arm and before the summary, it ends with the same drafts."""
    config = _run_config(inputs, tmp_path / "out")
    for module, stop in ((select, "select"), (run, "_evaluate_arms"), (export, "export"), (run, "summarise")):
        with monkeypatch.context() as patch:
            patch.setattr(module, stop, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run.run_stages(config)
    again = run.run_stages(config)
    whole = finished[1]
    for row, other in zip(again["arms"], whole["arms"]):
        for name in ("arm", "samples", "steps", "tau", "held_out"):
            assert row[name] == other[name]
    for arm in config.arms:
        params = load_draft(config.out / "arms" / arm / "draft").params
        expected = load_draft(finished[0].out / "arms" / arm / "draft").params
        assert np.array_equal(params["fc"]["kernel"], expected["fc"]["kernel"])


def test_changed_options_or_inputs_are_refused_by_name(inputs, finished):
    config, _ = finished
    with pytest.raises(ValueError, match="config.epochs: found 2, expected 3.*choose another --out"):
        run.run_stages(_run_config(inputs, config.out, epochs=3))
    with inputs[1].open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="chats.jsonl: found"):
        run.run_stages(config)


def test_other_options_are_refused_before_the_weights_are_read(inputs, tmp_path, monkeypatch):
    """By dry runs too, which otherwise would say that the real one continues."""
    monkeypatch.setattr(huggingface, "read_params", read := Mock(wraps=huggingface.read_params))
    shared = dict(target=inputs[0], max_length=128)
    score_config = from_options(ScoreConfig, **shared, data=(inputs[1],), batch_tokens=512, out=tmp_path / "scored")
    score.score(score_config)
    train_config = from_options(TrainConfig, **shared, data=(inputs[1],), epochs=1, batch_tokens=512, out=tmp_path / "draft")
    _train(train_config)
    evaluation = dict(prompts=(inputs[2],), draft=(tmp_path / "draft",), max_new_tokens=8, num_draft_tokens=2, batch_size=4)
    evaluate_config = from_options(EvaluateConfig, target=inputs[0], **evaluation, out=tmp_path / "draft")
    evaluate.evaluate(evaluate_config)
    read.reset_mock()
    for command, config, changed, message in (
        (score, score_config, dict(batch_tokens=256), "scores of another run .batch_tokens: found 512, expected 256"),
        (score, score_config, dict(per_token=True), "scores of another run .per_token"),
        (train, train_config, dict(epochs=2), "other inputs or options .options.epochs: found 1, expected 2"),
        (train, train_config, dict(hidden_dtype="float32"), "other inputs or options .hidden_dtype"),
        (evaluate, evaluate_config, dict(max_new_tokens=5), r"report.json: a report of other options .max_new_tokens: found 8"),
    ):
        assert "continue in" in _described(command, config).words or command is evaluate
        with pytest.raises(ValueError, match=f"{message}.*choose another --out"):
            command.prepare(_replaced(config, **changed))
    for out, held in ((tmp_path / "draft", "checkpoints"), (tmp_path / "scored", "scores.parts")):
        with pytest.raises(ValueError, match=f"holds the {held} of another command"):
            run.prepare(_run_config(inputs, out))
    read.assert_not_called()


def test_a_new_file_in_a_directory_of_data_is_noticed(inputs, tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    write_chats(folder / "a.jsonl", 4)
    config = _run_config((inputs[0], folder, inputs[2]), tmp_path / "out")
    claim = run.check_claim(config)
    assert not config.out.exists() and str(folder / "a.jsonl") in claim["inputs"]
    config.out.mkdir()
    write_json(config.out / "run.json", claim)
    assert run.check_claim(config) == claim
    write_chats(folder / "b.jsonl", 2)
    with pytest.raises(ValueError, match=r"inputs\..*b\.jsonl: found None, expected .*choose another --out"):
        run.check_claim(config)


def test_stage_by_stage(inputs, tmp_path):
    """The README's ten lines; hidden states are stored for the kept and the held-out samples alone."""
    target, data, prompts = inputs
    shared = dict(target=target, data=(data,), max_length=128, batch_tokens=512)
    score.score(from_options(ScoreConfig, **shared, out=tmp_path))
    chosen = select.select(from_options(SelectConfig, scores=tmp_path / "scores.parquet", retain_ratio=0.25, out=tmp_path))
    result = _train(
        from_options(
            TrainConfig, **shared, selection=tmp_path / "selection.json", epochs=1, held_out_share=0.1, out=tmp_path / "draft"
        )
    )
    assert len(chosen.ids) == 6 and result.samples <= 6
    stored = {
        name for shard in read_json(tmp_path / "draft" / "hidden" / "manifest.json")["shards"] for name, _ in shard["samples"]
    }
    assert set(chosen.ids) <= stored and len(stored) < 14
    export.export(from_options(ExportConfig, draft=tmp_path / "draft", out=tmp_path / "exported"))
    config = from_options(
        EvaluateConfig,
        target=target,
        draft=(tmp_path / "exported",),
        prompts=(prompts,),
        out=tmp_path / "eval",
        max_new_tokens=8,
        num_draft_tokens=2,
        batch_size=4,
    )
    report = evaluate.evaluate(config)["exported"]
    assert report == {k: v for k, v in read_json(tmp_path / "eval" / "report.json").items() if k != "config"}


def test_a_probe_decodes_while_training_and_its_best_draft_is_the_runs(inputs, tmp_path):
    """A probe's τ is what `evaluate` says of the same draft, prompts and length, and the draft kept is that of the best."""
    target, data, prompts = inputs
    shared = dict(target=target, data=(data,), max_length=128, batch_tokens=512, held_out_share=0.0)
    config = from_options(TrainConfig, **shared, epochs=4, out=tmp_path / "draft", probe_prompts=(prompts,), save_every=3)
    steps = _train(config).steps
    probes = {line["step"]: line["probe"] for line in read_lines(config.out / METRICS) if "probe" in line}
    assert set(probes) == {*range(3, steps, 3), steps} and all(figures["tau"] >= 1 for figures in probes.values())
    best = max(figures["tau"] for figures in probes.values())
    first_best = min(step for step, figures in probes.items() if figures["tau"] == best)
    assert [path.name for path in (config.out / "best").iterdir()] == [str(first_best)]
    measured = from_options(
        EvaluateConfig,
        target=target,
        draft=(config.out,),
        prompts=(prompts,),
        out=tmp_path / "eval",
        max_new_tokens=64,
        num_draft_tokens=4,
    )
    report = evaluate.evaluate(measured)["draft"]
    assert (report["tau"], report["n_steps"]) == (best, probes[first_best]["n_steps"])
    assert report["alpha"] == probes[first_best]["alpha"]
    with pytest.raises(ValueError, match="probe.every|save_every"):
        _train(_replaced(config, save_every=4))


def _stored_in(directory):
    return {name for shard in read_json(directory / "manifest.json")["shards"] for name, _ in shard["samples"]} - {None}


def test_one_pass_scores_and_keeps_hidden_states_and_training_reads_them(inputs, tmp_path):
    """`--keep-hidden` and `train --hidden-from DIR`: the same draft as from hidden states that training computes itself."""
    target, data, _ = inputs
    shared = dict(target=target, data=(data,), max_length=128, batch_tokens=512, held_out_share=0.1)
    kept = from_options(ScoreConfig, **shared, out=tmp_path, keep_hidden=("flatness", "random"), retain_ratio=0.25)
    score.score(kept)
    hidden = tmp_path / "hidden"
    manifest = read_json(hidden / "manifest.json")
    rule = {"keep_hidden": ["flatness", "random"], "retain_ratio": 0.25, "within": "all", "seed": 0, "held_out_share": 0.1}
    assert manifest["kept_for"] == rule and {"target", "tokenizer", "tokens"} <= manifest["identity"].keys()

    def chosen(metric, **changes):
        options = dict(scores=tmp_path / "scores.parquet", metric=metric, retain_ratio=0.25, out=tmp_path / metric) | changes
        return set(select.select(from_options(SelectConfig, **options)).ids)

    samples, _ = tokenize_chats(read_chats((data,)), toy_tokenizer(), 128)
    held_out = {sample.id for sample in split_held_out(samples, 0.1)[1]}
    assert _stored_in(hidden) == chosen("flatness") | chosen("random") | held_out
    assert len(_stored_in(hidden)) < len(samples)

    def trained(name, **changes):
        options = dict(selection=tmp_path / "flatness" / "selection.json", epochs=1, out=tmp_path / name, hidden_from=hidden)
        return from_options(TrainConfig, **(shared | options | changes))

    read = _train(trained("read"))
    assert not (tmp_path / "read" / "hidden").exists()
    computed = _train(trained("computed", hidden_from=None))
    for a, b in zip(jax.tree.leaves(read.state.params), jax.tree.leaves(computed.state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # other batches, so hidden states that round otherwise

    chosen("entropy", retain_ratio=0.75)
    wrong = tmp_path / "entropy" / "selection.json"
    message = (
        r"hidden: lacks \d+ of \d+ samples.*Wanted: --metric entropy --retain-ratio 0.75 .*; kept for: --keep-hidden flatness "
        r"random --retain-ratio 0.25.*leave --hidden-from out"
    )
    with pytest.raises(ValueError, match=message):
        _train(trained("wrong", selection=wrong))
    with pytest.raises(ValueError, match="lacks .* --held-out-share 0.3; kept for: .* --held-out-share 0.1"):
        _train(trained("wrong", held_out_share=0.3))
    with pytest.raises(ValueError, match="holds bfloat16; give --hidden-dtype bfloat16"):
        _train(trained("wrong", hidden_dtype="int8"))
    with pytest.raises(FileNotFoundError, match="--hidden-from none: no such directory"):
        _train(trained("wrong", hidden_from=Path("none")))
    loose = tmp_path / "loose.json"  # of unknown inputs
    write_selection(loose, dataclasses.replace(read_selection(tmp_path / "flatness" / "selection.json"), inputs={}))
    with pytest.raises(ValueError, match="hidden states of another run .*identity.max_length"):
        _train(trained("wrong", max_length=64, selection=loose))
    with pytest.raises(ValueError, match=r"selection.json: made from other inputs.*the chats \(in max_length\) changed"):
        _train(trained("wrong", max_length=64))
    with pytest.raises(ValueError, match="kept_for.retain_ratio: found 0.25, expected 0.5"):
        score.score(_replaced(kept, retain_ratio=0.5))
    assert not (tmp_path / "wrong" / "checkpoints").exists()
    plan = _described(train, trained("read"))
    assert plan.values["hidden_bytes"] == 0 and f"read hidden states from {hidden}" in plan.words
    with pytest.raises(ValueError, match="lacks"):
        train.prepare(trained("wrong", selection=wrong))
    plan = _described(score, _replaced(kept, out=tmp_path / "other"))
    assert "keep about" in plan.words and f"{tmp_path / 'other' / 'hidden'}/" in plan.values["would_write"]
    assert plan.values["hidden_bytes"] > 0


@pytest.mark.parametrize("changes, stored", [
    (dict(arms=("flatness", "random"), within="source", hidden_dtype="int8"), "in one pass"),
    (dict(arms=("flatness",), no_hidden_store=True), "none"),
    (
        dict(
            arms=("flatness", "random"), within="cluster", draft_vocab=200, flavour="none", soft_targets="top_k", soft_top_k=8,
            token_loss="total_variation",
        ),
        "clusters",
    ),
])  # fmt: skip
def test_a_run_stores_what_its_arms_train_on_and_no_more(inputs, tmp_path, monkeypatch, changes, stored):
    config = _run_config(inputs, tmp_path / "out", **changes)
    second_passes, original = [], capture.store_hidden
    monkeypatch.setattr(capture, "store_hidden", lambda *a, **b: second_passes.append(1) or original(*a, **b))
    planned = _described(run, config).values["hidden_bytes"]
    summary = run.run_stages(config)
    assert [row["arm"] for row in summary["arms"]] == list(config.arms) and all(row["tau"] >= 1 for row in summary["arms"])
    assert not second_passes
    assert (config.out / "soft_targets").exists() == (stored != "none")
    assert (planned > 0) == (config.out / "hidden").exists() == (stored != "none")
    if stored == "none":
        return
    samples, _ = tokenize_chats(read_chats(config.chats.data), toy_tokenizer(), 128)
    held_out = {sample.id for sample in split_held_out(samples, config.recipe.held_out_share)[1]}
    kept = [read_selection(config.out / "arms" / arm / "selection.json").ids for arm in config.arms]
    drafts = [load_draft(config.out / "arms" / arm).config for arm in config.arms]
    assert all(draft == drafts[0] for draft in drafts), "arms share a vocabulary, and so their programs"
    exported = [(config.out / "arms" / arm / "draft").exists() for arm in config.arms]
    assert exported == [config.export.flavour != "none"] * len(config.arms)
    assert _stored_in(config.out / "hidden") >= held_out.union(*kept)
    if stored == "in one pass":  # which clusters there are is known only when all prompts are
        assert _stored_in(config.out / "hidden") == held_out.union(*kept) != {sample.id for sample in samples}


def test_a_selection_of_other_data_is_refused(inputs, tmp_path):
    target, data, _ = inputs
    shared = dict(target=target, data=(data,), max_length=128, batch_tokens=512)
    score.score(from_options(ScoreConfig, **shared, out=tmp_path))
    select.select(from_options(SelectConfig, scores=tmp_path / "scores.parquet", out=tmp_path))
    other = write_chats(tmp_path / "other.jsonl", count=4)
    with pytest.raises(ValueError, match="the data lacks .* of the samples"):
        _train(
            from_options(
                TrainConfig, **(shared | {"data": (other,)}), selection=tmp_path / "selection.json", out=tmp_path / "draft"
            )
        )


def test_no_stage_writes_where_another_process_does(inputs, tmp_path):
    target, data, _ = inputs
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        common = dict(target=target, data=(data,), out=tmp_path, max_length=128, batch_tokens=512)
        for call in (
            lambda: score.score(from_options(ScoreConfig, **common)),
            lambda: _train(from_options(TrainConfig, **common)),
            lambda: run.run_stages(_run_config(inputs, tmp_path)),
        ):
            with pytest.raises(ValueError, match="another process is writing here"):
                call()
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
