"""The model card of an exported draft: its architecture, measured acceptance, training data, and how to serve it."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from jsfdd.base.files import read_json

if TYPE_CHECKING:
    from jsfdd.models.architecture import DecoderConfig
    from jsfdd.models.draft import DraftConfig, DraftKind

Flavour = Literal["vllm", "sglang", "eagle", "speculators", "tpu-inference", "sglang-jax"]
ExportDtype = Literal["keep", "float32", "bfloat16", "float16"]

_REPORT_KEYS = ("config", "tau", "tau_low", "tau_high", "alpha", "n_prompts")
_PLACEHOLDER = "TARGET"


class Serving(NamedTuple):
    """The settings for a server, besides the draft.

    Attributes:
      target: hub name, directory or .gguf file of the target, if known.
      num_draft_tokens: draft tokens per verification.
    """

    target: str | None = None
    num_draft_tokens: int = 4

    @property
    def target_name(self) -> str | None:
        """`target` if a server can find Hugging Face weights by it."""
        known = self.target is not None and self.target != "smollm2" and not self.target.endswith(".gguf")
        return self.target if known else None


class Provenance(NamedTuple):
    """The origin of a draft; None for what is unknown.

    Attributes:
      training: the identity that its training run's checkpoint holds.
      selection: selection.json's metric, retain_ratio, thresholds, within, seed, the counts kept and dropped, and sha256.
      reports: report.json of `jsfdd evaluate` each, of one temperature or several.
    """

    training: dict | None = None
    selection: dict | None = None
    reports: tuple[dict, ...] = ()


def read_report(path: Path) -> dict:
    """A report.json of `jsfdd evaluate`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: damaged, or without a field that a model card shows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    report = read_json(path, dict)
    missing = [key for key in _REPORT_KEYS if key not in report]
    if missing:
        raise ValueError(f"{path}: no field {', '.join(missing)}; give a report.json of `jsfdd evaluate`")
    return report


