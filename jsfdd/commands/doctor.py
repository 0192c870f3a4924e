"""`jsfdd doctor`: find faults that make a draft accept less when served than in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.commands.inputs import describe_target, identity_of, load_weights, longest_sample, show_counts, target_dtype
from jsfdd.commands.options import (
    ChatOptions,
    DecodingOptions,
    Flag,
    MaskSpans,
    ModelOptions,
    OptionalPath,
    Paths,
    check,
    check_at_least,
    check_num_draft_tokens,
    to_json,
)
from jsfdd.commands.outcome import Outcome, described, many, rendered

if TYPE_CHECKING:
    from jsfdd.base.records import Sample
    from jsfdd.data.chat import Chat
    from jsfdd.data.template import TokenizeSummary
    from jsfdd.doctor.findings import Diagnosis
    from jsfdd.hidden.store import HiddenStore
    from jsfdd.models.draft import Draft

_READ = 6  # how many conversations the target reads and answers

EXAMPLES = """
jsfdd doctor --target smollm2 --data chats.jsonl --draft draft
jsfdd doctor --target DIR --data chats.jsonl --draft draft-vllm && vllm serve …
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Find faults that make a draft accept less when served than in training.

    The exit code is 1 if there is an error."""

    model: ModelOptions
    data: Paths
    """Chats, as for `jsfdd score`."""
    mask_spans: MaskSpans = ()
    """Parts of answers that are read but neither scored nor trained on, as for `jsfdd train`."""
    split_answers: Flag = False
    """As for `jsfdd train`."""
    draft: Paths = ()
    """A training run's directory, its checkpoints/, or an exported draft. Without it, only target and data are examined."""
    hidden_from: OptionalPath = None
    """A store of hidden states to compare with newly computed ones. Default: hidden/ in the training run's directory."""
    num_draft_tokens: int = DecodingOptions.num_draft_tokens
    """Draft tokens in a row (γ)."""
    max_new_tokens: int = DecodingOptions.max_new_tokens
    """Longest answer, in tokens."""
    out: OptionalPath = None
    """Directory for doctor.json. Without it, the findings are only printed."""

    def __post_init__(self):
        check("--data", self.data, len(self.data) > 0, "at least one chat file")
        check("--draft", list(map(str, self.draft)), len(self.draft) < 2, "one draft or none")
        check_num_draft_tokens(self.num_draft_tokens)
        check_at_least(1, max_new_tokens=self.max_new_tokens)
        if self.model.model_shards > 1:
            raise ValueError("--model-shards: doctor examines on one device; leave the option out")


class Prepared(NamedTuple):
    """The inputs to examine. Conversations are cut at the same length as in the draft's training, so that tokens and masks
    can be compared.

    Attributes:
      chats: the chats of some of the samples.
    """

    chats: list[Chat]
    draft: Draft | None
    store: HiddenStore | None
    max_length: int
    samples: Sequence[Sample]
    summary: TokenizeSummary


def prepare(config: DoctorConfig) -> Prepared:
    from jsfdd.data.chat import ReadCounts, stream_chats
    from jsfdd.data.tokenized import read_samples, usable_processes
    from jsfdd.doctor.check_data import EXAMINED
    from jsfdd.doctor.findings import spread_over
    from jsfdd.weights.draft import load_draft

    target = describe_target(config.model)
    draft = load_draft(config.draft[0], target.config.num_layers) if config.draft else None
    record = (draft and draft.record) or {}
    store = _find_store(config)
    max_length = record.get("max_length", ChatOptions.max_length)
    max_length = longest_sample(target, max_length)
    tokenized = read_samples(
        config.data, target.tokenizer, max_length, config.mask_spans, vocab_size=target.config.vocab_size,
        split_answers=config.split_answers, max_skipped=1.0, processes=usable_processes(),
    )  # fmt: skip
    show_counts(tokenized.files, tokenized.notes)
    names = {sample.id for sample in spread_over(tokenized.samples, EXAMINED)}
    names |= {name.rpartition("/")[0] for name in names}  # of one answer's sample
    chats = [chat for chat in stream_chats(config.data, ReadCounts()) if chat.id in names]
    return Prepared(chats, draft, store, max_length, tokenized.samples, tokenized.summary)


def run(config: DoctorConfig, prepared: Prepared) -> Outcome:
    from jsfdd.doctor.findings import print_diagnosis

    diagnosis = doctor(config, prepared)
    words = rendered(lambda out: print_diagnosis(diagnosis, out)).rstrip("\n")
    return Outcome({"command": "doctor"} | diagnosis.to_json(), words, 1 if diagnosis.worst == "error" else 0)


def describe(config: DoctorConfig, prepared: Prepared) -> Outcome:
    values = {"samples": len(prepared.samples), "draft": list(map(str, config.draft)), "hidden": prepared.store is not None}
    parts = ["target and data", *map(str, config.draft), *["stored hidden states"] * (prepared.store is not None)]
    return described("doctor", values, [f"examine {', '.join(parts)}, on {many(len(prepared.samples), 'conversation')}"])


def doctor(config: DoctorConfig, prepared: Prepared | None = None) -> Diagnosis:
    """Examine the inputs, write doctor.json if --out is given, and return the findings."""
    from jsfdd.base.files import write_json
    from jsfdd.base.progress import console
    from jsfdd.doctor.examine import examine
    from jsfdd.weights.target import locate_target

    chats, draft, store, max_length, samples, summary = prepared or prepare(config)
    target = load_weights(config.model)
    with console.status("examining") as status:
        diagnosis = examine(
            target,
            locate_target(config.model.target),
            chats,
            samples,
            summary,
            identity_of(target, config.data, max_length, target_dtype(config.model)),
            draft,
            store,
            conversations=_READ,
            num_draft_tokens=config.num_draft_tokens,
            max_new_tokens=config.max_new_tokens,
            masks_spans=bool(config.mask_spans),
            progress=status.update,
        )
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "doctor.json", diagnosis.to_json() | {"config": to_json(config)})
    return diagnosis


def _find_store(config: DoctorConfig) -> HiddenStore | None:
    """Open the store of --hidden-from, or else the one in the training run's directory if there is one."""
    from jsfdd.hidden.store import HiddenStore

    if config.hidden_from is not None:
        return HiddenStore.open(config.hidden_from, identity=None)
    beside = config.draft[0] / "hidden" if config.draft else None
    return HiddenStore.open(beside, identity=None) if beside is not None and beside.is_dir() else None
