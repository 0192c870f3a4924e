"""`evaluate`: measure acceptance and speed by speculative decoding of prompts.

The autoregressive baseline and each draft answer every batch of prompts, one right after the other, so that a machine that
slows down slows all of them. Later turns continue from the baseline's answers, so that all get the same prompts. Programs are
compiled, and run once on empty rows, before they are timed. A batch holds prompts of one source, so that every source has a
speed.

    τ (tau)   tokens emitted per target verification, the correction or bonus token included: total over total.
              `tau_macro` is the mean over prompts; `l` is τ − 1, the SFDD paper's measure.
    α_i       share of the verified draft tokens at depth i that were accepted, given that depth i was reached.
    speedup   tokens/s over the baseline's: same model, dtype, batch, prompts, stopping rule; prefill included in both.
    cost_ratio   a speculative step's cost in plain steps (`step_cost.py`): here, and where memory is what decoding waits for.

An answer's first token comes from the forward pass over the prompt. It counts in tokens/s, but not in τ and α. Draft tokens
after a stop token do not count; a last step that overshoots max_new_tokens counts in full, as servers count it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jsfdd.base.hardware import describe_hardware
from jsfdd.base.mesh import round_up_to_shards, shard_rows, to_host
from jsfdd.base.records import DraftShares, Generation, Prompt
from jsfdd.decoding.conversation_log import Answer
from jsfdd.decoding.conversations import Batches, PromptGroup, hold, read_answer
from jsfdd.decoding.generate import make_generate, prepare_drafts, prepare_params
from jsfdd.decoding.prompts import prompt_batch, questions_in
from jsfdd.decoding.settings import EVERY_TOKEN, Cutoff, DecodeSetup, Team, TreeShape, check_temperature, decode_setup
from jsfdd.decoding.state import DecodeParams, PromptBatch
from jsfdd.evaluation.acceptance import AcceptanceCounts, acceptance_figures, no_counts, with_interval
from jsfdd.evaluation.accepted_text import accepted_pieces
from jsfdd.evaluation.intervals import resample_ratios, tau_difference
from jsfdd.evaluation.shares import no_shares, with_shares
from jsfdd.evaluation.step_cost import measured_ratio, memory_ratio
from jsfdd.models.draft import Draft
from jsfdd.weights.draft import check_draft
from jsfdd.weights.target import Target

BASELINE = "autoregressive"
_MAX_EXAMPLES = 8


class SystemAnswers(NamedTuple):
    """Everything that one system decoded, per prompt and per batch.

    Attributes:
      answers: [N][turns].
      tokens, drafted: [N][turns], the answers as int32 ids, and which of these a draft had proposed.
      counts: int64, summed over a prompt's turns.
      shares: int64[N, E] each, of E drafts, summed over a prompt's turns.
      batch_tokens, batch_seconds, batch_sources: tokens, time and source of each timed batch.
    """

    answers: list[list[Answer]]
    tokens: list[list[np.ndarray]]
    drafted: list[list[np.ndarray]]
    counts: AcceptanceCounts
    shares: DraftShares
    batch_tokens: list[float]
    batch_seconds: list[float]
    batch_sources: list[str]


class _System(NamedTuple):
    """The baseline, or one draft or team of drafts, ready to decode."""

    setup: DecodeSetup
    params: DecodeParams
    decode: Callable


def evaluate(
    target: Target,
    drafts: Mapping[str, Draft | Team],
    prompts: Sequence[Prompt],
    mesh: Mesh,
    *,
    temperature: float = 0.0,
    num_draft_tokens: int = 4,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    tree: TreeShape | None = None,
    cutoff: Cutoff = EVERY_TOKEN,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict]:
    """Measure drafts against one baseline run. Returns a report per draft: report.json without the config.

    Args:
      target: from `load_target`.
      drafts: name -> a draft from `load_draft`, or several that decode together. Drafts of the same shape share a program.
        Without drafts, the only report is the baseline's.
      prompts: from `read_prompts`.
      mesh: rows are split over its "data" axis.
      temperature: 0 is greedy.
      num_draft_tokens: the length of a chain or the depth of a tree.
      max_new_tokens: the longest answer.
      batch_size: prompts decoded together, rounded up to a multiple of the mesh's data shards.
      seed: for sampling, and for the resamples of the intervals.
      tree: verify trees of this shape, of depth `num_draft_tokens`; chains if None.
      cutoff: top-k and top-p, for drafts and baseline alike.
      progress: called with (answers done, answers in all). An answer is done when the baseline and every draft have given it.

    Raises:
      ValueError: a prompt with its answer is longer than the target's context, or a draft belongs to another target.

    Example:
      >>> prompts = [Prompt("1", "chat", ("Hello!", "How are you?"))]
      >>> reports = evaluate(target, {"mine": draft}, prompts, jsfdd.make_mesh(), max_new_tokens=8)
      >>> reports["mine"]["same_text_share"]
      1.0
    """
    check_temperature(temperature)
    if not prompts:
        raise ValueError("there is no prompt to evaluate on")
    teams = {name: team if isinstance(team, Team) else Team({name: team}) for name, team in drafts.items()}
    for team in teams.values():
        for name, draft in team.drafts.items():
            check_draft(target, draft.config, name)
    batch_size = round_up_to_shards(batch_size, mesh)
    systems = _systems(
        target, teams, mesh, num_draft_tokens=num_draft_tokens, max_new_tokens=max_new_tokens, tree=tree, cutoff=cutoff
    )
    answers = {name: _no_answers(len(prompts), system.setup) for name, system in systems.items()}
    clock = _Clock()

    def answer(group: PromptGroup) -> list[Answer]:
        batch = shard_rows(prompt_batch(group.prompts, group.numbers, batch_size, seed=seed, turn=group.turn), mesh)
        for name, system in systems.items():
            out, seconds = clock.decode(system, batch, temperature)
            _add(target, answers[name], group.rows, out, seconds, prompts[group.rows[0]].source)
        return [answers[BASELINE].answers[row][-1] for row in group.rows]

    sources = [prompt.source for prompt in prompts]
    batches = by_source(sources, batch_size)
    hold(target, questions_in(prompts), answer, batches, max_new_tokens=max_new_tokens, progress=progress)
    # With sampled chains, a draft's text is another sample from the target's distribution than the baseline's.
    same_text = temperature == 0 or tree is not None
    if not teams:
        return {BASELINE: _report(target, prompts, answers[BASELINE], answers[BASELINE], clock.compile_seconds, True, seed)}
    reports = {}
    for name, team in teams.items():
        reports[name] = _report(target, prompts, answers[name], answers[BASELINE], clock.compile_seconds, same_text, seed)
        reports[name] |= {
            "cost_ratio": measured_ratio(reports[name]["tau"], reports[name]["speedup"]),
            "memory_cost_ratio": memory_ratio(target.config, systems[name].setup.drafts, num_draft_tokens),
        }
        if team.combine is not None:
            shares = answers[name].shares
            reports[name] = with_shares(reports[name], sources, shares, list(team.drafts), team.combine, tree)
    return reports


def by_source(sources: Sequence[str], batch_size: int) -> Batches:
    """Batch prompts of one source, sorted by length."""

    def batches(lengths: Mapping[int, int]) -> Iterator[list[int]]:
        for source in dict.fromkeys(sources):
            rows = sorted((i for i in lengths if sources[i] == source), key=lengths.__getitem__)
            yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))

    return batches


def compare(reports: dict[str, dict], seed: int) -> list[dict]:
    """Paired τ differences between every two reports of one `evaluate` call."""
    counts = {
        name: (np.array([p["emitted"] for p in r["prompts"]]), np.array([p["steps"] for p in r["prompts"]]))
        for name, r in reports.items()
    }
    names = list(reports)
    return [
        {"a": a, "b": b} | tau_difference(*counts[a], *counts[b], seed) for i, b in enumerate(names) for a in names[i + 1 :]
    ]


def _systems(target: Target, teams: Mapping[str, Team], mesh: Mesh, **options) -> dict[str, _System]:
    """Prepare the baseline and every draft; drafts with the same setup share a program."""
    plain = decode_setup(target, max_new_tokens=options["max_new_tokens"], cutoff=options["cutoff"])
    params = prepare_params(target.params, mesh=mesh)
    systems = {BASELINE: _System(plain, params, make_generate(plain, mesh))}
    programs = {}
    for name, team in teams.items():
        setup = decode_setup(target, team.configs, combine=team.combine, **options)
        if setup not in programs:
            programs[setup] = make_generate(setup, mesh)
        drafts = prepare_drafts(team.params, params.target, mesh)
        systems[name] = _System(setup, params._replace(drafts=drafts), programs[setup])
    return systems


class _Clock:
    """Times decoding without compiling."""

    def __init__(self):
        self.compile_seconds = 0.0
        self._ready: set[tuple] = set()

    def decode(self, system: _System, batch: PromptBatch, temperature: float) -> tuple[Generation, float]:
        """Decode a batch; return the outcome on the host and the seconds that it took."""
        program = system.decode, batch.tokens.shape
        if program not in self._ready:
            begin = time.perf_counter()
            # Warm up with rows of length 0, which are done at once: this compiles and loads everything but computes little.
            empty = batch._replace(lengths=jnp.zeros_like(batch.lengths))
            jax.block_until_ready(system.decode(system.params, empty, temperature))
            self.compile_seconds += time.perf_counter() - begin
            self._ready.add(program)
        begin = time.perf_counter()
        out = to_host(system.decode(system.params, batch, temperature))
        return out, time.perf_counter() - begin


def _add(target: Target, answers: SystemAnswers, rows: Sequence[int], out: Generation, seconds: float, source: str) -> None:
    """Add one batch's outcome to the answers of `rows`; padding rows come after them and are ignored."""
    for k, row in enumerate(rows):
        tokens = out.tokens[k, : out.lengths[k]]
        answers.tokens[row].append(tokens)
        answers.drafted[row].append(out.drafted[k, : out.lengths[k]])
        answers.answers[row].append(read_answer(target, tokens, out.tokens.shape[1]))
        for total, counted in zip((*answers.counts, *answers.shares), (*out.stats, *out.shares)):
            total[row] += counted[k]
    answers.batch_tokens.append(float(out.lengths.sum()))
    answers.batch_seconds.append(seconds)
    answers.batch_sources.append(source)


