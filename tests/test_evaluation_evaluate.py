"""What a report says is what was decoded."""

import dataclasses

import jax
import numpy as np
import pytest
from toy import loaded_target, toy_config, toy_draft

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import Prompt
from jsfdd.decoding.generate import make_generate, make_stream, prepare_params
from jsfdd.decoding.prompts import prompt_batch
from jsfdd.decoding.settings import Cutoff, TreeShape, decode_setup
from jsfdd.decoding.stream import stream
from jsfdd.evaluation import evaluate as evaluate_module
from jsfdd.evaluation.evaluate import compare, evaluate
from jsfdd.evaluation.intervals import interval, resample_ratios, tau_difference
from jsfdd.evaluation.replay import record
from jsfdd.evaluation.step_cost import memory_ratio, step_cost_words
from jsfdd.models.draft import Draft, draft_config
from jsfdd.report.table import describe_difference

pytestmark = pytest.mark.slow

# Long enough that second turns are in the same bucket of widths, and so in the same programs.
PROMPTS = [Prompt(f"p{i}", "even" if i % 2 == 0 else "odd", ("hi" * (i + 23),)) for i in range(5)]
PROMPTS.append(Prompt("two", "odd", ("hi" * 23, "ho")))
OPTIONS = dict(temperature=0.0, num_draft_tokens=2, max_new_tokens=12, batch_size=4, seed=0)


@pytest.fixture(scope="module")
def reports():
    target = loaded_target()
    draft, params = toy_draft(target.config)
    other = jax.tree.map(lambda x: x * 0.5, params)
    return evaluate(target, {"a": Draft(draft, params), "b": Draft(draft, other)}, PROMPTS, make_mesh(data=2), **OPTIONS)


def test_counts_agree(reports):
    for report in reports.values():
        steps = sum(report["accept_counts"])
        emitted = sum(count * (i + 1) for i, count in enumerate(report["accept_counts"]))
        assert report["n_steps"] == steps == sum(p["steps"] for p in report["prompts"])
        assert emitted == sum(p["emitted"] for p in report["prompts"])
        assert report["tau"] == pytest.approx(emitted / steps) and report["l"] == pytest.approx(report["tau"] - 1)
        macro = np.mean([p["emitted"] / p["steps"] for p in report["prompts"] if p["steps"]])
        assert report["tau_macro"] == pytest.approx(macro)
        accepted = np.array(report["accept_counts"])
        assert report["alpha"][0] == pytest.approx(accepted[1:].sum() / steps, abs=0.05)  # stop tokens apart
        assert report["tau_low"] <= report["tau"] <= report["tau_high"]


def test_greedy_text_is_the_baselines(reports):
    """Toy logits are far apart; two equal texts a prompt is what lossless means."""
    assert all(report["same_text_share"] == 1.0 for report in reports.values())


def test_every_prompt_and_source_is_there(reports):
    report = reports["a"]
    assert [p["id"] for p in report["prompts"]] == [p.id for p in PROMPTS]
    assert {source: row["n_prompts"] for source, row in report["per_source"].items()} == {"even": 3, "odd": 3}
    # Two turns make about twice the steps of one: both were decoded.
    steps = [p["steps"] for p in report["prompts"]]
    assert steps[-1] > 1.2 * np.mean(steps[:-1])
    assert report["tokens_per_second"] > 0 and report["compile_seconds"] > 0


def test_sources_add_up_to_the_whole(reports):
    for report in reports.values():
        parts = list(report["per_source"].values())
        assert report["n_steps"] == sum(part["n_steps"] for part in parts)
        assert report["accept_counts"] == np.sum([part["accept_counts"] for part in parts], axis=0).tolist()
        for part in parts:
            steps = sum(part["accept_counts"])
            emitted = sum(count * (i + 1) for i, count in enumerate(part["accept_counts"]))
            assert part["tau"] == pytest.approx(emitted / steps) and part["l"] == pytest.approx(part["tau"] - 1)
            assert part["tau_macro_low"] <= part["tau_macro"] <= part["tau_macro_high"]
            assert len(part["alpha"]) == 2 and all(a is None or 0 <= a <= 1 for a in part["alpha"])
            assert part["speedup"] == pytest.approx(part["tokens_per_second"] / part["baseline_tokens_per_second"])
        rates = [part["tokens_per_second"] for part in parts]
        assert min(rates) <= report["tokens_per_second"] <= max(rates)


def test_examples_tell_who_wrote_them_and_a_step_its_cost(reports):
    """One example of each source, whose pieces make its text; and the ratio of τ to speedup."""
    for report in reports.values():
        examples = report["examples"]
        assert [example["source"] for example in examples] == list(dict.fromkeys(prompt.source for prompt in PROMPTS))
        for example in examples:
            assert "".join(text for text, _ in example["pieces"]) == example["text"]
        assert report["cost_ratio"] == pytest.approx(report["tau"] / report["speedup"])
        assert report["memory_cost_ratio"] > 1


def test_what_a_draft_proposed_is_marked_in_its_place():
    """Beside the stream, which says of every step how many of its tokens were proposed."""
    target = loaded_target()
    draft, params = toy_draft(target.config)
    setup = decode_setup(target, [draft], max_new_tokens=12, num_draft_tokens=2, tree=TreeShape(2, 20, 60))
    batch = prompt_batch([[1, 5, 9], [3, 4]], [0, 1], 2, seed=0)
    arranged = prepare_params(target.params, [params])
    out = make_generate(setup, make_mesh(data=1))(arranged, batch, 0.0)
    marks = [[], []]
    for emitted in stream(make_stream(setup), arranged, batch, 0.0):
        for row in range(2):
            marks[row] += [i < emitted.accepted[row] for i in range(emitted.count[row])]
    for row in range(2):
        length = int(out.lengths[row])
        assert out.drafted[row, :length].tolist() == marks[row][:length]
    assert out.drafted.any()


