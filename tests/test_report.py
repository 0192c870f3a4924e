"""The report page, from a small synthetic run directory."""

import base64
import html.parser
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from jsfdd.commands.options import from_options, to_json
from jsfdd.commands.run import RunConfig
from jsfdd.report import panel, plots
from jsfdd.report.report import costs, rank_correlation, same_text_caption, verdict, write_report
from jsfdd.report.run_files import read_run
from jsfdd.scoring.metrics import METRICS
from jsfdd.scoring.table import ScoreTable, TokenRow, write_scores, write_token_scores
from jsfdd.selection.sfdd import Selection, write_selection

VOCAB = 49152
HOSTILE = '<script>alert("x")</script>'
SOURCES = ("code", "explain", "maths", "summarise", HOSTILE)
ARMS = {"full": (1.00, 2.31), "flatness": (0.51, 2.24), "random": (0.50, 2.12)}  # share of tokens, τ
WORDS = "The| sky| looks| blue| because| air| scatters| short| waves|.|\n| A| sum| of".split("|")
GAMMA = 4


def write_run(run: Path, *, num_samples: int = 60, num_prompts: int = 20, seed: int = 0) -> Path:
    """A run directory with every file that a report reads; its figures are plausible and mean nothing."""
    rng = np.random.default_rng(seed)
    run.mkdir(parents=True)
    config = from_options(RunConfig, target="smollm2", data=(Path("chat.jsonl"),), prompts=(Path("prompts.jsonl"),), out=run)
    _write_json(run / "config.json", to_json(config))
    samples = _write_scores(run, num_samples, rng)
    ranked = sorted(samples, key=lambda name: -samples[name]["mean"])
    half = num_samples // 2
    # The last one has no counted token, so no arm keeps it.
    kept = {"full": ranked[:-1], "flatness": ranked[:half], "random": rng.permutation(ranked[:-1])[:half].tolist()}
    examples = [ranked[i] for i in (0, 1, half, -2, -1)]
    example = {"id": "s-001", "source": HOSTILE, "flatness": 0.01, "prompt": f"Is {HOSTILE}?", "answer": "Two & two."}
    sides = {"kept_examples": [example, example], "dropped_examples": [example]}
    group = {"name": "cluster 0", "size": 59, "sources": {HOSTILE: 12}, "kept": {"flatness": 30}, "arm": "flatness"}
    _write_json(run / "groups.json", [group | sides])
    _write_json(run / "texts.json", [_text(name, samples[name]) for name in examples])
    rows = []
    for arm, (share, tau) in ARMS.items():
        directory = run / "arms" / arm
        directory.mkdir(parents=True)
        metric, ratio = ("random", 1.0) if arm == "full" else (arm, 0.5)
        threshold = samples[ranked[half - 1]]["mean"] if arm == "flatness" else 0.5
        selection = Selection(tuple(kept[arm]), (ranked[-1],), metric, ratio, 0, "all", {"all": threshold}, inputs={})
        write_selection(directory / "selection.json", selection)
        steps = round(400 * share)
        _write_metrics(directory / "metrics.jsonl", steps, tau, rng)
        report = _report(tau, num_prompts, rng)
        _write_json(directory / "report.json", report)
        tokens = round(share * sum(s["row"].counted.sum() for s in samples.values()))
        rows.append(
            {"arm": arm, "samples": len(kept[arm]), "tokens": 2 * tokens, "counted_tokens": tokens, "steps": steps}
            | {"train_seconds": 96.0 * share, "cost_ratio": 2.0, "memory_cost_ratio": 1.25}
            | {
                "cost_seconds": {
                    "pass": 41.5,
                    "soft_targets": 22.0 * share,
                    "training": 96.0 * share,
                    "total": 41.5 + 118 * share,
                }
            }
            | {"held_out": {"loss": 1.0, "agreement": 0.6, "acceptance": 0.5}}
            | {name: report[name] for name in report if name.startswith(("tau", "speedup"))}
        )
    _write_json(
        run / "summary.json",
        {
            "versions": {"jsfdd": "0.1.0", "jax": "0.10.2"},
            "hardware": {"platform": "cpu", "device_kind": "cpu", "num_devices": 1, "num_processes": 1, "cpu_cores": 2},
            "target": {"name": "SmolLM2-135M-Instruct", "fingerprint": "9f1c2a77", "vocab_size": VOCAB},
            "data": {"read": num_samples + 1, "kept": num_samples, "truncated": ["s-003"]}
            | {"no_counted": ["s-empty"], "special_text": [], "refused": []}
            | {"tokens": 24680, "counted_tokens": 12340, "padding_share": 0.124},
            "seconds": {"load": 3.1, "score": 41.5, "soft_targets": 22.0, "evaluate": 88.2, "compiling": 30.5},
            "arms": rows,
            "differences": [
                {"a": "flatness", "b": "full", "tau_difference": -0.07, "low": -0.15, "high": 0.01},
                {"a": "random", "b": "full", "tau_difference": -0.19, "low": -0.27, "high": -0.11},
                {"a": "random", "b": "flatness", "tau_difference": -0.12, "low": -0.20, "high": -0.03},
            ],
        },
    )
    return run