def _one_of_each(prompts: Sequence[Prompt]) -> list[int]:
    """The first prompt of each source, for at most `_MAX_EXAMPLES` sources."""
    first = {}
    for row, prompt in enumerate(prompts):
        first.setdefault(prompt.source, row)
    return list(first.values())[:_MAX_EXAMPLES]


def _example(target: Target, prompt: Prompt, answers: SystemAnswers, row: int) -> dict:
    """A prompt, the answer to its first turn, and that in pieces: [text, whether the draft proposed it]."""
    tokens, drafted = answers.tokens[row][0].tolist(), answers.drafted[row][0].tolist()
    pieces = accepted_pieces(lambda ids: target.tokenizer.decode(ids, skip_special_tokens=True), tokens, drafted)
    example = {"id": prompt.id, "source": prompt.source, "prompt": prompt.turns[0], "text": answers.answers[row][0].text}
    return example | {"pieces": [list(piece) for piece in pieces]}


def _report(
    target: Target, prompts, answers: SystemAnswers, baseline: SystemAnswers, compile_seconds: float, same_text: bool, seed: int
) -> dict:
    same = [all(np.array_equal(a, b) for a, b in zip(tokens, plain)) for tokens, plain in zip(answers.tokens, baseline.tokens)]
    all_prompts = np.ones(len(prompts), bool)
    rate, rate_values = _rate(answers, seed)
    base_rate, base_values = _rate(baseline, seed)
    return {
        **acceptance_figures(answers.counts, all_prompts, seed),
        **with_interval("tokens_per_second", rate, rate_values),
        **with_interval("baseline_tokens_per_second", base_rate, base_values),
        **with_interval("speedup", rate / base_rate, rate_values / base_values),
        "n_tokens": int(sum(answers.batch_tokens)),
        # 1.0 unless logits tie within rounding.
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
        "examples": [_example(target, prompts[row], answers, row) for row in _one_of_each(prompts)],
        "hardware": describe_hardware(),
    }


def _rate(answers: SystemAnswers, seed: int, source: str | None = None) -> tuple[float, Float[np.ndarray, " R"]]:
    """tokens/s over all batches (of one source), and its resamples. Batches are resampled, because batches were timed."""
    picked = [source in (None, batch_source) for batch_source in answers.batch_sources]
    tokens, seconds = np.array(answers.batch_tokens)[picked, None], np.array(answers.batch_seconds)[picked, None]
    return float(tokens.sum() / seconds.sum()), resample_ratios(tokens, seconds, seed)[:, 0]


def _no_answers(num_prompts: int, setup: DecodeSetup) -> SystemAnswers:
    """An empty `SystemAnswers` to add batches to."""
    answers, tokens, drafted = ([[] for _ in range(num_prompts)] for _ in range(3))
    counts, shares = no_counts(num_prompts, setup.num_draft_tokens), no_shares(num_prompts, len(setup.drafts))
    return SystemAnswers(answers, tokens, drafted, counts, shares, [], [], [])
