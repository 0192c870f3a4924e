"""The loop: it learns, it resumes to the same bits after SIGKILL, it refuses what it cannot continue."""

import dataclasses
import functools
import os
import secrets
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import Child
from toy import as_target, random_params, toy_config

from jsfdd.base import interrupts
from jsfdd.base.mesh import make_mesh, replicate, shard_rows
from jsfdd.base.records import Sample
from jsfdd.data.batches import Shape, pad_batch
from jsfdd.data.held_out import split_held_out
from jsfdd.hidden.capture import make_recompute
from jsfdd.models.draft import draft_config
from jsfdd.models.foreign import foreign_target
from jsfdd.models.target import hidden_states
from jsfdd.training.batch import TrainingData, device_batch
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.journal import METRICS, TIMINGS, read_lines
from jsfdd.training.loss import borrow
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_store import store_soft_targets
from jsfdd.training.step import make_evaluate_step
from jsfdd.training.tensorboard import scalars
from jsfdd.training.train import train
from jsfdd.weights.draft import load_draft

pytestmark = pytest.mark.slow


@functools.cache
def toy_data():
    """(target config, target params, samples, hidden states in bfloat16) of 120 two-turn chats of 20 to 40 tokens."""
    config = toy_config()
    params = random_params(config)
    params["norm"]["scale"] *= 3.0  # spreads the logits
    random = np.random.default_rng(0)
    samples, tokens = [], random.integers(0, 8, (120, 40)).astype(np.int32)
    hidden = jax.jit(hidden_states, static_argnums=0)(config, params, tokens).astype(jnp.bfloat16)
    for number in range(120):
        length = int(random.integers(20, 41))
        assistant = np.arange(length) % 20 >= 6
        samples.append(Sample(f"chat-{number}", "toy", tokens[number, :length], assistant))
    return config, params, samples, {s.id: np.asarray(h)[: len(s.tokens)] for s, h in zip(samples, hidden)}


RECIPE = Recipe(held_out_share=0.2, learning_rate=3e-3, epochs=3, log_every=3, save_every=5)
RECIPE_FIELDS = {field.name for field in dataclasses.fields(Recipe)}


