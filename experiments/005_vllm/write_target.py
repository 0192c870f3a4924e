"""Write the demo's target as a Hugging Face directory, for servers that do not read its GGUF file: OUT.

python experiments/005_vllm/write_target.py OUT
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jsfdd.weights.target import load_target

LAYER_NAMES = {
    "input_norm/scale": "input_layernorm",
    "mlp_norm/scale": "post_attention_layernorm",
    **{f"attention/{name}/kernel": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp/{name}/kernel": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}


def tensors_of(params) -> dict[str, np.ndarray]:
    """The target's tensors under transformers' names, matrices as torch's Linear stores them."""
    tensors = {
        "model.embed_tokens.weight": np.asarray(params["embed"]["embedding"]),
        "model.norm.weight": np.asarray(params["norm"]["scale"]),
    }
    for leaf, name in LAYER_NAMES.items():
        stacked = params["layers"]
        for key in leaf.split("/"):
            stacked = stacked[key]
        for layer, value in enumerate(np.asarray(stacked)):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ascontiguousarray(value.T)
    return tensors


def main(out: Path) -> None:
    target = load_target("smollm2")
    c = target.config
    assert c.tie_embeddings and c.rope.kind == "default"
    out.mkdir(parents=True)
    save_file(tensors_of(target.params), out / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": target.tokenizer.bos_token_id,
        "eos_token_id": list(target.stop_tokens),
        "torch_dtype": "float32",
    }
    (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    target.tokenizer.save_pretrained(out)
    # The class of GPT-2's tokenizer would be given GPT-2's own text splitting, and digits would no longer stand alone.
    path = out / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