def model_card(name: str, config: DraftConfig, flavour: Flavour, dtype: str, serving: Serving, provenance: Provenance) -> str:
    """README.md of the directory `name`, with the metadata block that model hubs read."""
    target = serving.target_name
    head = ["---", *([f"base_model: {json.dumps(target)}"] if target else [])]
    head += ["tags:", *(f"- {tag}" for tag in dict.fromkeys(["speculative-decoding", config.kind, flavour])), "---"]
    d, name_of_kind = config.decoder, "EAGLE" if config.kind == "eagle" else "EAGLE-3"
    about = (
        f"One decoder layer that proposes tokens for a target of hidden size {d.hidden_size} and {d.vocab_size} tokens, which "
        f"the target then verifies: its text stays the target's own. {d.num_heads} query and {d.num_kv_heads} key heads of "
        f"{d.head_dim}, feed-forward {d.intermediate_size}, rope theta {d.rope.theta:g} ({d.rope.kind}), up to "
        f"{extended_context(d)} positions, {dtype}. {_parts(config)} Written by jsfdd {version('jsfdd')}, flavour {flavour}."
    )
    sections = [
        "\n".join(head),
        f"# {name_of_kind} draft for {target or serving.target or 'a target that was not named'}",
        about,
        "## Serving",
        *_serving(name, config.kind, flavour, serving),
        _token_map(name, config, flavour, measured=bool(provenance.reports)),
        "## Acceptance",
        *_acceptance(provenance.reports, flavour),
        "## Training data",
        _selection(provenance.selection),
        _training(provenance.training),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def extended_context(decoder: DecoderConfig) -> int:
    """The last position that a decoder is meant for: max_position, or the context as YaRN extends it.

    Beyond the draft's length vLLM silently stops drafting. Engines apply a linear factor by themselves.
    """
    rope = decoder.rope
    extended = round(rope.factor * rope.original_max_position) if rope.kind == "yarn" else 0
    return max(decoder.max_position, extended)


def _parts(config: DraftConfig) -> str:
    """What the draft borrows, and what it reads."""
    size = config.decoder.vocab_size
    if config.kind == "eagle":
        few = f" It proposes {len(config.vocabulary)} of the {size} tokens." if config.vocabulary else ""
        return f"Embedding and head are the target's.{few}"
    layers = [str(number) for number in config.target_layers]
    return (
        f"It reads what enters the target's layers {', '.join(layers)}, counted from 0, and has a head of its own over "
        f"{len(config.vocabulary) or size} of the {size} tokens. The embedding is the target's."
    )


def _serving(name: str, kind: DraftKind, flavour: Flavour, serving: Serving) -> list[str]:
    """How its engine loads the directory `name`."""
    target = shlex.quote(serving.target_name or _PLACEHOLDER)
    lines = {
        "vllm": _vllm,
        "sglang": _sglang,
        "eagle": _eagle,
        "speculators": _speculators,
        "tpu-inference": _tpu_inference,
        "sglang-jax": _sglang_jax,
    }
    language, code, note = lines[flavour](target, f"./{name}", kind, serving)
    if serving.target_name is None and _PLACEHOLDER in code:
        trained = f"; the draft was trained for {serving.target}" if serving.target else ""
        stands = f"{_PLACEHOLDER} stands for the hub name or directory of the target's Hugging Face weights{trained}."
        note = f"{stands} {note}".rstrip()
    return [f"```{language}\n{code}\n```", *([note] if note else [])]


def _token_map(name: str, config: DraftConfig, flavour: Flavour, measured: bool) -> str:
    """What an engine does with an EAGLE-1/2 draft that was trained to propose few tokens."""
    from jsfdd.weights.draft_vocabulary import VOCABULARY_FILE

    if config.kind == "eagle3" or not config.vocabulary:
        return ""
    if flavour == "sglang":
        convert = f"torch.save(json.load(open('./{name}/{VOCABULARY_FILE}')), './{name}/token_map.pt')"
        return (
            f"With `--speculative-token-map ./{name}/token_map.pt` it proposes those of {VOCABULARY_FILE} alone, which saves "
            f'most of the head\'s product. Make the map once: `python -c "import json, torch; {convert}"`. Without it '
            "all tokens are proposed."
        )
    whole = f"This engine reads no {VOCABULARY_FILE}: it takes the target's whole head and lets the draft propose all tokens."
    return f"{whole} The acceptance below was measured with those tokens alone." if measured else whole


def _vllm(target: str, draft: str, kind: DraftKind, serving: Serving) -> tuple[str, str, str]:
    speculation = {"method": kind, "model": draft, "num_speculative_tokens": serving.num_draft_tokens}
    speculation["draft_sample_method"] = "probabilistic"
    code = f"vllm serve {target} --speculative-config {shlex.quote(json.dumps(speculation))}"
    return "sh", code, "Of vLLM 0.32. Without `draft_sample_method` it proposes the likeliest token, and at T > 0 accepts less."


def _sglang(target: str, draft: str, kind: DraftKind, serving: Serving) -> tuple[str, str, str]:
    return "sh", _sglang_line("sglang", target, draft, kind, serving), ""


def _sglang_jax(target: str, draft: str, kind: DraftKind, serving: Serving) -> tuple[str, str, str]:
    return "sh", _sglang_line("sgl_jax", target, draft, kind, serving), ""


def _sglang_line(package: str, target: str, draft: str, kind: DraftKind, serving: Serving) -> str:
    depth = serving.num_draft_tokens
    return (
        f"python -m {package}.launch_server --model-path {target} --speculative-algorithm {kind.upper()} \\\n"
        f"  --speculative-draft-model-path {shlex.quote(draft)} --speculative-num-steps {depth} \\\n"
        f"  --speculative-eagle-topk 1 --speculative-num-draft-tokens {depth + 1}"
    )


def _eagle(target: str, draft: str, kind: DraftKind, serving: Serving) -> tuple[str, str, str]:
    base = serving.target_name or _PLACEHOLDER
    code = (
        "from eagle.model.ea_model import EaModel\n"
        f"EaModel.from_pretrained(use_eagle3={kind == 'eagle3'}, base_model_path={base!r}, ea_model_path={draft!r})"
    )
    return "python", code, ""


def _speculators(target: str, draft: str, kind: DraftKind, serving: Serving) -> tuple[str, str, str]:
    if kind == "eagle3":
        return "sh", f"vllm serve {shlex.quote(draft)}", "vLLM reads from the directory which target it is for."
    note = (
        "The speculators package has EAGLE-1 drafts up to version 0.4. vLLM 0.32 takes only later algorithms in this "
        "format: to serve the draft there, export it with `--flavour vllm`."
    )
    return "python", f"from speculators import SpeculatorModel\nSpeculatorModel.from_pretrained({draft!r})", note


def _tpu_inference(target: str, draft: str, kind: DraftKind, serving: Serving) -> tuple[str, str, str]:
    speculation = {"method": kind, "model": draft, "num_speculative_tokens": serving.num_draft_tokens}
    speculation["draft_tensor_parallel_size"] = 1
    code = (
        "MODEL_IMPL_TYPE=flax_nnx DRAFT_MODEL_IMPL_TYPE=flax_nnx \\\n"
        f"  vllm serve {target} --speculative-config {shlex.quote(json.dumps(speculation))}"
    )
    return "sh", code, "Of tpu-inference 0.32, whose Llama targets alone give an EAGLE-3 draft what it reads."


def _acceptance(reports: tuple[dict, ...], flavour: Flavour) -> list[str]:
    if not reports:
        return ["Not measured yet: `jsfdd evaluate` makes a report.json, and `jsfdd export --report` puts its figures here."]
    sampled = any(report["config"]["temperature"] > 0 and not report["config"].get("tree_nodes") for report in reports)
    remark = (
        "At a temperature above 0 the drafts measured here were drawn from their distribution. This engine proposes the "
        "likeliest token instead: expect less."
    )
    return [*map(_figures, reports), *([remark] if sampled and flavour != "vllm" else [])]


def _figures(report: dict) -> str:
    options = report["config"]
    prompts = ", ".join(Path(path).name for path in options["prompts"])
    temperature = options["temperature"]
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    nodes, depth = options.get("tree_nodes", 0), options["num_draft_tokens"]
    proposal = f"a tree of {nodes} draft tokens, {depth} deep" if nodes else f"a chain of {depth} draft tokens"
    tau = "τ could not be measured (no answer was longer than one token)"
    if report["tau"] is not None:
        tau = f"**τ = {report['tau']:.3f}** [{report['tau_low']:.3f}, {report['tau_high']:.3f}]"
    alpha = ", ".join("–" if value is None else f"{value:.3f}" for value in report["alpha"])
    return (
        f"{tau}: tokens emitted per verification by the target, its own included, with 95% bootstrap interval over "
        f"{report['n_prompts']} prompts ({prompts}); {how}, {proposal}, "
        f"answers up to {options['max_new_tokens']} tokens. Accepted by depth, given that it was reached: "
        f"{alpha}."
    )


def _selection(selection: dict | None) -> str:
    if selection is None:
        return ""
    thresholds = ", ".join(f"{name} {value:g}" for name, value in selection["thresholds"].items())
    return (
        f"Selected by {selection['metric']}: {selection['kept']} conversations kept (retain ratio "
        f"{selection['retain_ratio']:g}, within {selection['within']}, thresholds {thresholds}, seed "
        f"{selection['seed']}; {selection['dropped']} had no token that counts). sha256 of selection.json: "
        f"`{selection['sha256']}`."
    )


def _training(training: dict | None) -> str:
    if training is None:
        return "Not known: the draft was exported from a directory that does not say."
    return "What its training run depended on:\n\n```json\n" + json.dumps(training, indent=1, ensure_ascii=False) + "\n```"