def run(out, store=None, rows=None, weights=None, samples=None, **changes):
    """Train on the toy data, with `rows` as soft targets; changes are of the recipe or arguments of `train`."""
    config, params, all_samples, hidden = toy_data()
    recipe = dataclasses.replace(RECIPE, **{name: changes.pop(name) for name in RECIPE_FIELDS & set(changes)})
    kept, held_out = split_held_out(samples or all_samples, recipe.held_out_share)
    data, held_out = TrainingData(kept, store or hidden, rows, weights), TrainingData(held_out, store or hidden)
    arguments = dict(out=out, seed=0, identity={"target": "toy"}, batch_tokens=1024, progress=False) | changes
    return train(as_target(config, params), data, held_out, recipe, make_mesh(), **arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(result, directory) of one uninterrupted run."""
    directory = tmp_path_factory.mktemp("finished")
    return run(directory), directory


LONGER = dict(learning_rate=1e-2, epochs=6, batch_tokens=512)


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """(result, directory) of a run that learns more."""
    directory = tmp_path_factory.mktemp("longer")
    return run(directory, **LONGER), directory


def test_loss_falls_and_held_out_agreement_rises(longer):
    result, directory = longer
    lines = read_lines(directory / METRICS)
    steps = [line for line in lines if "loss" in line]
    held_out = [line["held_out"] for line in lines if "held_out" in line]
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert len(held_out) == 6 and held_out[-1] == result.held_out
    assert held_out[-1]["agreement"] > held_out[0]["agreement"] + 0.1
    assert held_out[-1]["acceptance"] > held_out[0]["acceptance"] + 0.1
    assert 0 < held_out[-1]["kl"] < held_out[0]["kl"]


def test_recomputed_hidden_states_train_the_same_draft_as_stored_ones(tmp_path):
    """On one device, in batches of one shape, to the bit; the held-out figures too."""
    dtype = "bfloat16"
    config, params, samples, _ = toy_data()
    mesh, shape = make_mesh(data=1), Shape(16, 40)
    recipe = Recipe(held_out_share=0.2, epochs=1)
    hidden_of = make_recompute(as_target(config, params), mesh, dtype)
    hidden = {}
    for start in range(0, len(samples), 16):
        own = samples[start : start + 16]
        computed = np.asarray(hidden_of(shard_rows(pad_batch(own, shape), mesh)))
        hidden |= {sample.id: row[: len(sample.tokens)] for sample, row in zip(own, computed)}
    sides = split_held_out(samples, recipe.held_out_share)
    results = [
        train(
            as_target(config, params), *(TrainingData(side, store) for side in sides), recipe, mesh, out=tmp_path / name,
            shapes=[shape], progress=False,
        )
        for name, store in (("stored", hidden), ("recomputed", hidden_of))
    ]  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, *(_bits(result.state) for result in results))
    assert (tmp_path / "stored" / METRICS).read_bytes() == (tmp_path / "recomputed" / METRICS).read_bytes()


class KilledAtStep(dict):
    """Hidden states that kill the process, as a power cut would, when the samples of some batch are asked for."""

    def __init__(self, hidden, reads, by=signal.SIGKILL):
        super().__init__(hidden)
        self.reads_left, self.by = reads, by

    def __getitem__(self, key):
        self.reads_left -= 1
        if self.reads_left == 0:
            os.kill(os.getpid(), self.by)
        return super().__getitem__(key)


def train_until_killed(directory, reads):
    run(directory, store=KilledAtStep(toy_data()[3], reads))


def killed_child(directory, reads):
    """The exit code of a process that trains on and is killed at its `reads`-th read of hidden states."""
    code, _, errors = Child(train_until_killed, directory, reads).finish()
    assert code in (0, -signal.SIGKILL), errors
    return code


def test_killed_run_continues_to_the_same_bits(finished, tmp_path):
    result, directory = finished
    assert killed_child(tmp_path, 250) == -signal.SIGKILL
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    reached = read_lines(tmp_path / METRICS)[-1]["step"]
    assert 0 < saved[-1] < reached < result.steps, "the kill must come after a checkpoint and after later lines"

    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 9')  # as if the kill had cut a line
    (tmp_path / "checkpoints" / "99.orbax-checkpoint-tmp" / "params").mkdir(parents=True)  # … or a checkpoint
    killed_child(tmp_path, 1 + secrets.randbelow(200))  # anywhere at all: in an epoch, in its evaluation, or after the end
    resumed = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, _bits(resumed.state), _bits(result.state))
    assert (tmp_path / METRICS).read_bytes() == (directory / METRICS).read_bytes()
    assert resumed.tokens == result.tokens and resumed.held_out == result.held_out
    steps = [line["step"] for line in read_lines(tmp_path / TIMINGS)]
    assert steps == [line["step"] for line in read_lines(directory / TIMINGS)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(
        path.name for path in (directory / "checkpoints").iterdir()
    )


def train_until_told(directory, reads):
    try:
        with interrupts.listening():
            run(directory, store=KilledAtStep(toy_data()[3], reads, signal.SIGTERM))
    except interrupts.Interrupted as error:
        return error.code


def test_a_signal_ends_training_with_a_checkpoint_of_the_step_and_it_continues_to_the_same_bits(finished, tmp_path):
    result, directory = finished
    code, _, errors = Child(train_until_told, tmp_path, 250).finish()
    assert code == 143, errors
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved % RECIPE.save_every and saved % RECIPE.log_every, "no step with a line or checkpoint of its own"
    resumed = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, _bits(resumed.state), _bits(result.state))
    assert (tmp_path / METRICS).read_bytes() == (directory / METRICS).read_bytes()


def _bits(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def test_finished_run_is_returned_not_repeated(finished):
    result, directory = finished
    before = {path: path.read_bytes() for path in (directory / METRICS, directory / TIMINGS)}
    again = run(directory, store={"nothing": "is read"})
    jax.tree.map(np.testing.assert_array_equal, _bits(again.state), _bits(result.state))
    assert again.seconds == result.seconds and again.held_out == result.held_out
    assert {path: path.read_bytes() for path in before} == before
    assert load_draft(directory).config == result.draft.config


def test_lines_say_what_happened(finished):
    result, directory = finished
    lines = [line for line in read_lines(directory / METRICS) if "loss" in line]
    _, _, samples, _ = toy_data()
    train_samples, held_out = split_held_out(samples, 0.2)
    assert lines[-1]["step"] == result.steps and lines[-1]["tokens"] == result.tokens
    assert result.tokens == 3 * sum(int(sample.counted[1:].sum()) for sample in train_samples)
    # A line ends at every third step, at every checkpoint and at every epoch's end.
    per_epoch = result.steps // 3
    ends = {*range(3, result.steps + 1, 3), *range(5, result.steps + 1, 5), per_epoch, 2 * per_epoch, 3 * per_epoch}
    assert [line["step"] for line in lines] == sorted(ends)
    assert all(0 <= line[name] <= 1 for line in lines for name in ("agreement", "acceptance"))
    assert lines[0]["learning_rate"] > lines[-1]["learning_rate"] == pytest.approx(3e-4)


def stored(kind, directory, recipe=RECIPE, weights=None, vocabulary=(), **changes):
    """Soft targets of the toy data's training side."""
    config, params, samples, hidden = toy_data()
    data = TrainingData(split_held_out(samples, 0.2)[0], hidden, weights=weights)
    return store_soft_targets(
        kind, data, borrow(config, params), draft_config(config, vocabulary=vocabulary), recipe, make_mesh(),
        batch_tokens=1024, directory=directory, identity={}, progress=False, **changes,
    )  # fmt: skip


def store_of_means(directory, recipe=RECIPE, **changes):
    return stored("means", directory, recipe, **({"means_dtype": "float32"} | changes))


def store_of_top_k(directory, k, **changes):
    return stored("top_k", directory, dataclasses.replace(RECIPE, soft_targets="top_k", soft_top_k=k), **changes)


def test_stored_means_train_the_same_draft(finished, tmp_path):
    """The same loss by two products with the head in place of three; only rounding differs, which Adam enlarges."""
    result, directory = finished
    means = store_of_means(tmp_path / "means")
    again = run(tmp_path / "run", rows=means)
    lines, expected = (
        [line for line in read_lines(path / METRICS) if "loss" in line] for path in (tmp_path / "run", directory)
    )
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-3)
    assert "agreement" in expected[0] and "agreement" not in lines[0]
    assert again.held_out["kl"] == pytest.approx(result.held_out["kl"], rel=5e-3)
    rounded = store_of_means(tmp_path / "rounded", means_dtype="bfloat16")
    assert run(tmp_path / "third", rows=rounded).held_out["kl"] == pytest.approx(result.held_out["kl"], rel=0.02)


