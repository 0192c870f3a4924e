"""Drafts written for the engines that serve them: one directory per flavour, which its engine loads unchanged.

    eagle        SafeAILab/EAGLE (EAGLE-1/2). "bias" says whether fc has one; heads of D / N; of rope scalings only "linear",
                 and with that only theta 10,000.
    vllm         vLLM, method "eagle". No fc bias: it would be dropped without a word.
    sglang       SGLang, algorithm EAGLE. fc.bias is always there; "bias" is the attention's; no attention_factor is read.
    speculators  speculators 0.1 to 0.4. Settings are nested, tensors have other names, the target's name is written.

Everywhere "attention_bias" and "mlp_bias" are spelled out as false: to some engines a missing or true switch means biases
of their own, left as they were in memory. Whatever a flavour cannot represent is refused with the field's name.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jsfdd.base.files import sync
from jsfdd.models.architecture import Rope
from jsfdd.models.draft import DraftConfig
from jsfdd.weights.card import ExportDtype, Flavour, Provenance, Serving, model_card
from jsfdd.weights.eagle import FLAT, NESTED, draft_tensors
from jsfdd.weights.huggingface_config import read_object

_SPECULATORS_VERSION = "0.4.0.1"  # the last release that has EAGLE-1 drafts
_EAGLE_THETA = 10_000.0  # what EAGLE's scaled rotations use, whatever config.json says
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def write_draft(
    directory: str | Path,
    config: DraftConfig,
    params: dict,
    flavour: Flavour,
    *,
    dtype: ExportDtype = "keep",
    serving: Serving = Serving(),  # noqa: B008 (immutable)
    provenance: Provenance = Provenance(),  # noqa: B008
) -> None:
    """Write config.json, model.safetensors and README.md. The directory appears whole or not at all.

    Args:
      directory: must not exist yet.
      config, params: from `init_draft` or `load_draft`.
      dtype: of every tensor; "keep" writes them as they are, which must then be one dtype.
      serving, provenance: for the model card; speculators' config.json also holds the first.

    Raises:
      FileExistsError: the directory is there already.
      ValueError: the flavour cannot represent the draft, or a value is not finite in `dtype`; the message names it.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory}: already there; choose another --out or remove it")
    check_flavour(config, flavour, serving)
    tensors = _cast(draft_tensors(config, params, NESTED if flavour == "speculators" else FLAT), dtype)
    written = next(iter(tensors.values())).dtype
    if flavour == "sglang" and not config.fc_bias:
        tensors["fc.bias"] = np.zeros(config.decoder.hidden_size, written)
    settings = draft_settings(config, flavour, written.name, serving)
    card = model_card(directory.name, config, flavour, written.name, serving, provenance)

    partial = directory.with_name(directory.name + ".partial")
    if partial.exists():  # of an export that was interrupted
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(card, encoding="utf-8")
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes its files readable to their owner alone, and servers often run as someone else.
    (partial / "model.safetensors").chmod((partial / "config.json").stat().st_mode)
    for path in (*partial.iterdir(), partial):
        sync(path)
    partial.rename(directory)
    sync(directory.parent)


def check_flavour(config: DraftConfig, flavour: Flavour, serving: Serving) -> None:
    """Raise ValueError, naming the field and a way out, where a flavour cannot represent a draft."""
    d, rope = config.decoder, config.decoder.rope

    def refuse(field: str, why: str):
        raise ValueError(f"--flavour {flavour} cannot represent this draft: {field}: {why}")

    if d.embedding_scale != 1.0:
        refuse(
            "embedding_scale",
            f"this target scales its embeddings by {d.embedding_scale:g}, for which no engine's EAGLE layout has a place; "
            "such a draft can only be used from its checkpoint",
        )
    if rope.frequency_divisors:
        refuse(
            "rope",
            "this target's GGUF stores its rope scaling as a table of divisors, which config.json cannot hold; train with "
            "the target's Hugging Face directory instead",
        )
    if config.vocabulary:
        refuse(
            "vocabulary",
            f"this draft proposes {len(config.vocabulary)} tokens, and no EAGLE-1/2 layout has a place for which (SGLang takes "
            "them as a pickled tensor beside the draft); such a draft can only be used from its checkpoint",
        )
    if flavour == "eagle":
        if d.head_dim * d.num_heads != d.hidden_size:
            refuse("head_dim", f"{d.num_heads} heads of {d.head_dim} are not hidden_size {d.hidden_size}; use vllm or sglang")
        if rope.kind not in ("default", "linear"):
            refuse("rope_scaling", f"EAGLE's own code knows no {rope.kind} scaling; use vllm or sglang")
        if rope.kind == "linear" and rope.theta != _EAGLE_THETA:
            refuse("rope_theta", f"with scaling EAGLE's own code takes 10000, not {rope.theta:g}; use vllm or sglang")
    if flavour == "vllm" and config.fc_bias:
        refuse("fc_bias", "vLLM drops an fc bias without a word, so τ would fall; train without --fc-bias, or use sglang")
    if flavour in ("sglang", "speculators") and d.qkv_bias:
        refuse("qkv_bias", "its one switch would put a bias on o_proj too; use eagle or vllm")
    if flavour in ("vllm", "sglang") and d.activation != "silu":
        refuse("hidden_act", f"it computes silu only, not {_ACTIVATIONS[d.activation]}; use eagle")
    if flavour == "sglang" and rope.kind == "yarn" and not _is_default_attention(rope):
        refuse("attention_factor", f"SGLang reads none, and this rope's is {rope.attention_factor:g}; use vllm")
    if flavour == "speculators" and serving.target_name is None:
        refuse(
            "verifier.name_or_path",
            f"it names the target by a hub name or a Hugging Face directory, not {serving.target!r}; give --served-target",
        )


