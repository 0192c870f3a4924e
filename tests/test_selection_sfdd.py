"""What is kept: the right end of each metric, the right number, reproducibly."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import numpy as np
import pytest

from jsfdd.base.files import read_json
from jsfdd.base.records import Sample
from jsfdd.commands.select import SelectConfig
from jsfdd.scoring.metrics import METRICS, column_names
from jsfdd.scoring.table import ScoreTable, join
from jsfdd.selection.sfdd import Selection, check_inputs, read_selection, select, selected_samples, write_selection


def make_table(ids, num_tokens=None, sources=None, **columns):
    number = len(ids)
    values = {name: np.asarray(columns.get(name, np.linspace(0.1, 0.9, number)), np.float64) for name in column_names()}
    counts = np.full(number, 5, np.int32) if num_tokens is None else np.asarray(num_tokens, np.int32)
    return ScoreTable(tuple(ids), tuple(sources or ("x",) * number), counts, values, identity={"target": "toy"})


UNCERTAIN, CERTAIN = [0.25] * 4, [0.97, 0.01, 0.01, 0.01]


@pytest.mark.parametrize("metric", column_names())
def test_every_metric_keeps_the_sample_of_which_the_target_is_uncertain(metric):
    def of(p):
        p = np.array(p)
        return {
            "flatness": p.sum() / np.sqrt(4 * (p**2).sum()), "flatness_median": p.sum() / np.sqrt(4 * (p**2).sum()),
            "entropy": -(p * np.log(p)).sum(), "top1": np.sort(p)[-1], "margin": np.sort(p)[-1] - np.sort(p)[-2],
            # Logits of the same mean: the certain one's stand higher.
            "energy": -np.log(np.exp(np.log(p) - np.log(p).mean()).sum()), "ppl": 1 / p[0],
        }  # fmt: skip

    pair = [of(CERTAIN)[metric], of(UNCERTAIN)[metric]]
    assert select(make_table(["certain", "uncertain"], **{metric: pair}), 0.5, metric=metric).ids == ("uncertain",)


def test_the_metrics_are_those_of_the_options():
    assert typing.get_args(typing.get_type_hints(SelectConfig)["metric"]) == tuple(METRICS)


@pytest.mark.parametrize(
    "number, ratio, kept", [(10, 0.5, 5), (5, 0.5, 3), (3, 0.5, 2), (10, 0.01, 1), (7, 1.0, 7), (10, 0.34, 3)]
)
def test_number_kept_is_the_rounded_share_and_at_least_one(number, ratio, kept):
    table = make_table([f"s{i}" for i in range(number)])
    assert select(table, ratio).ids == tuple(f"s{i}" for i in range(number - kept, number))


def test_kept_samples_stay_in_the_order_of_the_data_and_the_threshold_is_the_last_ones():
    table = make_table(["d", "a", "c", "b"], flatness=[0.4, 0.1, 0.3, 0.2])
    selection = select(table, 0.75)
    assert selection.ids == ("d", "c", "b") and selection.thresholds == {"all": 0.2}
    assert select(make_table(["d", "a"], top1=[0.4, 0.1]), 0.5, metric="top1").thresholds == {"all": 0.1}


def test_ties_go_to_the_smaller_id_whatever_the_order_of_the_data():
    for ids in (["b", "a", "d", "c"], ["c", "d", "a", "b"]):
        for metric in ("flatness", "top1"):
            assert set(select(make_table(ids, **{metric: [0.5] * 4}), 0.5, metric=metric).ids) == {"a", "b"}


def test_samples_without_a_counted_token_are_dropped_reported_and_not_part_of_the_share():
    table = make_table(["a", "b", "c", "d", "e"], [3, 0, 3, 0, 3], flatness=[0.1, np.nan, 0.3, np.nan, 0.2])
    selection = select(table, 0.5)
    assert selection.ids == ("c", "e") and selection.dropped == ("b", "d")
    with pytest.raises(ValueError, match="no sample has a token that counts"):
        select(make_table(["a"], [0]))
    with pytest.raises(ValueError, match="flatness of these samples is not a number: 'a'"):
        select(make_table(["a", "b"], flatness=[np.nan, 0.2]))


def test_random_depends_on_seed_and_ids_alone():
    ids = [f"s{i}" for i in range(400)]
    first = select(make_table(ids), 0.5, metric="random", seed=1)
    assert set(select(make_table(ids[::-1], flatness=np.arange(400)), 0.5, metric="random", seed=1).ids) == set(first.ids)
    other = select(make_table(ids), 0.5, metric="random", seed=2)
    assert 70 < len(set(first.ids) & set(other.ids)) < 130  # 100 expected, deviation 5
    # A sample's rank does not depend on the others: a smaller share is a part of a larger one.
    assert set(select(make_table(ids), 0.25, metric="random", seed=1).ids) < set(first.ids)


def test_within_sources_each_keeps_its_share_and_its_own_threshold():
    sources = ["maths", "chat", "maths", "chat", "maths", "chat", "code"]
    table = make_table("abcdefg", sources=sources, flatness=[0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.0])
    assert select(table, 0.5).ids == ("b", "c", "d", "f")  # all of the chats, and little else
    selection = select(table, 0.5, within="source")
    # Half of seven is four: at least one of each, and the largest remainder's goes to the first name.
    assert selection.ids == ("b", "c", "f", "g") and selection.sizes == {"chat": 3, "code": 1, "maths": 3}
    assert selection.thresholds == {"chat": 0.8, "code": 0.0, "maths": 0.3}
    # By any metric, it is what every source alone would keep where their shares need no rounding.
    for metric in ("top1", "random", "entropy"):
        alone = [join([table], [i for i, s in zip("abcdefg", sources) if s == source]) for source in set(sources)]
        kept = {i for part in alone for i in select(part, 0.4, metric=metric).ids}
        assert set(select(table, 0.4, metric=metric, within="source").ids) == kept


def test_bad_options_are_named():
    table = make_table(["a", "b"])
    for options, message in [
        ({"metric": "flat"}, "metric 'flat' is unknown; choose from flatness"),
        ({"metric": "flatness", "retain_ratio": 0.0}, "retain_ratio is 0.0"),
        ({"metric": "flatness", "retain_ratio": float("nan")}, "retain_ratio is nan"),
        ({"metric": "flatness", "within": "length"}, "within 'length' is unknown; choose from all, source, cluster"),
    ]:
        with pytest.raises(ValueError, match=message):
            select(table, **options)


def test_selection_comes_back_from_its_file(tmp_path):
    selection = select(make_table(["ä", "b", "c"], [3, 0, 2]), 0.7, metric="entropy", seed=3)
    write_selection(tmp_path / "selection.json", selection)
    found = read_selection(tmp_path / "selection.json")
    assert found == selection and isinstance(found, Selection)
    assert found.inputs["scores"] == {"target": "toy"}
    assert [path.name for path in tmp_path.iterdir()] == ["selection.json"]


def test_scores_hash_sees_every_score():
    table = make_table(["a", "b"])
    digests = {select(table).inputs["scores_sha256"]}
    for name in column_names():
        changed = dataclasses.replace(table, metrics=table.metrics | {name: np.nextafter(table[name], 1)})
        digests.add(select(changed, metric="random").inputs["scores_sha256"])
    assert len(digests) == 1 + len(column_names())


@pytest.mark.parametrize("change, message", [
    ({"metric": "flat"}, "metric 'flat' is unknown"),
    ({"ids": ["a", "a"]}, "an id occurs twice"),
    ({"ids": ["a", "b"], "dropped": ["b"]}, "an id occurs twice"),
    ({"ids": []}, "no id is kept"),
    ({"ids": [1, 2]}, "ids.*is 1: Expected `str`"),
    ({"ids": "abc"}, "ids is 'abc': Expected `array`"),
    ({"retain_ratio": 2.0}, "retain_ratio is 2.0"),
    ({"seed": True}, "seed is True: Expected `int`"),
    ({"within": "length"}, "within is 'length'"),
    ({"more": 1}, "unknown: more"),
])  # fmt: skip
def test_a_bad_selection_file_is_named(tmp_path, change, message):
    path = tmp_path / "selection.json"
    write_selection(path, select(make_table(["a", "b"])))
    path.write_text(json.dumps(read_json(path) | change))
    with pytest.raises(ValueError, match=rf"selection\.json: {message}.*jsfdd select"):
        read_selection(path)


def test_a_cut_or_missing_selection_file_is_named(tmp_path):
    path = tmp_path / "selection.json"
    with pytest.raises(FileNotFoundError, match="selection.json: no such file"):
        read_selection(path)
    write_selection(path, select(make_table(["a", "b"])))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="selection.json: damaged JSON.*jsfdd select"):
        read_selection(path)


def test_selected_samples_are_those_of_the_data():
    samples = [Sample(name, "x", np.arange(3), np.ones(3, bool)) for name in "abcd"]
    selection = select(make_table(list("abcd"), flatness=[0.4, 0.1, 0.3, 0.2]), 0.5)
    assert [sample.id for sample in selected_samples(selection, samples)] == ["a", "c"]
    with pytest.raises(ValueError, match="lacks 1 of the samples.*'c'"):
        selected_samples(selection, samples[:2] + samples[3:])


@pytest.mark.parametrize("change, message", [
    ({"target": "u"}, "the target's weights changed"),
    ({"tokenizer": "u"}, "the target's tokenizer changed"),
    ({"tokens": "u", "data": ["e"]}, r"the chats \(in data\) changed"),
    ({"tokens": "u", "max_length": 9}, r"the chats \(in max_length\) changed"),
    ({"tokens": "u"}, r"the chats \(by the chat template or the ids\) changed"),
    ({"target": "u", "tokens": "u"}, "the target's weights, the chats changed"),
])  # fmt: skip
def test_a_selection_of_other_inputs_is_refused_by_what_changed(change, message):
    scored = {"target": "t", "tokenizer": "t", "tokens": "t", "data": ["d"], "max_length": 8, "dtype": "float32"}
    selection = dataclasses.replace(select(make_table(["a", "b"])), inputs={"scores": scored | {"samples": "s"}})
    path = Path("selection.json")
    check_inputs(selection, scored, path)
    check_inputs(selection, scored | {"dtype": "bfloat16", "data": ["renamed"]}, path)  # the same tokens all the same
    check_inputs(selection, {"tokens": "t"}, path)
    with pytest.raises(ValueError, match=f"selection.json: made from other inputs.*{message}.*score and select again"):
        check_inputs(selection, scored | change, path)