def test_the_likeliest_tokens_train_the_same_draft_where_they_are_all(tmp_path):
    """In HASS too; only rounding to float16 differs, which Adam enlarges."""
    changes = dict(token_loss="hybrid", draft_steps=2, hass_top_k=5, hass_top_k_weight=0.5)
    directory = tmp_path / "whole"
    result = run(directory, **changes)
    all_tokens = store_of_top_k(tmp_path / "top_k", 64)
    again = run(tmp_path / "run", rows=all_tokens, soft_targets="top_k", soft_top_k=64, **changes)
    lines, expected = (
        [line for line in read_lines(path / METRICS) if "loss" in line] for path in (tmp_path / "run", directory)
    )
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-3)
    assert [line["agreement"] for line in lines] == pytest.approx([line["agreement"] for line in expected], abs=0.02)
    assert "acceptance" not in lines[0] and "agreement_by_step" in lines[0]
    assert again.held_out["kl"] == pytest.approx(result.held_out["kl"], rel=5e-3)


def test_few_likeliest_tokens_teach_a_draft_vocabulary_any_distance(tmp_path):
    config, _, samples, _ = toy_data()
    changes = dict(soft_targets="top_k", soft_top_k=2, token_loss="total_variation", draft_vocab=5, learning_rate=1e-2)
    vocabulary = draft_of(config, Recipe(**changes), split_held_out(samples, 0.2)[0]).vocabulary
    result = run(tmp_path / "run", rows=store_of_top_k(tmp_path / "top_k", 2, vocabulary=vocabulary), **changes)
    lines = [line for line in read_lines(tmp_path / "run" / METRICS) if "loss" in line]
    assert 0 < lines[0]["coverage"] < 1 and "agreement" not in lines[0]
    assert lines[-1]["token_loss"] < lines[0]["token_loss"] and 0 < result.held_out["acceptance"] < 1