def test_a_device_that_waits_for_memory_reads_these_weights():
    """Written out for a toy: 2 layers of 4 · 8 · 8 + 3 · 8 · 16 entries and a head of 100 · 8; a draft with a head of 10."""
    target = toy_config(
        num_layers=2, hidden_size=8, num_heads=2, num_kv_heads=2, head_dim=4, intermediate_size=16, vocab_size=100
    )
    draft = draft_config(target, vocabulary=tuple(range(10)))
    layer = 4 * 8 * 8 + 3 * 8 * 16
    assert memory_ratio(target, [draft], 3) == 1 + 3 * (layer + 2 * 8 * 8 + 10 * 8) / (2 * layer + 100 * 8)
    assert memory_ratio(target, [draft, draft], 3) - 1 == pytest.approx(2 * (memory_ratio(target, [draft], 3) - 1))
    assert step_cost_words(None, None, 1.1) == "" and "τ above 2.0 would pay" in step_cost_words(1.5, 2.04, 1.1)


def test_a_tree_accepts_more_than_a_chain_and_writes_the_same(reports):
    target = loaded_target()
    draft, params = toy_draft(target.config)
    options = OPTIONS | dict(tree=TreeShape(2, 20, 60), cutoff=Cutoff(top_p=0.9))
    greedy, sampled = (
        evaluate(target, {"a": Draft(draft, params)}, PROMPTS, make_mesh(data=2), **(options | {"temperature": temperature}))[
            "a"
        ]
        for temperature in (0.0, 1.0)
    )
    assert greedy["tau"] > reports["a"]["tau"]
    assert greedy["same_text_share"] == sampled["same_text_share"] == 1.0


def test_without_drafts_the_baseline_is_reported():
    ((name, report),) = evaluate(loaded_target(), {}, PROMPTS[:2], make_mesh(data=2), **OPTIONS).items()
    assert (name, report["tau"], report["alpha"], report["speedup"]) == ("autoregressive", 1.0, [], 1.0)
    assert report["tokens_per_second"] == report["baseline_tokens_per_second"] > 0


def test_later_turns_go_on_from_the_baselines_answers():
    """Whatever a sampled draft says, every draft answers the prompts that plain decoding leads to, as `record` keeps them."""
    target, (prompt,) = loaded_target(), PROMPTS[-1:]
    asked = []

    def batches(*arguments, **options):
        asked.append(arguments[0])
        return prompt_batch(*arguments, **options)

    options = OPTIONS | {"temperature": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "prompt_batch", batches)
        evaluate(target, {"a": Draft(*toy_draft(target.config))}, [prompt], make_mesh(data=2), **options)
    recorded = record(target, [prompt], make_mesh(data=2), temperature=1.0, max_new_tokens=12, ahead=0, batch_size=4, seed=0)
    starts = [sample.tokens[: np.argmax(sample.assistant_mask)].tolist() for sample in recorded.samples]
    assert [ids for (ids,) in asked] == starts and len(starts) == 2


def test_comparison_is_paired(reports):
    (row,) = compare(reports, seed=0)
    assert (row["a"], row["b"]) == ("b", "a")
    assert row["tau_difference"] == pytest.approx(reports["b"]["tau"] - reports["a"]["tau"])
    (same,) = compare({"x": reports["a"], "y": reports["a"]}, seed=0)
    assert (same["tau_difference"], same["low"], same["high"]) == (0, 0, 0)


def test_a_prompt_too_long_for_the_context_is_refused_before_decoding():
    target = loaded_target()
    draft, params = toy_draft(target.config)
    long = [Prompt("long", "x", ("a" * 1020,))]
    with pytest.raises(ValueError, match="prompt long: .* context of 1024"):
        evaluate(target, {"d": Draft(draft, params)}, long, make_mesh(data=1), **OPTIONS)


def test_a_draft_of_another_target_is_refused():
    target = loaded_target()
    draft, params = toy_draft(dataclasses.replace(target.config, vocab_size=300))
    with pytest.raises(ValueError, match="vocab_size is 300, but the target toy has 258"):
        evaluate(target, {"d": Draft(draft, params)}, PROMPTS, make_mesh(data=1), **OPTIONS)


def test_intervals_cover():
    """95% intervals of a ratio of totals hold the truth about 95% of the time (binomial bounds over 300 data sets)."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        steps = rng.integers(5, 40, (60, 1))
        emitted = steps + rng.binomial(steps * 3, 0.2)
        low, high = interval(resample_ratios(emitted, steps, trial)[:, 0])
        hits += low <= 1.6 <= high
    assert 0.90 * 300 <= hits <= 0.985 * 300


def test_paired_difference_is_tighter_than_two_intervals():
    rng = np.random.default_rng(1)
    steps = rng.integers(10, 40, 80)
    base = steps * rng.uniform(1, 3, 80)
    a, b = base * 1.02, base
    nothing = tau_difference(a, steps, b, 0 * steps, seed=0)
    assert nothing == {"tau_difference": None, "low": None, "high": None}
    assert "nothing was verified" in describe_difference({"a": "x", "b": "y"} | nothing)
    row = tau_difference(a, steps, b, steps, seed=0)
    assert 0 < row["low"] < row["tau_difference"] < row["high"]
    low, high = interval(resample_ratios(b[:, None], steps[:, None], 0)[:, 0])
    assert high - low > 5 * (row["high"] - row["low"])


def test_ratios_that_do_not_exist_are_none():
    assert interval(resample_ratios(np.zeros((4, 1)), np.zeros((4, 1)), 0)[:, 0]) == (None, None)
