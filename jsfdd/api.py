"""The public functions of `import jsfdd`. They take `Target` and `Draft` records, and everything else has a default.

Functions import the rooms that they use, so that computing logits does not import the trainer.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import Prompt, Sample
from jsfdd.models import draft as drafts
from jsfdd.models import target as targets
from jsfdd.models.draft import Draft
from jsfdd.models.foreign import ForeignTarget

if TYPE_CHECKING:
    from jsfdd.data.chat import Chat
    from jsfdd.decoding.settings import TreeShape
    from jsfdd.models.architecture import DraftKind
    from jsfdd.scoring.table import ScoreTable
    from jsfdd.selection.sfdd import Selection
    from jsfdd.training.batch import HiddenStates
    from jsfdd.training.recipe import Recipe
    from jsfdd.weights.card import Flavour
    from jsfdd.weights.export import ExportDtype
    from jsfdd.weights.target import Target

MAX_LENGTH = 2048  # the longest chat in tokens, as on the command line


def init_draft(
    target: Target | ForeignTarget, key: Key[Array, ""], *, kind: DraftKind = "eagle", vocabulary: tuple[int, ...] = ()
) -> Draft:
    """A fresh draft for a target: one decoder layer of the target's widths, float32 (EAGLE-1/2: arXiv 2401.15077; EAGLE-3:
    2503.01840, its head a copy of the target's rows).

    Args:
      key: for the random weights.
      kind: of the draft; `eagle3` reads the inputs of the target's layers 2, N/2 and N-3.
      vocabulary: the tokens that the draft can propose, ascending; empty for all.

    Raises:
      ValueError: the target has too few layers for an EAGLE-3 draft.

    Example:
      >>> draft = jsfdd.init_draft(target, jax.random.key(0))
      >>> draft.params["fc"]["kernel"].shape == (2 * target.config.hidden_size, target.config.hidden_size)
      True
    """
    from jsfdd.training.loss import borrow

    config = drafts.draft_config(target.config, vocabulary=vocabulary, kind=kind)
    return Draft(config, drafts.init_draft(config, key, borrow(target.config, target.params).output))


def hidden_states(
    target: Target | ForeignTarget, tokens: Int[Array, "B T"], layers: tuple[int, ...] = ()
) -> Float[Array, "B T S"]:
    """The target's hidden states after the final norm, which its head and an EAGLE-1/2 draft read.

    Args:
      tokens: whole sequences from position 0, right-padded if lengths differ.
      layers: of an EAGLE-3 draft, its `config.target_layers`: their inputs stand in front of the final state, each D wide.

    Raises:
      ValueError: tokens is not [B, T], or a token is none of the target's.

    Example:
      >>> jsfdd.hidden_states(target, tokens).shape == (*tokens.shape, target.config.hidden_size)
      True
    """
    if jnp.ndim(tokens) != 2:
        raise ValueError(f"tokens has shape {jnp.shape(tokens)}, but it must be [B, T]; of one text: tokens[None]")
    if not isinstance(tokens, jax.core.Tracer):
        tokens, size = np.asarray(tokens), target.config.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            wrong = tokens[(tokens < 0) | (tokens >= size)][0]
            raise ValueError(f"tokens has {wrong}, but the target knows the ids 0 to {size - 1}; was it another tokenizer's?")
    if isinstance(target, ForeignTarget):
        return target.hidden_states(np.asarray(tokens))
    return _hidden_states(target.config, target.params, jnp.asarray(tokens), layers)


def head_logits(target: Target | ForeignTarget, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
    """The target's float32 logits: `logits[:, t]` is the distribution of token t+1 given the tokens up to t.

    The whole array [B, T, V] is large; `jsfdd.score` never makes it.

    Example:
      >>> logits = jsfdd.head_logits(target, jsfdd.hidden_states(target, tokens))
      >>> jsfdd.token_flatness(logits).shape == tokens.shape
      True
    """
    return _head_logits(target.config, target.params, hidden)


def draft_logits(
    target: Target | ForeignTarget, draft: Draft, hidden: Float[Array, "B T S"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T-1 V"]:
    """The draft's float32 logits along a text, computed from the target's hidden states, as in training.

    At t the draft reads the pair (h_t, embedding of x_{t+1}) and predicts x_{t+2}. So `draft_logits(…)[:, t]` and
    `head_logits(target, hidden)[:, t + 1]` are distributions of the same token, x_{t+2}.

    Args:
      hidden: the target's hidden states of `tokens`, with the inputs of the layers that the draft reads.

    Returns:
      −inf for tokens outside the draft's vocabulary, if it has one.

    Example:
      >>> hidden = jsfdd.hidden_states(target, tokens)
      >>> p, q = jsfdd.head_logits(target, hidden)[:, 1:], jsfdd.draft_logits(target, draft, hidden, tokens)
      >>> p.shape == q.shape
      True
    """
    return _draft_logits(target.config, draft.config, target.params, draft.params, hidden, jnp.asarray(tokens))


def score(
    target: Target | ForeignTarget,
    chats: Sequence[Chat] | Sequence[Sample],
    *,
    hidden: Mapping[str, np.ndarray] | None = None,
    per_token: bool = False,
    max_length: int = MAX_LENGTH,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> ScoreTable:
    """Score how uncertain the target is on each chat (arXiv 2601.18902, Eq. 6 and 7): a table of metrics, one row per chat.

    Args:
      chats: from `read_chats`, or tokenized samples.
      hidden: the target's hidden states by the samples' ids, [T, D] each. If they are given, only the target's head runs.
      per_token: also keep the flatness and entropy (nats) of every token.
      max_length: chats are cut after this many tokens.
      mesh: devices that share the work; all devices by default.
      progress: show a bar.

    Raises:
      ValueError: a chat that the template cannot render, or a score that is not finite; names the chat.

    Example:
      >>> table = jsfdd.score(target, chats, progress=False)
      >>> table["flatness"].shape == (len(chats),)
      True
    """
    from jsfdd.scoring.score import score_samples

    samples = _tokenized(target, chats, max_length)
    return score_samples(target, samples, mesh or make_mesh(), hidden=hidden, per_token=per_token, progress=progress)


def train(
    target: Target | ForeignTarget,
    chats: Sequence[Chat] | Sequence[Sample],
    kept: Selection | None = None,
    recipe: Recipe | None = None,
    *,
    hidden: HiddenStates | None = None,
    init: Draft | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    max_length: int = MAX_LENGTH,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Draft:
    """Train an EAGLE draft (arXiv 2401.15077; 2503.01840 with `Recipe(draft_kind="eagle3")`) on the chats that were kept.

    Hidden states and the recipe's soft targets are computed once, before the first step.

    Args:
      chats: from `read_chats`, or tokenized samples.
      kept: from `select`; None trains on all chats.
      recipe: epochs, learning rate and so on; the defaults are those of the command line.
      hidden: hidden states by the samples' ids, [T, D] each, or with the layers' inputs that the draft reads in front; or a
        function that computes those of a batch at each step (`jsfdd.hidden.capture.make_recompute`). If None, they are computed
        first.
      init: a draft to start from, whose kind and vocabulary stay; by default a fresh one.
      out: directory for hidden states, checkpoints and metrics.jsonl. An interrupted call with the same arguments continues
        there. If None, nothing is left on disk.
      seed: for the initial weights, the order of the samples and the noise.
      max_length, mesh, progress: as in `score`.

    Raises:
      ValueError: there is nothing to train on, hidden states belong to other tokens, or `out` holds another run; names it.
      FloatingPointError: a loss is not finite; names the step.

    Example:
      >>> trained = jsfdd.train(target, chats, recipe=jsfdd.Recipe(epochs=1, held_out_share=0.0), progress=False)
      >>> trained.config == draft.config
      True
    """
    from jsfdd.base.lock import sole_writer
    from jsfdd.data.held_out import split_held_out
    from jsfdd.hidden.capture import store_hidden
    from jsfdd.models.sharding import split_vocabulary
    from jsfdd.selection.sfdd import selected_samples
    from jsfdd.training.batch import TrainingData
    from jsfdd.training.draft_shape import draft_of
    from jsfdd.training.loss import borrow
    from jsfdd.training.recipe import Recipe
    from jsfdd.training.soft_store import store_soft_targets
    from jsfdd.training.train import train as train_draft

    if isinstance(kept, Recipe):
        raise TypeError("the third argument is the selection; give the recipe as recipe=…")
    recipe, mesh = recipe or Recipe(), mesh or make_mesh()
    if recipe.weighs_tokens:
        raise ValueError("a recipe that weighs tokens needs their scores: see jsfdd.selection.tokens and jsfdd.training.train")
    samples = _tokenized(target, chats, max_length)
    _, held_out = split_held_out(samples, recipe.held_out_share)
    held_out_ids = {sample.id for sample in held_out}
    selected = samples if kept is None else selected_samples(kept, samples)
    learned = [sample for sample in selected if sample.id not in held_out_ids]
    shared = {"identity": {"target": target.fingerprint}, "progress": progress}
    with tempfile.TemporaryDirectory() if out is None else nullcontext(out) as folder:
        folder, draft = Path(folder), draft_of(target.config, recipe, learned, init and init.config)
        folder.mkdir(parents=True, exist_ok=True)
        with sole_writer(folder):
            if hidden is None:
                hidden = store_hidden(
                    target, [*learned, *held_out], mesh, directory=folder / "hidden", layers=draft.target_layers, **shared
                )
            data = TrainingData(learned, hidden)
            kind = recipe.stored_soft_targets(hidden_is_stored=not callable(hidden))
            if kind is not None:
                borrowed = split_vocabulary(borrow(target.config, target.params), mesh)
                soft_targets = store_soft_targets(
                    kind, data, borrowed, draft, recipe, mesh, directory=folder / "soft_targets", **shared
                )
                data = data._replace(soft_targets=soft_targets)
            result = train_draft(
                target,
                data,
                TrainingData(held_out, hidden),
                recipe,
                mesh,
                out=folder,
                seed=seed,
                draft=draft,
                init=init,
                **shared,
            )
    return result.draft


class Evaluation(NamedTuple):
    """A draft's acceptance and speed.

    Attributes:
      tau: tokens emitted per verification by the target, the bonus token included; `tau_low` and `tau_high` are the bounds of
        its 95% interval over prompts.
      alpha: for each depth, the share of verified draft tokens that were accepted; None if none was verified.
      same_text_share: the share of prompts whose answers equal plain decoding's, token for token; None for sampled chains.
      speedup: tokens per second, divided by those of plain decoding on the same prompts.
      report: all figures, as in report.json.
    """

    tau: float
    tau_low: float
    tau_high: float
    alpha: list[float | None]
    same_text_share: float | None
    speedup: float
    report: dict


def evaluate(
    target: Target,
    draft: Draft,
    prompts: Sequence[str] | Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    num_draft_tokens: int = 4,
    temperature: float = 0.0,
    tree: TreeShape | None = None,
    batch_size: int = 8,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Measure a draft by speculative decoding, compared with plain decoding of the same prompts (arXiv 2211.17192).

    Args:
      prompts: one user message each; or from `read_prompts`, also with several turns.
      max_new_tokens: the longest answer.
      num_draft_tokens: how many tokens the draft proposes per verification.
      temperature: 0 is greedy.
      tree: verify trees of this shape, of depth `num_draft_tokens`; chains if None.
      batch_size: prompts decoded together.
      seed: for sampling and for the intervals.
      mesh: devices that share the rows; all devices by default.

    Raises:
      ValueError: a prompt with its answer is longer than the target's context, or the draft belongs to another target.

    Example:
      >>> result = jsfdd.evaluate(target, draft, ["Why is the sky blue?"], max_new_tokens=8)
      >>> result.tau >= 1, result.same_text_share
      (True, 1.0)
    """
    from jsfdd.evaluation.evaluate import evaluate as evaluate_drafts

    if isinstance(target, ForeignTarget):
        raise ValueError(f"{target.name} is a foreign target: decoding needs its layers; load it with `load_target`")
    if isinstance(prompts, str):
        raise TypeError("prompts is one string; give a list of them: [prompt]")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but it must be 1 or more")
    prompts = [Prompt(f"p{i}", "prompts", (text,)) if isinstance(text, str) else text for i, text in enumerate(prompts)]
    report = evaluate_drafts(
        target,
        {"draft": draft},
        prompts,
        mesh or make_mesh(),
        temperature=temperature,
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        tree=tree,
    )["draft"]
    return Evaluation(**{name: report[name] for name in Evaluation._fields if name != "report"}, report=report)