def _cost(*parts: float) -> dict[str, float]:
    return dict(zip(("pass", "soft_targets", "training", "total"), (*parts, sum(parts)), strict=True))


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def _write_scores(run: Path, num_samples: int, rng) -> dict[str, dict]:
    samples = {}
    for i in range(num_samples):
        source = SOURCES[i % len(SOURCES)]
        length = int(rng.integers(20, 90)) if i else 0  # the first sample has no counted token
        counted = np.zeros(length + 12, bool)
        counted[10 : 10 + length] = True
        choices = np.exp(rng.exponential(0.5 + 0.25 * (i % len(SOURCES)) + 0.3 * rng.random(), counted.shape))
        flatness = np.where(counted, np.minimum(np.sqrt(choices / VOCAB), 1), 0).astype(np.float32)
        entropy = np.where(counted, np.log(choices) * rng.uniform(1.0, 1.5, counted.shape), 0).astype(np.float32)
        mean = float(flatness[counted].mean()) if length else -1.0
        samples[f"s-{i:03d}"] = {"source": source, "row": TokenRow(counted, flatness, entropy), "mean": mean}
    rows = tuple(s["row"] for s in samples.values())
    flatness, entropy = (np.array([_mean(getattr(row, name)[row.counted]) for row in rows]) for name in ("flatness", "entropy"))
    others = dict.fromkeys(("flatness_median", "top1", "margin", "energy", "ppl"), flatness)  # no report reads them
    num_tokens = np.array([row.counted.sum() for row in rows], np.int32)
    sources = tuple(s["source"] for s in samples.values())
    metrics = {"flatness": flatness, "entropy": entropy} | others
    table = ScoreTable(tuple(samples), sources, num_tokens, metrics, identity={}, tokens=rows)
    write_scores(run / "scores.parquet", table)
    write_token_scores(run / "token_scores.parquet", table)
    return samples


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _text(name: str, sample: dict) -> dict:
    pieces = ["<|im_start|>", "user", "\n", HOSTILE, " Why", "?", "<|im_end|>", "\n", "<|im_start|>", "assistant"]
    row = sample["row"]
    pieces += [WORDS[i % len(WORDS)] for i in range(len(row.counted) - 10)]
    scores = [float(f) if c else None for f, c in zip(row.flatness, row.counted, strict=True)]
    return {"id": name, "source": sample["source"], "pieces": pieces, "flatness": [None, *scores[:-1]]}


