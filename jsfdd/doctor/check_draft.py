"""The doctor's checks of configs and records: the draft's config against the target's, and the record of its training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jsfdd.base.records import Sample, samples_digest
from jsfdd.data.held_out import split_held_out
from jsfdd.doctor.findings import Finding
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.layers import rope_frequencies


def check_architecture(target: DecoderConfig, draft: DecoderConfig) -> list[Finding]:
    """Compare widths, vocabulary, heads, norm and context. `check_acceptance` compares the rotation: it can try it, too."""
    return [
        _check_equal(
            "vocabulary", "error", target, draft, ("vocab_size",),
            "The draft's logits come from the target's head, so another vocabulary means another target.",
            "give the target that the draft was trained for",
        ),
        _check_equal(
            "hidden-size", "error", target, draft, ("hidden_size",),
            "The draft reads and writes the target's hidden states, so it cannot run on this target.",
            "give the target that the draft was trained for",
        ),
        _check_equal(
            "heads", "warning", target, draft, ("num_heads", "num_kv_heads", "head_dim"),
            "Weights of one shape can be cut into heads in several ways, so a wrong count computes something else without "
            "an error.",
            "make sure that the draft's config.json has the head counts and head_dim it was trained with",
        ),
        _check_equal(
            "rms-eps", "warning", target, draft, ("rms_norm_eps",),
            "jsfdd trains drafts with the target's value.",
            "write the value that the draft was trained with into its config.json",
        ),
        _check_max_position(target, draft),
    ]  # fmt: skip


def ropes_agree(target: DecoderConfig, draft: DecoderConfig) -> bool:
    """Whether both rotate by the same angles: what files call it does not matter."""
    (a, a_scale), (b, b_scale) = (rope_frequencies(config.rope, config.head_dim) for config in (target, draft))
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-6, atol=0)) and bool(np.isclose(a_scale, b_scale))


def describe_rope(rope: Rope) -> str:
    """Describe how a rope differs from a plain rotation."""
    changed = [
        f"{field.name} {getattr(rope, field.name):g}"
        for field in dataclasses.fields(Rope)
        if field.name not in ("theta", "kind", "frequency_divisors") and getattr(rope, field.name) not in (field.default, None)
    ]
    divisors = ["a table of divisors"] if rope.frequency_divisors else []
    kind = "no scaling" if rope.kind == "default" and not divisors else f"{rope.kind} scaling"
    return ", ".join([f"theta {rope.theta:g}", kind, *(changed if rope.kind != "default" else []), *divisors])


def check_record(record: dict | None, identity: dict, samples: Sequence[Sample]) -> list[Finding]:
    """Compare what the draft's training run recorded with what is given now.

    Args:
      record: the identity in the draft's checkpoint; None for an exported directory, which has none.
      identity: of target, template and data now, as `jsfdd.commands.inputs` makes it.
      samples: tokenized with the record's own max_length.
    """
    if record is None:
        return [
            Finding(
                "training-record",
                "note",
                "An exported draft does not say which target, template and tokens it was trained on: nothing to compare.",
                "run the doctor on the training run's directory to compare them",
            )
        ]
    return [
        _check_same(
            "training-target", "warning", record, identity, "target",
            "The draft was trained on this very target.",
            "The draft was trained on other weights or another file of them (a file in another format also reads as other).",
            "give the file that was trained on, or train for this one; if it is the same model in another format, the "
            "checks of acceptance below tell",
        ),
        _check_same(
            "training-template", "error", record, identity, "template",
            "The draft was trained with this very chat template.",
            "The chat template is not the one that the draft was trained with, so it is served on other prompts.",
            "restore the template that was trained with (chat_template.jinja or tokenizer_config.json), or train again",
        ),
        _check_same(
            "training-dtype", "note", record, identity, "dtype",
            "The target computes in the dtype that the draft was trained on.",
            f"The draft was trained on the target in {record.get('dtype')} and is examined in {identity['dtype']}.",
            "give --dtype as in training to compare like with like",
        ),
        _check_tokens(record, identity, samples),
    ]  # fmt: skip


def _check_equal(name, severity, target, draft, fields, why, remedy) -> Finding:
    values = {field: (getattr(target, field), getattr(draft, field)) for field in fields}
    figures = {field: {"target": a, "draft": b} for field, (a, b) in values.items()}
    # GGUF files hold float32: 1e-5 comes back as 9.9999997e-06.
    different = [
        f"{field} is {a:g} in the target and {b:g} in the draft"
        for field, (a, b) in values.items()
        if not math.isclose(a, b, rel_tol=1e-6)
    ]
    if different:
        return Finding(name, severity, f"{'; '.join(different)}. {why}", remedy, figures)
    same = ", ".join(f"{field} {a:g}" for field, (a, _) in values.items())
    return Finding(name, "ok", f"Target and draft agree: {same}.", figures=figures)


def _check_max_position(target: DecoderConfig, draft: DecoderConfig) -> Finding:
    figures = {"target": target.max_position, "draft": draft.max_position}
    if draft.max_position >= target.max_position:
        says = f"The draft's context of {draft.max_position} tokens holds the target's."
        return Finding("max-position", "ok", says, "", figures)
    return Finding(
        "max-position",
        "warning",
        f"The draft's context ends at {draft.max_position} tokens and the target's at {target.max_position}: past the draft's, "
        "servers crash or stop drafting.",
        f"set max_position_embeddings to {target.max_position} in the draft's config.json, or limit the server's context",
        figures,
    )


def _check_same(name, severity, record, identity, key, same, different, remedy) -> Finding:
    recorded, current = record.get(key), identity[key]
    figures = {"trained": recorded, "given": current}
    if recorded is None:
        return Finding(name, "note", f"The training run did not record its {key}, so it cannot be compared.", "", figures)
    return (
        Finding(name, "ok", same, "", figures) if recorded == current else Finding(name, severity, different, remedy, figures)
    )


def _check_tokens(record: dict, identity: dict, samples: Sequence[Sample]) -> Finding:
    """The held-out samples of a run depend on the data alone, not on what was selected, and their digest was recorded."""
    name = "training-tokens"
    try:
        share, digest = record["options"]["held_out_share"], record["held_out"]
        comparable = record["data"] == identity["data"] and record["max_length"] == identity["max_length"]
    except KeyError as error:
        return Finding(name, "note", f"The training run did not record {error}, so its tokens cannot be compared.")
    held_out = split_held_out(samples, share)[1]
    if not comparable:
        return Finding(
            name, "note", "The draft was trained on other data, so its tokens cannot be compared.",
            "give the --data that the draft was trained on to compare tokens and loss masks",
        )  # fmt: skip
    if not held_out:
        return Finding(name, "note", "The training run held nothing out, so its tokens cannot be compared.")
    if samples_digest(held_out) == digest:
        return Finding(
            name, "ok", f"The {len(held_out)} held-out conversations have the tokens and loss masks that they had in training.",
            figures={"held_out": len(held_out)},
        )  # fmt: skip
    return Finding(
        name,
        "error",
        f"The same data gives other tokens or loss masks than in training (seen on {len(held_out)} held-out conversations): "
        "the tokenizer, the template or jsfdd's masking has changed since.",
        "restore the tokenizer and template that were trained with, or train again",
        {"held_out": len(held_out)},
    )
