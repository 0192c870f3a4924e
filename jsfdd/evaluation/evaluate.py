"""`evaluate`: acceptance and speed by real speculative decoding of real prompts.

Every batch of prompts is answered by the autoregressive baseline and by each draft, one right after the other, so that a
machine that slows down slows all of them. Programs are compiled and run once on nothing before they are timed.

    τ (tau)   tokens emitted per target verification, the correction or bonus token included: total over total.
              `tau_macro` is the mean over prompts; `l` is τ − 1, the SFDD paper's measure.
    α_i       share of the verified draft tokens at depth i that were accepted, given that depth i was reached.
    speedup   tokens/s over the baseline's: same model, dtype, batch, prompts, stopping rule; prefill included in both.

An answer's first token comes from the prompt's own forward pass and is in no count but tokens/s. Draft tokens after a
stop token do not count; a last step that overshoots max_new_tokens counts in full, as servers count it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jsfdd.data.batches import pad_rows
from jsfdd.data.template import render_prompt
from jsfdd.decoding.generate import DecodeSetup, PromptBatch, make_generate, prepare_params
from jsfdd.evaluation.intervals import interval, resample_ratios, tau_difference
from jsfdd.mesh import describe_hardware, num_data_shards, to_host
from jsfdd.models.draft import DraftConfig
from jsfdd.records import Prompt
from jsfdd.weights.load import Target

BASELINE = "autoregressive"
_SHORTEST_BUCKET = 64


class Answers(NamedTuple):
    """All that was decoded by one system, per prompt (its turns added up) and per batch.

    Attributes:
      texts: [N][turns] answers as text.
      tokens: [N][turns] answers as int32 ids.
      accept_counts: int64[N, G+1]; reached, accepted: int64[N, G] (records.DecodeStats).
      batch_tokens, batch_seconds: float64[batches], of each timed call.
    """

    texts: list[list[str]]
    tokens: list[list[np.ndarray]]
    accept_counts: np.ndarray
    reached: np.ndarray
    accepted: np.ndarray
    batch_tokens: list[float]
    batch_seconds: list[float]

    @property
    def steps(self) -> np.ndarray:
        """int64[N], target verifications."""
        return self.accept_counts.sum(axis=1)

    @property
    def emitted(self) -> np.ndarray:
        """int64[N], tokens that those verifications emitted."""
        return self.accept_counts @ np.arange(1, self.accept_counts.shape[1] + 1)


class _Program(NamedTuple):
    """A system to measure: its parameters and how it decodes."""

    params: dict
    decode: Callable
    num_draft_tokens: int


def evaluate(
    target: Target,
    drafts: dict[str, tuple[DraftConfig, dict]],
    prompts: Sequence[Prompt],
    mesh: Mesh,
    *,
    temperature: float,
    num_draft_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict]:
    """One report (DESIGN §5's report.json, without the config) per draft, all measured against one baseline run.

    Args:
      target: from `load_target`.
      drafts: name -> (config, params), as `load_draft` gives them; all are compiled as one program.
      prompts: from `read_prompts`.
      mesh: rows are split over its "data" axis.
      batch_size: prompts decoded together, rounded up to the devices that share them.
      progress: called with (batches done, batches in all).

    Raises:
      ValueError: a prompt with its answer is longer than the target's context, or a draft is of another target.
    """
    for name, (config, _) in drafts.items():
        check_draft(target, config, name)
    shards = num_data_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    plain = make_generate(DecodeSetup(target.config, None, 0, max_new_tokens, target.stop_tokens), mesh)
    target_params = prepare_params(target.params)
    programs = {BASELINE: _Program(target_params, plain, 0)}
    for config in {config for config, _ in drafts.values()}:
        setup = DecodeSetup(target.config, config, num_draft_tokens, max_new_tokens, target.stop_tokens)
        decode = make_generate(setup, mesh)
        for name, (own, params) in drafts.items():
            if own == config:
                programs[name] = _Program(target_params | {"draft": params}, decode, num_draft_tokens)

    answers = {
        name: Answers([[] for _ in prompts], [[] for _ in prompts], *_zero_counts(len(prompts), program), [], [])
        for name, program in programs.items()
    }
    compile_seconds = _answer_all(target, programs, answers, prompts, temperature, max_new_tokens, batch_size, seed, progress)
    return {
        name: _report(prompts, answers[name], answers[BASELINE], compile_seconds, temperature, seed) for name in drafts
    }


def compare(reports: dict[str, dict], seed: int) -> list[dict]:
    """Paired τ differences of every two drafts that were measured on the same prompts in one `evaluate` call."""
    counts = {
        name: (np.array([p["emitted"] for p in r["prompts"]]), np.array([p["steps"] for p in r["prompts"]]))
        for name, r in reports.items()
    }
    names = list(reports)
    return [
        {"a": a, "b": b} | tau_difference(*counts[a], *counts[b], seed) for i, b in enumerate(names) for a in names[i + 1 :]
    ]


def check_draft(target: Target, draft: DraftConfig, name: str) -> None:
    """Raise ValueError where a draft cannot be of this target, naming what differs."""
    own, wanted = draft.decoder, target.config
    for field in ("vocab_size", "hidden_size"):
        if getattr(own, field) != getattr(wanted, field):
            raise ValueError(
                f"draft {name}: {field} is {getattr(own, field)}, but the target {target.name} has "
                f"{getattr(wanted, field)}; give the target that the draft was trained for"
            )


def _answer_all(target, programs, answers, prompts, temperature, max_new_tokens, batch_size, seed, progress) -> float:
    """Fill `answers`, turn by turn and batch by batch, the systems one after the other. Returns seconds spent compiling."""
    ready: set[tuple] = set()
    compile_seconds = 0.0
    turns = max(len(prompt.turns) for prompt in prompts)
    plan = [
        (turn, [i for i, prompt in enumerate(prompts) if len(prompt.turns) > turn]) for turn in range(turns)
    ]
    total = sum(-(-len(rows) // batch_size) for _, rows in plan)
    done = 0
    for turn, rows in plan:
        ids = {name: [_render(target, prompts[i], answers[name].texts[i]) for i in rows] for name in programs}
        longest = [max(len(ids[name][k]) for name in programs) for k in range(len(rows))]
        for k, length in enumerate(longest):
            _check_length(target, prompts[rows[k]], length, max_new_tokens)
        order = np.argsort(longest, kind="stable")
        for start in range(0, len(rows), batch_size):
            chosen = order[start : start + batch_size]
            width = _bucket(max(longest[k] for k in chosen))
            for name, program in programs.items():
                batch = _prompt_batch([ids[name][k] for k in chosen], [rows[k] for k in chosen], batch_size, width, seed, turn)
                arguments = ((program.params, jnp.float32(temperature)), batch)
                if (program.decode, width) not in ready:
                    begin = time.perf_counter()
                    # Rows of length 0 are done at once: everything is compiled and loaded, hardly anything computed.
                    nothing = batch._replace(lengths=jnp.zeros_like(batch.lengths))
                    jax.block_until_ready(program.decode(arguments[0], nothing))
                    compile_seconds += time.perf_counter() - begin
                    ready.add((program.decode, width))
                begin = time.perf_counter()
                out = to_host(program.decode(*arguments))
                seconds = time.perf_counter() - begin
                _keep(target, answers[name], [rows[k] for k in chosen], out, seconds)
            done += 1
            progress(done, total)
    return compile_seconds


def _keep(target: Target, answers: Answers, rows: Sequence[int], out, seconds: float) -> None:
    """Add one batch's outcome to the answers of `rows`; the batch's filler rows come after them."""
    for k, row in enumerate(rows):
        tokens = out.tokens[k, : out.lengths[k]]
        answers.tokens[row].append(tokens)
        answers.texts[row].append(target.tokenizer.decode(tokens, skip_special_tokens=True))
        answers.accept_counts[row] += out.stats.accept_counts[k]
        answers.reached[row] += out.stats.reached[k]
        answers.accepted[row] += out.stats.accepted[k]
    answers.batch_tokens.append(float(out.lengths.sum()))
    answers.batch_seconds.append(seconds)


def _report(prompts, answers: Answers, baseline: Answers, compile_seconds: float, temperature: float, seed: int) -> dict:
    emitted, steps = answers.emitted, answers.steps
    # A prompt whose answer ended with its first token was never verified: it has no τ of its own.
    verified = steps > 0
    per_prompt = emitted[verified] / steps[verified]
    ones = np.ones((len(per_prompt), 1))
    tau = resample_ratios(emitted[:, None], steps[:, None], seed)[:, 0]
    tau_macro = resample_ratios(per_prompt[:, None], ones, seed)[:, 0]
    alpha = resample_ratios(answers.accepted, answers.reached, seed)
    depths = range(answers.reached.shape[1])
    rate, rate_values = _rate(answers, seed)
    base_rate, base_values = _rate(baseline, seed)
    same = [
        all(np.array_equal(a, b) for a, b in zip(own, plain)) for own, plain in zip(answers.tokens, baseline.tokens)
    ]
    sources = sorted({prompt.source for prompt in prompts})
    rows_of = {source: np.array([prompt.source == source for prompt in prompts]) for source in sources}
    return {
        **_with_interval("tau", float(emitted.sum() / steps.sum()) if steps.sum() else None, tau),
        **_with_interval("tau_macro", float(per_prompt.mean()) if len(per_prompt) else None, tau_macro),
        "l": float(emitted.sum() / steps.sum() - 1) if steps.sum() else None,
        "alpha": [_share(answers.accepted[:, i].sum(), answers.reached[:, i].sum()) for i in depths],
        "alpha_low": [interval(alpha[:, i])[0] for i in depths],
        "alpha_high": [interval(alpha[:, i])[1] for i in depths],
        "accept_counts": answers.accept_counts.sum(axis=0).tolist(),
        **_with_interval("tokens_per_second", rate, rate_values),
        **_with_interval("baseline_tokens_per_second", base_rate, base_values),
        **_with_interval("speedup", rate / base_rate, rate_values / base_values),
        "n_prompts": len(prompts),
        "n_tokens": int(sum(answers.batch_tokens)),
        "n_steps": int(steps.sum()),
        # Greedy answers equal the baseline's but where two logits tie within rounding; sampled ones need not.
        "same_text_share": float(np.mean(same)) if temperature == 0 else None,
        "compile_seconds": compile_seconds,
        "per_source": {
            source: {
                **_with_interval(
                    "tau",
                    _share(emitted[rows].sum(), steps[rows].sum()),
                    resample_ratios(emitted[rows][:, None], steps[rows][:, None], seed)[:, 0],
                ),
                "n_prompts": int(rows.sum()),
            }
            for source, rows in rows_of.items()
        },
        "prompts": [
            {"id": prompt.id, "source": prompt.source, "emitted": int(e), "steps": int(s), "same_text": bool(t)}
            for prompt, e, s, t in zip(prompts, emitted, steps, same)
        ],
        "examples": [
            {"id": prompt.id, "source": prompt.source, "prompt": prompt.turns[0], "text": texts[0]}
            for prompt, texts in list(zip(prompts, answers.texts))[:8]
        ],
        "hardware": describe_hardware(),
    }


def _rate(answers: Answers, seed: int):
    """tokens/s of all batches, and of resampled ones: a batch is what was timed, so it is what is resampled."""
    tokens, seconds = np.array(answers.batch_tokens)[:, None], np.array(answers.batch_seconds)[:, None]
    return float(tokens.sum() / seconds.sum()), resample_ratios(tokens, seconds, seed)[:, 0]


def _with_interval(name: str, value: float | None, resampled: np.ndarray) -> dict:
    low, high = interval(resampled)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _share(part, whole) -> float | None:
    return float(part / whole) if whole else None


def _render(target: Target, prompt: Prompt, answers: list[str]) -> list[int]:
    """Token ids of the conversation so far: the turns up to the one after the answers given."""
    messages = []
    for turn, answer in zip(prompt.turns, answers):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return render_prompt(target.tokenizer, [*messages, {"role": "user", "content": prompt.turns[len(answers)]}])


def _check_length(target: Target, prompt: Prompt, length: int, max_new_tokens: int) -> None:
    if length + max_new_tokens > target.config.max_position:
        raise ValueError(
            f"prompt {prompt.id}: {length} tokens and an answer of up to {max_new_tokens} exceed the context of "
            f"{target.config.max_position} tokens of {target.name}; shorten it or lower --max-new-tokens"
        )


def _bucket(length: int) -> int:
    """The next power of two: few shapes, each compiled once; a prompt is read once, so its padding costs little."""
    return max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def _prompt_batch(ids, rows, batch_size, width, seed, turn) -> PromptBatch:
    """`ids` padded to [batch_size, width]. A row's key is its prompt's own, so batching does not change sampled text."""
    fill = batch_size - len(ids)
    tokens = pad_rows([np.asarray(i, np.int32) for i in ids], (batch_size, width))
    lengths = np.array([len(i) for i in ids] + [0] * fill, np.int32)
    base = jax.random.fold_in(jax.random.key(seed), turn)
    keys = jax.vmap(lambda row: jax.random.fold_in(base, row))(jnp.array(list(rows) + [0] * fill))
    return PromptBatch(jnp.asarray(tokens), jnp.asarray(lengths), keys)


def _zero_counts(num_prompts: int, program: _Program):
    depth = program.num_draft_tokens
    return tuple(np.zeros((num_prompts, columns), np.int64) for columns in (depth + 1, depth, depth))