def export(
    draft: Draft,
    directory: str | Path,
    flavour: Flavour = "vllm",
    *,
    dtype: ExportDtype = "keep",
    served_target: str | None = None,
) -> None:
    """Write a draft for a serving engine: config.json, model.safetensors and a model card.

    Args:
      directory: must not exist yet.
      flavour: the engine's layout; see `jsfdd.weights.export`.
      dtype: dtype of the tensors; "keep" leaves them as they are.
      served_target: the target's name on the server, for the card; the flavour speculators needs it.

    Raises:
      FileExistsError: the directory exists already.
      ValueError: the flavour cannot represent the draft; names the reason.

    Example:
      >>> jsfdd.export(draft, "draft-vllm")
      >>> jsfdd.load_draft("draft-vllm").config == draft.config
      True
    """
    from jsfdd.weights.card import Flavour, Provenance, Serving
    from jsfdd.weights.export import ExportDtype, write_draft

    for name, value, known in (("flavour", flavour, Flavour), ("dtype", dtype, ExportDtype)):
        if value not in get_args(known):
            raise ValueError(f"{name} {value!r} is unknown; choose from {', '.join(get_args(known))}")
    provenance = Provenance(training=draft.record)
    write_draft(
        directory, draft.config, draft.params, flavour, dtype=dtype, serving=Serving(served_target), provenance=provenance
    )


def _tokenized(target: Target | ForeignTarget, chats: Sequence[Chat] | Sequence[Sample], max_length: int) -> list[Sample]:
    if all(isinstance(chat, Sample) for chat in chats):
        return list(chats)
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}, but it must be 1 or more")
    if target.tokenizer is None:
        raise ValueError(f"{target.name} has no tokenizer: give tokenized samples, or the target with a tokenizer")
    from jsfdd.data.template import tokenize_chats

    return tokenize_chats(chats, target.tokenizer, max_length, vocab_size=target.config.vocab_size)[0]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _hidden_states(config, params, tokens, layers):
    return targets.hidden_states(config, params, tokens, layers)


@functools.partial(jax.jit, static_argnums=0)
def _head_logits(config, params, hidden):
    return targets.head_logits(config, params, hidden)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draft_logits(target_config, config, target_params, params, hidden, tokens):
    embedding = targets.embed_tokens(target_config, target_params, tokens[:, 1:])
    layer = drafts.layer_of(config)
    state = layer.apply({"params": params}, hidden[:, :-1], method="read")
    state, _ = layer.apply({"params": params}, embedding, state, (), method="harmonised")
    return drafts.draft_head_logits(target_config, target_params, config, params, state)