def test_soft_targets_of_another_kind_than_the_recipes_are_refused(tmp_path):
    means, top_k = store_of_means(tmp_path / "means"), store_of_top_k(tmp_path / "top_k", 2)
    with pytest.raises(ValueError, match="stored rows are of another kind"):
        run(tmp_path / "a", rows=means, soft_targets="top_k")
    with pytest.raises(ValueError, match="stored rows are of another kind"):
        run(tmp_path / "b", rows=top_k)
    with pytest.raises(ValueError, match="needs more of the target than means"):
        run(tmp_path / "c", rows=means, token_loss="hybrid")


def test_a_store_of_likeliest_tokens_goes_on_and_knows_what_it_is_of(tmp_path):
    whole = store_of_top_k(tmp_path, 3)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*")}
    again = store_of_top_k(tmp_path, 3)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*")} == before
    (tmp_path / "shard-00000.bin").unlink()  # as after a damage: its samples are computed anew
    anew = store_of_top_k(tmp_path, 3)
    for name in whole:
        np.testing.assert_array_equal(again[name], anew[name])
    with pytest.raises(ValueError, match="soft_targets.k: found 3, expected 4"):
        store_of_top_k(tmp_path, 4)
    with pytest.raises(ValueError, match="soft_targets.vocabulary"):
        store_of_top_k(tmp_path, 3, vocabulary=(1, 2, 3))


def test_means_of_other_tokens_or_another_loss_are_refused(tmp_path):
    store_of_means(tmp_path / "means")
    with pytest.raises(ValueError, match="top_k_weight"):
        store_of_means(tmp_path / "means", Recipe(hass_top_k_weight=0.5))
    none = {sample.id: np.zeros(len(sample.tokens), np.float32) for sample in toy_data()[2]}
    with pytest.raises(ValueError, match="weights"):
        store_of_means(tmp_path / "means", weights=none)


def test_hass_lifts_the_deeper_steps(longer, tmp_path):
    """Trained on its own states, the draft's second step is nearer to the target than without."""
    plain, hass = longer[0], run(tmp_path, draft_steps=2, **LONGER)
    assert len(hass.held_out["acceptance_by_step"]) == 2
    assert hass.held_out["acceptance_by_step"][0] == hass.held_out["acceptance"]
    config, params, samples, hidden = toy_data()
    mesh = make_mesh()
    data = TrainingData(split_held_out(samples, 0.2)[1], hidden)
    batch = device_batch(data, range(len(data.samples)), Shape(len(data.samples), 40), mesh)
    evaluate = make_evaluate_step(plain.draft.config, mesh, Recipe(draft_steps=2))
    frozen = replicate(borrow(config, params), mesh)
    second_of = {
        name: jax.device_get(evaluate(frozen, result.state.params, batch)).steps[1]
        for name, result in (("plain", plain), ("hass", hass))
    }
    assert second_of["hass"]["hidden_loss"] < second_of["plain"]["hidden_loss"]
    assert second_of["hass"]["cross_entropy"] < second_of["plain"]["cross_entropy"]


def test_token_weights_decide_what_is_learnt(finished, tmp_path):
    result, _ = finished
    samples = toy_data()[2]
    half = {s.id: (s.counted & (np.arange(len(s.tokens)) % 2 == 0)).astype(np.float32) for s in samples}
    selected = run(tmp_path / "half", weights=half)
    expected = 3 * sum(int(half[s.id][1:].sum()) for s in split_held_out(samples, 0.2)[0])
    assert selected.tokens == expected < 0.6 * result.tokens and selected.steps == result.steps
    with pytest.raises(ValueError, match="weights: "):
        run(tmp_path / "half")


