"""`jsfdd export`: write a draft as a directory that a serving engine loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.commands.options import (
    DecodingOptions,
    ExportOptions,
    OptionalPath,
    OptionalText,
    Paths,
    check,
    check_num_draft_tokens,
)
from jsfdd.commands.outcome import Outcome, planned

if TYPE_CHECKING:
    from jsfdd.models.draft import Draft
    from jsfdd.weights.card import Provenance, Serving

EXAMPLES = """
jsfdd export --draft draft --flavour vllm --out draft-vllm
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a draft and its model card in the layout of a serving engine."""

    export: ExportOptions = ExportOptions()
    draft: Path
    """A training run's directory, its checkpoints/, an exported draft, or `smollm2` (the packaged draft of that target)."""
    out: Path
    """Directory to write. It must not exist yet."""
    target: OptionalText = None
    """Hub name or directory where a server finds the target, for the model card. Default: the target in the report."""
    report: Paths = ()
    """One or more report.json from `jsfdd evaluate`, for the model card. Default: the one in the training run's directory."""
    selection: OptionalPath = None
    """selection.json from `jsfdd select`, for the model card. Default: the one in the training run's directory."""
    num_draft_tokens: int = DecodingOptions.num_draft_tokens
    """Draft tokens in a row (γ) that the model card and the config recommend."""

    def __post_init__(self):
        check_num_draft_tokens(self.num_draft_tokens)
        check("--flavour", self.export.flavour, self.export.flavour != "none", "a layout; `none` is of `jsfdd run`")


class Prepared(NamedTuple):
    """The contents of the exported directory."""

    draft: Draft
    serving: Serving
    provenance: Provenance


def prepare(config: ExportConfig) -> Prepared:
    """Read the draft and the files for its card. ValueError names what the flavour cannot represent."""
    from jsfdd.weights.card import Serving
    from jsfdd.weights.draft import load_draft
    from jsfdd.weights.flavours import check_flavour

    draft = load_draft(config.draft)
    provenance = _provenance(config, draft.record)
    named = provenance.reports[0]["config"]["target"] if provenance.reports else None
    serving = Serving(config.target or named, config.num_draft_tokens)
    check_flavour(draft.config, config.export.flavour, serving)
    return Prepared(draft, serving, provenance)


def run(config: ExportConfig, prepared: Prepared) -> Outcome:
    export(config, prepared)
    values = {"command": "export", "flavour": config.export.flavour, "draft": config.out}
    values["files"] = sorted(file.name for file in config.out.iterdir())
    return Outcome(values, f"{config.export.flavour} draft: {config.out}")


def describe(config: ExportConfig, prepared: Prepared) -> Outcome:
    if config.out.exists():
        raise FileExistsError(f"{config.out}: already there; choose another --out or remove it")
    decoder = prepared.draft.config.decoder
    values = {"flavour": config.export.flavour, "hidden_size": decoder.hidden_size, "vocab_size": decoder.vocab_size}
    words = [f"write a draft of width {decoder.hidden_size:,} in the layout of {config.export.flavour}"]
    names = ["config.json", "model.safetensors", "README.md"]
    if prepared.draft.config.kind == "eagle" and prepared.draft.config.vocabulary:
        names.append("draft_vocabulary.json")
    return planned("export", values, words, config.out, names)


def export(config: ExportConfig, prepared: Prepared | None = None) -> None:
    """Write the directory."""
    from jsfdd.base.lock import sole_writer
    from jsfdd.weights.export import write_draft

    draft, serving, provenance = prepared or prepare(config)
    flavour, dtype = config.export.flavour, config.export.export_dtype
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with sole_writer(config.out, moved=True):
        write_draft(config.out, draft.config, draft.params, flavour, dtype=dtype, serving=serving, provenance=provenance)


def _provenance(config: ExportConfig, identity: dict | None) -> Provenance:
    """Read what the model card states from the files that the config names, or else from the training run's directory."""
    from jsfdd.selection.sfdd import selection_facts
    from jsfdd.weights.card import Provenance, read_report

    run = config.draft.parent if config.draft.name == "checkpoints" else config.draft
    reports = config.report or tuple(path for path in (run / "report.json",) if path.exists())
    selection = config.selection or run / "selection.json"
    return Provenance(
        training=identity,
        selection=selection_facts(selection, identity) if config.selection or selection.exists() else None,
        reports=tuple(read_report(path) for path in reports),
    )