def _write_metrics(path: Path, steps: int, tau: float, rng) -> None:
    lines = []
    for step in range(10, steps + 1, 10):
        done = step / steps
        loss = 0.35 + 1.4 * np.exp(-5 * done) + 0.05 * rng.standard_normal()
        lines.append({"step": step, "epoch": int(9.99 * done), "loss": loss, "agreement": 0.5, "acceptance": 0.4})
        if step % (steps // 10) < 10:
            learned = tau * (1 - np.exp(-4 * done))
            shares = {"agreement": 0.25 * learned, "acceptance": 0.2 * learned}
            lines.append({"step": step, "epoch": int(9.99 * done), "held_out": {"loss": float(loss) + 0.1, **shares}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _report(tau: float, num_prompts: int, rng) -> dict:
    alpha = [(tau - 1) / tau * 0.95**i for i in range(GAMMA)]
    reached = 1000 * np.cumprod([1.0, *alpha])
    each = {"n_prompts": num_prompts // len(SOURCES)}
    per_source = {source: _around("tau", tau + 0.1 * i, 0.2) | each for i, source in enumerate(SOURCES)}
    return {
        **_around("tau", tau, 0.11), **_around("tau_macro", tau + 0.03, 0.12), **_around("speedup", 0.8 * tau, 0.06),
        **_around("tokens_per_second", 31 * tau, 2), **_around("baseline_tokens_per_second", 38.7, 1), "l": tau - 1,
        "alpha": alpha, "alpha_low": [a - 0.04 for a in alpha], "alpha_high": [a + 0.04 for a in alpha],
        "accept_counts": [*(int(a - b) for a, b in itertools.pairwise(reached)), int(reached[-1])],
        "n_prompts": num_prompts, "same_text_share": 1.0, "compile_seconds": 12.5, "per_source": per_source,
        "examples": [{"id": "p1", "source": "code", "prompt": f"Explain {HOSTILE}", "text": "A tag & nothing more."}
                     | {"pieces": [["A tag", False], [" & nothing", True], [" more.", False]]}],
    }  # fmt: skip


def _around(name: str, value: float, width: float) -> dict:
    return {name: value, f"{name}_low": value - width, f"{name}_high": value + width}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run) -> str:
    return write_report(run).read_text(encoding="utf-8")


class _Page(html.parser.HTMLParser):
    """Elements, their attributes and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_every_section_is_there_with_its_panels(page):
    parsed = _Page(page)
    sections = [attributes["id"] for tag, attributes in parsed.elements if tag == "section"]
    assert sections == "result flatness selection training acceptance timings configuration glossary".split()
    labels = [attributes["alt"].partition(":")[0] for tag, attributes in parsed.elements if tag == "img"]
    assert labels == [
        "τ by arm", "Paired differences of τ", "Speedup by arm", "τ for what it cost",
        "Sample flatness", "Flatness and entropy, samples", "Token flatness", "Flatness and entropy, tokens",
        "Kept, by source", "Lengths, flatness", "Lengths, random",
        "Loss", "Held-out agreement, %", "Expected acceptance, %",
        "α by depth, %", "Accepted draft tokens", "τ by source",
    ]  # fmt: skip


def test_the_page_loads_nothing(page):
    assert "http:" not in page and "https:" not in page and "@import" not in page
    for tag, attributes in _Page(page).elements:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/svg+xml;base64,"))
    for svg in _pictures(page):
        for reference in re.findall(r'(?:href="|url\()([^")]*)', svg):
            assert reference.startswith(("#", "data:image/png;base64,")), reference


def _pictures(page: str) -> list[str]:
    return [base64.b64decode(data).decode() for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', page)]


def test_text_from_data_is_escaped(page):
    assert "<script" not in page
    text = _Page(page).text
    assert HOSTILE in text  # as a source, in an example text and in an answer: shown, not run
    assert "A tag & nothing more." in text


def test_result_table_shows_what_was_measured(page):
    rows = re.findall(r"<tr><td>.*?</tr>", page, re.DOTALL)[:3]
    cells = [re.sub(r"<[^>]+>", " ", cell).split() for cell in re.findall(r"<td>(.*?)</td>", rows[1], re.DOTALL)]
    assert cells[:3] == [["■", "flatness"], ["2.24", "2.13", "to", "2.35"], ["102"]]
    assert cells[3:5] == [["1.79", "1.73", "to", "1.85"], ["30"]]
    assert cells[7] == ["1.24"]


def test_the_page_says_what_a_step_costs_and_who_wrote_the_answer(page):
    text = " ".join(_Page(page).text.split())
    assert "A speculative step costs 2.0 plain steps on this machine, so τ above 2.0 would pay" in text
    assert "it costs 1.2 (computed), and τ 2.31 makes decoding 1.85 times as fast" in text
    assert 'A tag<mark class="drafted"> &amp; nothing</mark> more.' in page
    assert "Cluster 0: 59 samples" in text and "Two & two." in text


def test_pictures_say_what_they_show_and_turn_dark(page):
    labels = [attributes["alt"] for tag, attributes in _Page(page).elements if tag == "img"]
    assert labels[0] == "τ by arm: full 2.31 (2.20 to 2.42); flatness 2.24 (2.13 to 2.35); random 2.12 (2.01 to 2.23)"
    assert labels[3] == "τ for what it cost: full τ 2.31 for 160 s; flatness τ 2.24 for 102 s; random τ 2.12 for 100 s"
    assert all(len(label.partition(": ")[2]) > 9 for label in labels)
    for svg in _pictures(page):
        assert svg.count("prefers-color-scheme: dark") == 1
        for grey in (panel.INK, panel.MUTED):  # what is drawn in them is found by the rule, which has to match the style's text
            assert f'[style*="fill: {grey}"]' in svg
        assert f"fill: {panel.INK}" in svg.partition("</style>")[2]


def test_verdicts_of_the_page_put_the_metric_first(page):
    verdicts = re.search(r'<p class="verdict">(.*?)</p>', page, re.DOTALL)[1]
    assert re.findall(r"<span>(.*?):", verdicts) == [
        "No difference seen between the flatness draft and the full draft",
        "The flatness draft accepts more than the random draft",  # the summary has it as random − flatness
        "The random draft accepts less than the full draft",
    ]


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (
            0.03,
            0.2,
            "The flatness draft accepts more than the random draft: τ +0.10 (paired 95% interval +0.03 to +0.20)",
        ),
        (-0.2, -0.03, "The flatness draft accepts less than the random draft: τ −0.10 (paired 95% interval −0.20 to"),
        (
            -0.03,
            0.20,
            "No difference seen between the flatness draft and the random draft: τ +0.10 (paired 95% interval",
        ),
        (
            0.0,
            0.2,
            "No difference seen between the flatness draft and the random draft: τ +0.10 (paired 95% interval 0.00",
        ),
        (None, None, "flatness and random cannot be compared: nothing was verified on the same prompts."),
    ],
)
def test_verdict_says_what_the_interval_allows(low, high, expected):
    difference = 0.1 if low is None or high > 0 else -0.1
    said = verdict({"a": "flatness", "b": "random", "tau_difference": difference, "low": low, "high": high})
    assert said.startswith(expected)


def test_example_tokens_are_shaded_by_tenths_of_flatness(run, page):
    files = read_run(run)
    deciles = np.quantile(files.token_flatness, np.arange(1, 10) / 10)
    text = files.texts[0]
    shaded = re.findall(r'<span class="h(\d)">', page.split('<div class="tokens">')[1].split("</div>")[0])
    assert [int(level) for level in shaded] == [int(np.sum(f > deciles)) for f in text["flatness"] if f is not None]


def test_same_run_same_page(run, page, tmp_path):
    again = write_report(run, tmp_path / "deep" / "again.html")
    assert again.read_text(encoding="utf-8") == page
    assert list(again.parent.iterdir()) == [again]


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "summary.json", "scores.parquet", "token_scores.parquet", "texts.json", "groups.json",
        "arms/flatness/selection.json", "arms/random/metrics.jsonl", "arms/full/report.json",
    ],
)  # fmt: skip
def test_missing_file_is_named(run, tmp_path, name):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(copy / name))):
        read_run(copy)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("summary.json", lambda text: text[:-9], "summary.json: damaged JSON"),
        ("summary.json", lambda text: text.replace('"seconds"', '"minutes"'), "summary.json: no field seconds"),
        ("summary.json", lambda text: text.replace('"arm": "random"', '"arm": "entropy"'), "no arm random"),
        (
            "arms/full/report.json",
            lambda text: text.replace('"alpha_low"', '"alph"'),
            "report.json: no field alpha_low",
        ),
        ("arms/full/metrics.jsonl", lambda text: text + '{"step": 1', "metrics.jsonl:"),
        ("texts.json", lambda text: text.replace('"<|im_start|>", ', "", 1), "pieces but"),
    ],
)
def test_damaged_file_is_named(run, tmp_path, name, damage, message):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / name).write_text(damage((copy / name).read_text()))
    with pytest.raises(ValueError, match=message):
        read_run(copy)


def test_cut_parquet_file_is_named(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "scores.parquet").write_bytes((copy / "scores.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match="scores.parquet: not a whole Parquet file"):
        read_run(copy)


def test_a_damaged_run_gets_no_page(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))
    (copy / "texts.json").write_text("[")
    with pytest.raises(ValueError, match="texts.json: damaged"):
        write_report(copy)
    assert not (copy / "report.html").exists()


@pytest.mark.parametrize(
    "temperature, tree_nodes, words",
    [
        (0.0, 0, "as all should be but for logits that tie"),
        (1.0, 0, "the same distribution, not the same text"),
        (1.0, 8, "as all should be but for logits that tie"),
    ],
)
def test_the_caption_says_when_texts_must_agree(page, temperature, tree_nodes, words):
    assert words in same_text_caption(temperature, tree_nodes)
    assert same_text_caption(0.0, 0) in page


def test_figures_that_do_not_exist_are_dashes(run, tmp_path):
    """One arm, sampled, nothing held out, and a draft that never got anywhere: no verdict, no panel without data."""
    copy = shutil.copytree(run, tmp_path / "run")
    nothing = {f"{name}{end}": None for name in ("tau", "tau_macro", "speedup") for end in ("", "_low", "_high")}
    nothing |= {"cost_ratio": None}
    _change(copy / "config.json", {"arms": ["full"], "temperature": 1.0, "held_out_share": 0.0, "mix": ["a=1"]})
    rows = json.loads((copy / "summary.json").read_text())["arms"]
    target = {"name": "models/tiny", "fingerprint": "0", "vocab_size": VOCAB}
    _change(copy / "summary.json", {"arms": [rows[0] | nothing], "differences": [], "target": target})
    report = json.loads((copy / "arms/full/report.json").read_text())
    no_tau = {"tau": None, "tau_low": None, "tau_high": None}
    sources = {source: record | no_tau for source, record in report["per_source"].items()}
    gone = {name: [None] * GAMMA for name in ("alpha", "alpha_low", "alpha_high")}
    _change(copy / "arms/full/report.json", nothing | gone | {"same_text_share": None, "per_source": sources})
    metrics = copy / "arms/full/metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True) if "held_out" not in line))
    page = write_report(copy).read_text(encoding="utf-8")
    assert 'class="verdict"' not in page and "Paired differences" not in page and "Held-out agreement" not in page
    assert sum(picture.count("not measured") for picture in _pictures(page)) == 2  # τ and speedup, of the one arm
    assert "no samples were held out" in page
    assert f"Of these a mixture was trained on (a=1): {rows[0]['samples']} in full." in page
    assert "<title>Drafts for tiny</title>" in page
    assert "nan" not in re.sub(r"<img [^>]*>", "", page).lower()


def _change(path: Path, values: dict) -> None:
    _write_json(path, json.loads(path.read_text()) | values)


def test_costs_compare_with_full_only_where_there_is_one(run):
    files = read_run(run)
    assert costs(files.arms)[0] == (
        "The flatness arm trained on 51% of the samples that full did, 51% of the counted tokens; it took 51% of its training "
        "time, and 64% of its cost from conversations to draft."
    )
    assert costs(files.arms[1:]) == []


def test_ticks_are_plain_numbers_with_a_small_vocabulary_too():
    (svg,) = _pictures(plots.token_histogram("Token flatness", np.geomspace(0.07, 0.3, 50), vocab_size=258))
    labels = sorted(re.findall(r"<text [^>]*>([^<]*)</text>", svg))
    ticks = ["0.1", "0.2", "1", "1", "2", "5", "10", "20"]  # of flatness, tokens and choices
    assert labels == sorted([*ticks, "token flatness", "tokens", "effective number of choices", "Token flatness"])


def test_rank_correlation_of_ties_and_of_a_constant():
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / sqrt(4.5 * 5).
    assert np.isclose(rank_correlation(np.array([1, 20, 20, 300]), np.array([1, 3, 2, 4])), (4.5 / 5) ** 0.5)
    assert np.isclose(rank_correlation(np.array([1.0, 2, 3]), np.array([9.0, 4, 1])), -1)
    assert np.isnan(rank_correlation(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])))


def test_many_sources_share_one_colour():
    names = [f"source {i:02d}" for i in range(20)] + ["source 19"] * 5
    groups, colours = panel.source_groups(names)
    assert len(colours) == len(panel.SOURCE_COLOURS) + 1 and list(colours)[-1] == panel.OTHER
    assert "source 19" in colours and np.sum(groups == panel.OTHER) == 13


def test_arms_and_sources_never_share_a_colour():
    arms = [colour for colour, _, _ in (*panel.ARM_STYLES.values(), panel.NEW_METRIC_STYLE)]
    assert len({*arms, *panel.SOURCE_COLOURS, panel.OTHER_COLOUR}) == len(arms) + len(panel.SOURCE_COLOURS) + 1
    assert set(panel.ARM_STYLES) == {"full", *METRICS}