def test_a_draft_vocabulary_is_of_the_data_and_is_kept(tmp_path):
    config, _, samples, _ = toy_data()
    draft = draft_of(config, Recipe(draft_vocab=5), split_held_out(samples, 0.2)[0])
    assert len(draft.vocabulary) == 5 and set(draft.vocabulary) < set(range(8))  # the data has tokens 0 to 7 alone
    means = store_of_means(tmp_path / "means", vocabulary=draft.vocabulary)
    result = run(tmp_path / "run", rows=means, draft_vocab=5, learning_rate=1e-2)
    assert result.draft.config == draft == load_draft(tmp_path / "run").config
    assert 0 < result.held_out["acceptance"] < result.held_out["coverage"] < 1 and "kl" not in result.held_out
    with pytest.raises(ValueError, match="vocabulary"):
        store_of_means(tmp_path / "means")
    with pytest.raises(ValueError, match="hass_top_k: 65 exceeds the target's vocabulary of 64"):
        draft_of(config, Recipe(hass_top_k=65, hass_top_k_weight=1.0), samples)
    with pytest.raises(ValueError, match="trained on soft targets"):
        run(tmp_path / "without", draft_vocab=5)


def test_accumulation_takes_fewer_steps_of_the_same_tokens(finished, tmp_path):
    result, _ = finished
    accumulated = run(tmp_path, accumulate=2)
    assert accumulated.steps == 3 * -(-result.steps // 3 // 2) and accumulated.tokens == result.tokens
    assert accumulated.held_out["kl"] < 1.5 * result.held_out["kl"]


def test_timings_are_in_parts_and_rates(finished):
    result, directory = finished
    lines = read_lines(directory / TIMINGS)
    compiling = sum(line["compiling"] for line in lines)
    assert sum(line["seconds"] for line in lines) - compiling == pytest.approx(result.seconds)
    assert compiling == pytest.approx(result.compile_seconds) and lines[-1]["steps"] == lines[-1]["step"] == result.steps
    for line in lines:
        parts = [line[part] for part in ("reading", "held_out", "probe", "compiling")]
        assert 0 < line["reading"] and sum(parts) < line["seconds"]
        assert line["tflops"] > 0 and line["probe"] == 0 and "mfu" not in line  # a CPU's peak is not known
    assert sum(line["held_out"] > 0 for line in lines) == 3
    train_samples, _ = split_held_out(toy_data()[2], 0.2)
    steps_seconds = [line["seconds"] - line["held_out"] - line["compiling"] for line in lines]
    tokens = sum(line["tokens_per_second"] * seconds for line, seconds in zip(lines, steps_seconds, strict=True))
    assert tokens == pytest.approx(3 * sum(len(sample.tokens) for sample in train_samples))


def test_tensorboard_has_the_lines_numbers(tmp_path, monkeypatch):
    result = run(tmp_path, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert events.stat().st_size > 1000 and b"held_out/acceptance" in events.read_bytes()
    line = {"step": 3, "loss": 1.5, "held_out": {"kl": 2.0, "alpha": [0.5, None]}}
    assert scalars(line) == {"loss": 1.5, "held_out/kl": 2.0, "held_out/alpha/1": 0.5}
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'jsfdd\[tensorboard\]'"):
        run(tmp_path / "without", tensorboard=True)
    assert result.steps > 0


def test_other_inputs_are_refused_by_name(finished):
    _, directory = finished
    for changes, named in (
        ({"learning_rate": 1e-3}, "options.learning_rate: found 0.003, expected 0.001"),
        ({"seed": 1}, "options.seed: found 0, expected 1"),
        ({"identity": {"target": "other"}}, "target: found 'toy', expected 'other'"),
        ({"samples": toy_data()[2][:-9]}, "samples: "),
    ):
        with pytest.raises(ValueError, match="other inputs or options") as error:
            run(directory, **changes)
        assert named in str(error.value) and str(directory) in str(error.value)


def test_not_a_number_names_step_and_samples(tmp_path):
    hidden = dict(toy_data()[3])
    train_samples, _ = split_held_out(toy_data()[2], 0.2)
    hidden[train_samples[5].id] = np.full_like(hidden[train_samples[5].id], np.nan)
    with pytest.raises(FloatingPointError, match=rf"step [1-4]: .*{train_samples[5].id}[,)]"):
        run(tmp_path, store=hidden)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_bad_inputs_are_errors(tmp_path):
    _, _, samples, hidden = toy_data()
    hidden = {name: rows[1:] for name, rows in hidden.items()}
    with pytest.raises(ValueError, match=r"sample chat-\d+: \d+ stored hidden states for \d+ tokens"):
        run(tmp_path, store=hidden)
    with pytest.raises(ValueError, match=r"sample chat-\d+: no stored hidden states"):
        run(tmp_path, store={"other": hidden["chat-0"]})
    silent = [Sample(s.id, s.source, s.tokens, np.zeros(len(s.tokens), bool)) for s in samples]
    with pytest.raises(ValueError, match="no token to train on"):
        run(tmp_path, samples=silent)


def _scripted_probe(taus, stop_at=None):
    """A probe that reports τ from a list, by how often it was called; optionally dies like a killed run."""
    calls = iter(range(len(taus)))

    def probe(params):
        call = next(calls)
        if call == stop_at:
            raise KeyboardInterrupt
        return {"tau": taus[call], "n_steps": 7}

    return probe


def test_the_draft_of_the_best_tau_is_kept(tmp_path):
    result = run(tmp_path, held_out_share=0.0, probe_every=4, probe=_scripted_probe([1.1, 1.4, 1.2, 1.3, 1.0, 0.9]))
    lines = [(line["step"], line["probe"]["tau"]) for line in read_lines(tmp_path / METRICS) if "probe" in line]
    steps = [*range(4, result.steps, 4), result.steps]
    assert lines == list(zip(steps, [1.1, 1.4, 1.2, 1.3, 1.0, 0.9]))
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["8"]
    best = load_draft(tmp_path).params
    last = load_draft(tmp_path / "checkpoints").params
    assert jax.tree.all(jax.tree.map(np.array_equal, last, result.state.params))
    assert not np.array_equal(best["fc"]["kernel"], last["fc"]["kernel"])


def test_a_resumed_run_keeps_the_same_best(tmp_path):
    """Killed at its third probe, behind a best at step 8, but its last checkpoint is of step 7: the best is found again."""
    taus, options = [1.1, 1.4, 1.2, 1.3, 1.0, 0.9], dict(held_out_share=0.0, probe_every=4, save_every=7)
    run(tmp_path / "whole", probe=_scripted_probe(taus), **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", probe=_scripted_probe(taus, stop_at=2), **options)
    assert [path.name for path in (tmp_path / "killed" / "best").iterdir()] == ["8"]
    run(tmp_path / "killed", probe=_scripted_probe(taus[1:]), **options)
    whole, killed = (load_draft(tmp_path / name).params for name in ("whole", "killed"))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, killed))
    assert (tmp_path / "whole" / METRICS).read_text() == (tmp_path / "killed" / METRICS).read_text()


def test_held_out_side_depends_on_the_id_alone():
    samples = [Sample(str(number), "s", np.zeros(1, np.int32), np.zeros(1, bool)) for number in range(4000)]
    train_samples, held_out = split_held_out(samples, 0.05)
    assert 140 < len(held_out) < 260 and len(train_samples) + len(held_out) == 4000
    assert split_held_out(samples[::-2], 0.05)[1] == [s for s in samples[::-2] if s in held_out]
    assert {s.id for s in held_out} < {s.id for s in split_held_out(samples, 0.1)[1]}
    assert split_held_out(samples, 0.0)[1] == []


def test_a_model_of_another_library_lends_two_arrays(finished, tmp_path):
    """Embedding and head [V, D] as numpy arrays, hidden states as arrays: the draft is the same to the bit."""
    result, _ = finished
    config, params, samples, hidden = toy_data()
    embedding, head = np.asarray(params["embed"]["embedding"]), np.asarray(params["head"]["kernel"]).T
    sides = (TrainingData(side, hidden) for side in split_held_out(samples, RECIPE.held_out_share))
    target = foreign_target(None, embedding, head, config)
    foreign = train(target, *sides, RECIPE, make_mesh(), out=tmp_path, batch_tokens=1024, progress=False)
    assert foreign.draft.record["target"] == target.fingerprint
    jax.tree.map(np.testing.assert_array_equal, _bits(foreign.state), _bits(result.state))
