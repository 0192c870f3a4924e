"""EAGLE-3 on the command line: one pass scores and keeps the streams, training reads them, and what does not fit is named."""

import json

import numpy as np
import pytest
from toy import loaded_target, toy_target, write_chats, write_prompts, write_target

from jsfdd.base.files import read_json
from jsfdd.commands.cli import main
from jsfdd.hidden.store import HiddenStore
from jsfdd.scoring.table import read_scores
from jsfdd.weights import huggingface
from jsfdd.weights.draft import load_draft

pytestmark = pytest.mark.slow

SHORT = ["--epochs", "1", "--batch-tokens", "512", "--held-out-share", "0.2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with two targets, chats, prompts, kept hidden states of both kinds, and a trained EAGLE-3 draft."""
    folder = tmp_path_factory.mktemp("eagle3")
    config, params = toy_target(0, vocab_size=258, max_position=1024, num_layers=8)
    write_target(folder / "deep", target=loaded_target()._replace(config=config, params=params))
    write_target(folder / "shallow")
    write_chats(folder / "chats.jsonl", 12)
    write_prompts(folder / "prompts.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind in ("eagle3", "eagle"):
            keeping = ["--keep-hidden", "full", "--held-out-share", "0.2", "--batch-tokens", "512", "--draft-kind", kind]
            assert main(["score", "--target", "deep", "--data", "chats.jsonl", *keeping, "--out", f"kept-{kind}"]) == 0
        assert main([*TRAIN, "--hidden-from", "kept-eagle3/hidden", "--draft-vocab", "0.9", "--out", "draft"]) == 0
    return folder


TRAIN = ["train", "--target", "deep", "--data", "chats.jsonl", *SHORT, "--draft-kind", "eagle3"]
PROBING = ["--probe-prompts", "prompts.jsonl", "--save-every", "1", "--patience", "1"]


def test_what_was_kept_and_trained(place):
    store = HiddenStore.open(place / "kept-eagle3" / "hidden", None)
    assert store.layers == (2, 4, 5) and {store[name].shape[1] for name in store} == {4 * 32}
    draft = load_draft(place / "draft")
    assert draft.config.target_layers == (2, 4, 5) and 5 < len(draft.config.vocabulary) < 258
    three, two = (read_scores(place / f"kept-{kind}" / "scores.parquet") for kind in ("eagle3", "eagle"))
    np.testing.assert_allclose(three["flatness"], two["flatness"], rtol=1e-6)


def test_a_draft_is_evaluated_and_started_from(place, monkeypatch):
    monkeypatch.chdir(place)
    # As long and as deep as a probe's, and so the same programs.
    evaluating = ["--prompts", "prompts.jsonl", "--max-new-tokens", "64", "--num-draft-tokens", "4", "--out", "report"]
    assert main(["evaluate", "--target", "deep", "--draft", "draft", *evaluating]) == 0
    report = read_json(place / "report" / "report.json")
    assert report["same_text_share"] == 1.0 and report["tau"] >= 1
    assert main([*TRAIN, "--init", "draft", *PROBING, "--out", "again"]) == 0
    first, again = load_draft(place / "draft"), load_draft(place / "again")
    assert first.config == again.config
    assert np.abs(first.params["head"]["rows"] - again.params["head"]["rows"]).max() < 0.1
    lines = [json.loads(line) for line in (place / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if "probe" in line]


def test_dry_runs_count_the_streams_disk(place, monkeypatch, capsys):
    monkeypatch.chdir(place)

    def dry(*arguments):
        assert main([*arguments, "--dry-run", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    for command in (["score", "--keep-hidden", "full", "--held-out-share", "0.2"], ["train", *SHORT]):
        common = ["--target", "deep", "--data", "chats.jsonl", "--out", "new"]
        one, three = (dry(*command, *common, "--draft-kind", kind)["hidden_bytes"] for kind in ("eagle", "eagle3"))
        assert three == 4 * one > 0
    disks = []
    for kind in ("eagle", "eagle3"):
        assert main(["plan", "--target", "deep", "--data", "chats.jsonl", "--draft-kind", kind, "--json"]) == 0
        stages = {stage["name"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
        disks.append(stages["hidden states"]["disk"])
        assert stages["train"]["flops"] > 0
    assert disks[1] == 4 * disks[0]


@pytest.mark.parametrize("arguments, words", [
    (["score", "--target", "shallow", "--keep-hidden", "full", "--draft-kind", "eagle3"], ["2 layers, fewer than 7"]),
    (["train", "--target", "shallow", "--draft-kind", "eagle3"], ["2 layers, fewer than 7"]),
    ([*TRAIN, "--hidden-from", "kept-eagle/hidden"], ["no layer's inputs", "2, 4, 5", "--draft-kind eagle3"]),
    ([*TRAIN, "--patience", "2"], ["--patience counts probes", "--probe-prompts"]),
    ([*TRAIN, *PROBING[:-1], "0"], ["--patience: got 0"]),
    ([*TRAIN, "--init", "nothing"], ["nothing"]),
    ([*TRAIN[:-1], "eagle", "--init", "draft"], ["--draft-kind: 'eagle' is asked for", "'eagle3'"]),
    ([*TRAIN, "--init", "draft", "--draft-vocab", "40"], ["--draft-vocab: 40"]),
    ([*TRAIN, "--soft-targets", "means"], ["head learns", "top_k"]),
    ([*TRAIN, "--target", "shallow", "--init", "draft"], ["out of range", "from 0 to 1"]),
], ids=str)  # fmt: skip
def test_what_does_not_fit_is_named_before_weights(place, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(place)
    monkeypatch.setattr(huggingface, "read_params", lambda *_: pytest.fail("read the target's weights"))
    if "--data" not in arguments:
        arguments = [*arguments, "--data", "chats.jsonl"]
    try:
        code = main([*arguments, "--out", "never"])
    except SystemExit as error:  # what a group of options refuses ends with the parser
        code = error.code
    assert code == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error and not (place / "never").exists()
