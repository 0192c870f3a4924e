"""`evaluate`: acceptance and speed by real speculative decoding of real prompts.

Every batch of prompts is answered by the autoregressive baseline and by each draft, one right after the other, so that a
machine that slows down slows all of them. Programs are compiled and run once on nothing before they are timed. A batch
holds prompts of one source, so that a source has a speed of its own.

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

from jsfdd.base.hardware import describe_hardware
from jsfdd.base.mesh import num_data_shards, replicate, shard_rows, to_host
from jsfdd.base.records import DraftShares, Prompt
from jsfdd.decoding.ensemble import Ensemble, as_decoded, members_of
from jsfdd.decoding.generate import DecodeSetup, make_generate, prepare_params
from jsfdd.decoding.prompts import bucket_width, check_length, prompt_batch, render_turns
from jsfdd.decoding.tree import TreeShape
from jsfdd.decoding.verify import EVERY_TOKEN, Cutoff
from jsfdd.evaluation.acceptance import AcceptanceCounts, acceptance_figures, with_interval
from jsfdd.evaluation.intervals import resample_ratios, tau_difference
from jsfdd.evaluation.shares import no_shares, with_shares
from jsfdd.models.draft import Draft, DraftConfig
from jsfdd.models.sharding import place_params
from jsfdd.weights.target import Target

BASELINE = "autoregressive"


class Answers(NamedTuple):
    """All that was decoded by one system, per prompt (its turns added up) and per batch.

    Attributes:
      texts: [N][turns] answers as text.
      tokens: [N][turns] answers as int32 ids.
      counts: int64.
      shares: int64[N, E] each; E is 0 where no drafts decode together.
      batch_tokens, batch_seconds: float64[batches], of each timed call; batch_sources, whose prompts they were.
    """

    texts: list[list[str]]
    tokens: list[list[np.ndarray]]
    counts: AcceptanceCounts
    shares: DraftShares
    batch_tokens: list[float]
    batch_seconds: list[float]
    batch_sources: list[str]


class _Program(NamedTuple):
    """A system to measure: its parameters and how it decodes."""

    params: dict
    decode: Callable
    num_draft_tokens: int
    num_combined: int = 0  # drafts that decode together


def evaluate(
    target: Target,
    drafts: dict[str, Draft | Ensemble],
    prompts: Sequence[Prompt],
    mesh: Mesh,
    *,
    temperature: float,
    num_draft_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    tree: TreeShape | None = None,
    cutoff: Cutoff = EVERY_TOKEN,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict]:
    """One report (DESIGN §5's report.json, without the config) per draft, all measured against one baseline run.

    Args:
      target: from `load_target`.
      drafts: name -> as `load_draft` gives them; those of one config are one program. Or several drafts that
        decode together.
      prompts: from `read_prompts`.
      mesh: rows are split over its "data" axis.
      batch_size: prompts decoded together, rounded up to the devices that share them.
      tree: verify trees of this shape, of depth `num_draft_tokens`; chains otherwise.
      cutoff: top-k and top-p, for drafts and baseline alike.
      progress: called with (batches done, batches in all).

    Raises:
      ValueError: a prompt with its answer is longer than the target's context, or a draft is of another target.
    """
    for name, draft in drafts.items():
        for member_name, member in members_of(name, draft).items():
            check_draft(target, member.config, member_name)
    shards = num_data_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    plain = make_generate(DecodeSetup(target.config, None, 0, max_new_tokens, target.stop_tokens, cutoff=cutoff), mesh)
    target_params = prepare_params(place_params(target.params, mesh))
    programs = {BASELINE: _Program(target_params, plain, 0)}
    decoders = {}
    for name, draft in drafts.items():
        configs, params, combine = as_decoded(draft)
        setup = DecodeSetup(target.config, configs, num_draft_tokens, max_new_tokens, target.stop_tokens, tree, cutoff, combine)
        if setup not in decoders:
            decoders[setup] = make_generate(setup, mesh)
        params = target_params | {"draft": replicate(params, mesh)}
        programs[name] = _Program(params, decoders[setup], num_draft_tokens, len(configs) if combine else 0)

    answers = {name: _no_answers(len(prompts), program) for name, program in programs.items()}
    compile_seconds = _answer_all(
        target, programs, answers, prompts, mesh, temperature, max_new_tokens, batch_size, seed, progress
    )
    # Trees draw with plain decoding's own keys, so their text is its text at any temperature; sampled chains' need not be.
    same_text = temperature == 0 or tree is not None
    reports = {name: _report(prompts, answers[name], answers[BASELINE], compile_seconds, same_text, seed) for name in drafts}
    sources = [prompt.source for prompt in prompts]
    for name, draft in drafts.items():
        if isinstance(draft, Ensemble):
            reports[name] = with_shares(reports[name], sources, answers[name].shares, draft, tree)
    return reports


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
    for field in ("vocab_size", "hidden_size", "rope"):
        if getattr(own, field) != getattr(wanted, field):
            raise ValueError(
                f"draft {name}: {field} is {getattr(own, field)}, but the target {target.name} has "
                f"{getattr(wanted, field)}; give the target that the draft was trained for"
            )


def _answer_all(
    target, programs, answers, prompts, mesh, temperature, max_new_tokens, batch_size, seed, progress
) -> float:
    """Fill `answers`, turn by turn and batch by batch, the systems one after the other. Returns seconds spent compiling."""
    ready: set[tuple] = set()
    compile_seconds = 0.0
    turns = max(len(prompt.turns) for prompt in prompts)
    plan = [
        (turn, source, [i for i, prompt in enumerate(prompts) if prompt.source == source and len(prompt.turns) > turn])
        for turn in range(turns)
        for source in dict.fromkeys(prompt.source for prompt in prompts)
    ]
    total = sum(-(-len(rows) // batch_size) for _, _, rows in plan)
    done = 0
    # What is known to be too long is refused before anything is decoded; later turns are known as they come.
    for prompt in prompts:
        check_length(target, prompt, len(render_turns(target, prompt, [])), max_new_tokens)
    for turn, source, rows in plan:
        ids = {name: [render_turns(target, prompts[i], answers[name].texts[i]) for i in rows] for name in programs}
        longest = [max(len(ids[name][k]) for name in programs) for k in range(len(rows))]
        for k, length in enumerate(longest):
            check_length(target, prompts[rows[k]], length, max_new_tokens)
        order = np.argsort(longest, kind="stable")
        for start in range(0, len(rows), batch_size):
            chosen = order[start : start + batch_size]
            width = bucket_width(max(longest[k] for k in chosen))
            for name, program in programs.items():
                batch = prompt_batch([ids[name][k] for k in chosen], [rows[k] for k in chosen], batch_size, width, seed, turn)
                batch = shard_rows(batch, mesh)
                arguments = ((program.params, np.float32(temperature)), batch)
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
                _keep(target, answers[name], [rows[k] for k in chosen], out, seconds, source)
            done += 1
            progress(done, total)
    return compile_seconds


def _keep(target: Target, answers: Answers, rows: Sequence[int], out, seconds: float, source: str) -> None:
    """Add one batch's outcome to the answers of `rows`; the batch's filler rows come after them."""
    for k, row in enumerate(rows):
        tokens = out.tokens[k, : out.lengths[k]]
        answers.tokens[row].append(tokens)
        answers.texts[row].append(target.tokenizer.decode(tokens, skip_special_tokens=True))
        for total, own in zip((*answers.counts, *answers.shares), (*out.stats, *(out.shares or ()))):
            total[row] += own[k]
    answers.batch_tokens.append(float(out.lengths.sum()))
    answers.batch_seconds.append(seconds)
    answers.batch_sources.append(source)


def _report(prompts, answers: Answers, baseline: Answers, compile_seconds: float, same_text: bool, seed: int) -> dict:
    same = [
        all(np.array_equal(a, b) for a, b in zip(own, plain)) for own, plain in zip(answers.tokens, baseline.tokens)
    ]
    everywhere = np.ones(len(prompts), bool)
    rate, rate_values = _rate(answers, seed)
    base_rate, base_values = _rate(baseline, seed)
    return {
        **acceptance_figures(answers.counts, everywhere, seed),
        **with_interval("tokens_per_second", rate, rate_values),
        **with_interval("baseline_tokens_per_second", base_rate, base_values),
        **with_interval("speedup", rate / base_rate, rate_values / base_values),
        "n_tokens": int(sum(answers.batch_tokens)),
        # But where two logits tie within rounding, and where sampling has keys of its own.
        "same_text_share": float(np.mean(same)) if same_text else None,
        "compile_seconds": compile_seconds,
        "per_source": {
            source: {
                **acceptance_figures(answers.counts, np.array([prompt.source == source for prompt in prompts]), seed),
                "tokens_per_second": _rate(answers, seed, source)[0],
                "baseline_tokens_per_second": _rate(baseline, seed, source)[0],
                "speedup": _rate(answers, seed, source)[0] / _rate(baseline, seed, source)[0],
            }
            for source in sorted({prompt.source for prompt in prompts})
        },
        "prompts": [
            {"id": prompt.id, "source": prompt.source, "emitted": int(e), "steps": int(s), "same_text": bool(t)}
            for prompt, e, s, t in zip(prompts, answers.counts.emitted, answers.counts.steps, same)
        ],
        "examples": [
            {"id": prompt.id, "source": prompt.source, "prompt": prompt.turns[0], "text": texts[0]}
            for prompt, texts in list(zip(prompts, answers.texts))[:8]
        ],
        "hardware": describe_hardware(),
    }


def _rate(answers: Answers, seed: int, source: str | None = None):
    """tokens/s of all batches (of one source), and of resampled ones: a batch is what was timed, so it is resampled."""
    picked = [source is None or own == source for own in answers.batch_sources]
    tokens, seconds = np.array(answers.batch_tokens)[picked, None], np.array(answers.batch_seconds)[picked, None]
    return float(tokens.sum() / seconds.sum()), resample_ratios(tokens, seconds, seed)[:, 0]


def _no_answers(num_prompts: int, program: _Program) -> Answers:
    """What the answers are added to."""
    depth = program.num_draft_tokens
    counts = AcceptanceCounts(*(np.zeros((num_prompts, columns), np.int64) for columns in (depth + 1, depth, depth)))
    shares = no_shares(num_prompts, program.num_combined)
    return Answers([[] for _ in range(num_prompts)], [[] for _ in range(num_prompts)], counts, shares, [], [], [])