def draft_settings(config: DraftConfig, flavour: Flavour, dtype: str, serving: Serving) -> dict:
    """config.json of a draft that `check_flavour` accepts."""
    d = config.decoder
    layer = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": d.hidden_size,
        "intermediate_size": d.intermediate_size,
        "num_attention_heads": d.num_heads,
        "num_key_value_heads": d.num_kv_heads,
        "head_dim": d.head_dim,
        "vocab_size": d.vocab_size,
        "max_position_embeddings": d.max_position,
        "rms_norm_eps": d.rms_norm_eps,
        "rope_theta": d.rope.theta,
        "rope_scaling": _rope_scaling(d.rope, "type" if flavour == "eagle" else "rope_type"),
        "hidden_act": _ACTIVATIONS[d.activation],
        # A draft has neither embedding nor head, and SGLang fails to lend it the target's where they are called one.
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
    if flavour == "speculators":
        return {
            "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
            "speculators_model_type": "eagle",
            "speculators_version": _SPECULATORS_VERSION,
            "speculators_config": {
                "algorithm": "eagle",
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {
                        "proposal_type": "greedy",
                        "speculative_tokens": serving.num_draft_tokens,
                        "verifier_accept_k": 1,
                        "accept_tolerance": 0.0,
                    }
                ],
                "verifier": {"name_or_path": serving.target_name, "architectures": _architectures(serving.target_name)},
            },
            "transformer_layer_architecture": "LlamaDecoderLayer",
            "transformer_layer_config": layer,
            "layernorms": False,
            "fusion_bias": config.fc_bias,
            "torch_dtype": dtype,
        }
    return {
        "architectures": ["LlamaForCausalLMEagle" if flavour == "sglang" else "LlamaForCausalLM"],
        **layer,
        # To EAGLE this is fc's; to SGLang and vLLM it is the attention's.
        "bias": config.fc_bias and flavour == "eagle",
        **({"qkv_bias": True} if d.qkv_bias else {}),
        "torch_dtype": dtype,
    }


def _rope_scaling(rope: Rope, kind_key: str) -> dict | None:
    if rope.kind == "default":
        return None
    scaling = {kind_key: rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_position
    return scaling


def _is_default_attention(rope: Rope) -> bool:
    """Whether YaRN's attention factor is the one that every engine computes when it is told none."""
    default = 0.1 * math.log(max(rope.factor, 1.0)) + 1.0
    return rope.attention_factor is None or math.isclose(rope.attention_factor, default, rel_tol=1e-6)


def _architectures(target: str) -> list[str]:
    """The target's class names, if its directory is at hand; speculators takes none for not known."""
    path = Path(target) / "config.json"
    return list(read_object(path).get("architectures") or []) if path.is_file() else []


def _cast(tensors: dict[str, np.ndarray], dtype: ExportDtype) -> dict[str, np.ndarray]:
    """`tensors` in one dtype, all of them finite."""
    kinds = sorted({value.dtype.name for value in tensors.values()})
    if dtype == "keep" and len(kinds) > 1:
        raise ValueError(f"--export-dtype keep: the draft's tensors are {' and '.join(kinds)}; choose one of them")
    cast = {}
    for name, value in tensors.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"tensor {name} is not finite: the draft is broken; train it again")
        with np.errstate(over="ignore"):
            cast[name] = value if dtype == "keep" else value.astype(jnp.dtype(dtype))
        if not np.isfinite(cast[name].astype(np.float32)).all():
            raise ValueError(f"--export-dtype {dtype}: tensor {name} overflows it; choose bfloat16")
    return cast
