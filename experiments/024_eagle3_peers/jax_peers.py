"""Load ours.py's drafts with a JAX server's own class and compare its outputs with ours: WORK TARGET OUT.json PEER.

    PYTHONPATH=SOURCE JAX_PLATFORMS=cpu python experiments/024_eagle3_peers/jax_peers.py WORK TARGET tpu.json tpu-inference

SOURCE is the unpacked wheel of tpu-inference 0.32.0 or sglang-jax's folder python/; README.md says what the interpreter has.
Modules that need a TPU or that serve requests are put out of the way before the import, and attention is the plain one below.
All else is theirs: the loader, fc, norms, rotation, projections, head and map of tokens. Both compute in bfloat16.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

ABSENT = {
    "tpu-inference": ("torchax", "tokamax", "tpu_inference.kernels", "tpu_inference.layers.common.attention_interface"),
    "sglang-jax": tuple(
        "partial_json_parser modelscope llguidance pathwaysutils uvloop setproctitle pybase64 omegaconf librosa imageio "
        "zmq uvicorn fastapi datasets sgl_jax.srt.kernels".split()
    ),
}


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of these names are there and do nothing."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if any(name == absent or name.startswith(absent + ".") for absent in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        pass


def causal_attention(q, k, v, head_dim):
    """Of one sequence, on the host: q [T,N,H], k and v [T,K,H] -> [T,N,H], of q's dtype."""
    length, heads = q.shape[:2]
    kind, (q, k, v) = q.dtype, (np.asarray(x, np.float32) for x in (q, k, v))
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    scores = np.where(np.tri(length, dtype=bool), np.einsum("qnh,knh->nqk", q, k) * head_dim**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return jnp.asarray(np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), v), kind)


def tpu_inference_draft(directory: Path, embedding: np.ndarray):
    """(mesh, (streams [T,nD], tokens [T]) -> outputs [T,D], outputs -> the tokens that they propose)."""
    from tpu_inference.models.jax import llama3, llama_eagle3
    from transformers import AutoConfig

    llama3.attention = lambda cache, q, k, v, _metadata, _mesh, head_dim, **_: (cache, causal_attention(q, k, v, head_dim))
    config = AutoConfig.from_pretrained(directory)
    model_config = SimpleNamespace(
        hf_config=config,
        model=str(directory),
        dtype=jnp.bfloat16,
        seed=0,
        is_multimodal_model=False,
        get_head_size=lambda: config.head_dim,
        get_hidden_size=lambda: config.hidden_size,
        get_vocab_size=lambda: config.vocab_size,
    )
    settings = SimpleNamespace(
        model_config=model_config,
        speculative_config=SimpleNamespace(draft_model_config=model_config, method="eagle3"),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(download_dir=None),
    )
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "attn_dp", "model"))
    with jax.set_mesh(mesh):
        model = llama_eagle3.EagleLlama3ForCausalLM(settings, jax.random.key(0), mesh)
        model.load_weights(jax.random.key(0))
    model.model.embed_tokens.embedding.value = jnp.asarray(embedding, jnp.bfloat16)

    def run(streams, tokens):
        places = SimpleNamespace(input_positions=jnp.arange(len(tokens)))
        state = model.combine_hidden_states(jnp.asarray(streams, jnp.bfloat16))
        return model([None], jnp.asarray(tokens), state, places)[1]

    return mesh, run, lambda outputs: model.compute_logits(outputs).argmax(-1)


def sglang_jax_draft(directory: Path, embedding: np.ndarray):
    """As above."""
    from sgl_jax.srt.models.llama_eagle3 import LlamaForCausalLMEagle3
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    model_config = SimpleNamespace(
        hf_config=config,
        hf_text_config=config,
        model_path=str(directory),
        num_attention_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        num_hidden_layers=1,
        quantization_config=None,
        get_total_num_kv_heads=lambda: config.num_key_value_heads,
        needs_kv_head_replication=lambda _size: False,
    )
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        model = LlamaForCausalLMEagle3(config, mesh)
        model.load_weights(model_config)
        model.model.embed_tokens.embedding.value = jax.device_put(
            jnp.asarray(embedding, jnp.bfloat16), model.model.embed_tokens.embedding.value.sharding
        )

    def attend(q, k, v, layer, _batch, _pool):
        heads = (-1, layer.q_head_num, layer.head_dim)
        out = causal_attention(
            q.reshape(heads), k.reshape(len(k), -1, layer.head_dim), v.reshape(len(v), -1, layer.head_dim), layer.head_dim
        )
        return jax.device_put(out.reshape(len(q), -1), NamedSharding(mesh, PartitionSpec("data", "tensor"))), None

    def run(streams, tokens):
        batch = SimpleNamespace(
            input_ids=jnp.asarray(tokens),
            positions=jnp.arange(len(tokens)),
            spec_info=SimpleNamespace(hidden_states=jnp.asarray(streams, jnp.bfloat16)),
            attn_backend=attend,
        )
        return model.model(batch, None)[0]

    def proposed(outputs):
        logits = jnp.asarray(np.asarray(outputs, np.float32)) @ np.asarray(model.lm_head.embedding.value, np.float32).T
        return np.asarray(model.hot_token_ids.value)[np.asarray(logits.argmax(-1))]

    return mesh, run, proposed


LOADERS = {"tpu-inference": tpu_inference_draft, "sglang-jax": sglang_jax_draft}


def main(work: Path, target: Path, out: Path, peer: str) -> None:
    sys.meta_path.insert(0, Absent(ABSENT[peer]))
    arrays = np.load(work / "arrays.npz")
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    rows = []
    for entry in json.loads((work / "index.json").read_text()):
        if entry["flavour"] != peer:
            continue
        mesh, run, proposed = LOADERS[peer](work / entry["name"], embedding)
        streams, jsfdd_outputs = arrays["hidden " + " ".join(map(str, entry["layers"]))], arrays[entry["name"]][0]
        with jax.set_mesh(mesh):
            peer_outputs = [run(row, tokens) for row, tokens in zip(streams, arrays["tokens"])]
            equal = [
                np.asarray(proposed(a)) == np.asarray(proposed(jnp.asarray(b))) for a, b in zip(peer_outputs, jsfdd_outputs)
            ]
        difference = np.abs(jsfdd_outputs - np.stack([np.asarray(x, np.float32) for x in peer_outputs]))
        scale = np.sqrt((jsfdd_outputs**2).mean())
        rows.append(
            {
                "case": entry["case"],
                "positions": int(np.size(equal)),
                "max_difference_over_rms": float(difference.max() / scale),
                "rms_difference_over_rms": float(np.sqrt((difference**2).mean()) / scale),
                "same_proposal": int(np.sum(equal)),
            }
        )
        print(rows[-1], flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "transformers")}
    out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4])
