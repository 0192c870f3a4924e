"""The EAGLE-3 settings of a draft's config.json, besides its decoder layer: the target's layers that it reads, and its norms.

Engines number the target's layers in two ways. At the top level (vLLM, speculators) `eagle_aux_hidden_state_layer_ids` counts
the layers that were passed, so that 2 is what enters layer 2, as in `DraftConfig.target_layers`; inside of `eagle_config`
(SGLang) the same names the layer whose output is read, which is one less. Files that say neither mean 2, N // 2 and N − 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsfdd.models.draft import DraftKind, default_layers

LAYERS = "eagle_aux_hidden_state_layer_ids"
NORM_FLAGS = ("norm_before_fc", "fc_norm", "norm_output", "norm_before_residual")


def draft_kind(raw: dict[str, Any]) -> DraftKind:
    """Which kind of draft a config.json describes: EAGLE-3 has a class name or a draft vocabulary that says so."""
    named = [raw.get("speculators_model_type"), *(raw.get("architectures") or [])]
    spelled = [str(name).lower().replace("-", "").replace("_", "") for name in named]
    return "eagle3" if any("eagle3" in name for name in spelled) or "draft_vocab_size" in raw else "eagle"


def eagle3_settings(path: Path, raw: dict[str, Any], num_layers: int | None) -> dict[str, Any]:
    """The fields of `DraftConfig` that only EAGLE-3 drafts use.

    Args:
      path, raw: config.json and what it holds.
      num_layers: the target's, for a draft that does not say which it reads.

    Raises:
      ValueError: a field is malformed, contradicts another, or asks for what jsfdd does not compute.
    """
    _refuse_what_is_not_computed(path, raw)
    flags = {flag: _flag(path, raw, flag) for flag in NORM_FLAGS}
    if raw.get("use_aux_norm"):  # SGLang's older name
        flags["fc_norm"] = True
    return {"target_layers": _target_layers(path, raw, num_layers), **flags}


def _refuse_what_is_not_computed(path: Path, raw: dict[str, Any]) -> None:
    nested = _nested(path, raw)
    decoder = raw.get("transformer_layer_config") or raw
    width, target_width = decoder.get("hidden_size"), raw.get("target_hidden_size")
    if target_width not in (None, width):
        raise ValueError(
            f"{path}: target_hidden_size is {target_width} and hidden_size {width}: a draft of another width than its target "
            "has an embedding of its own, which jsfdd does not compute"
        )
    if nested.get("use_aux_hidden_state", True) is not True:
        raise ValueError(
            f"{path}: eagle_config.use_aux_hidden_state is {nested['use_aux_hidden_state']!r}: a draft that reads the final "
            "state alone, which jsfdd does not compute"
        )
    if raw.get("embed_requires_grad"):
        raise ValueError(f"{path}: embed_requires_grad is true: jsfdd lends the target's embedding, and this draft trained one")
    if "speculators_model_type" in raw and "norm_before_residual" not in raw:
        raise ValueError(f"{path}: norm_before_residual is missing, for which vLLM takes true and speculators false; add it")


def _flag(path: Path, raw: dict[str, Any], flag: str) -> bool:
    """Read a switch. norm_before_fc may also stand in `eagle_config`, which then takes precedence."""
    value = _nested(path, raw).get(flag, raw.get(flag)) if flag == "norm_before_fc" else raw.get(flag)
    if value not in (None, True, False):
        raise ValueError(f"{path}: {flag} is {value!r:.80}, neither true nor false")
    return bool(value)


def _target_layers(path: Path, raw: dict[str, Any], num_layers: int | None) -> tuple[int, ...]:
    """Ascending, as every engine collects the states, whatever their order in the file."""
    counted, outputs = (_numbers(path, prefix, part.get(LAYERS)) for prefix, part in _places(path, raw))
    if counted and outputs and counted != (entered := tuple(number + 1 for number in outputs)):
        raise ValueError(
            f"{path}: {LAYERS} says that the draft reads what enters the target's layers {list(counted)}, and in eagle_config, "
            f"which counts from one less, {list(entered)}; correct the one that is wrong"
        )
    if counted or outputs:
        return counted or tuple(number + 1 for number in outputs)
    if num_layers is None:
        raise ValueError(
            f"{path}: does not say which of the target's layers the draft reads; engines take 2, N/2 and N-3 of N then: add "
            f'"{LAYERS}": [2, N/2, N-3]'
        )
    return default_layers(num_layers)


def _places(path: Path, raw: dict[str, Any]) -> tuple[tuple[str, dict], tuple[str, dict]]:
    """The two objects in which layers may be named, with what comes before the name in messages."""
    return ("", raw), ("eagle_config.", _nested(path, raw))


def _nested(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    nested = raw.get("eagle_config") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"{path}: eagle_config is {nested!r:.80}, not an object")
    return nested


def _numbers(path: Path, prefix: str, value: Any) -> tuple[int, ...]:
    """Distinct numbers, ascending; () for none."""
    if value is None:
        return ()
    if not isinstance(value, list) or any(isinstance(n, bool) or not isinstance(n, int) for n in value):
        raise ValueError(f"{path}: {prefix}{LAYERS} is {value!r:.80}, not a list of layer numbers")
    if len(set(value)) < len(value):
        raise ValueError(f"{path}: {prefix}{LAYERS} {value} names a layer twice")
    return tuple(sorted(value))
