"""Toy models for tests: small enough for seconds, odd enough (grouped heads, untied head) to catch mix-ups."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jsfdd.base.mesh import make_mesh
from jsfdd.data.chat import Chat
from jsfdd.decoding.generate import make_generate
from jsfdd.decoding.state import PromptBatch
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.draft import draft_config, init_draft
from jsfdd.models.target import init_params
from jsfdd.weights.target import Target


@functools.cache
def _drawn(init, config, seed):
    # One program, where the function by itself is some forty.
    return jax.jit(init, static_argnums=0)(config, jax.random.key(seed))


def random_params(config, seed=0) -> dict:
    """What `init_params` gives, drawn once a process. The dictionaries are the caller's to change; arrays are shared."""
    return jax.tree.map(lambda leaf: leaf, _drawn(init_params, config, seed))


def random_draft(config, seed=0) -> dict:
    """What `init_draft` gives, in the same way."""
    return jax.tree.map(lambda leaf: leaf, _drawn(init_draft, config, seed))


# What an exported toy draft says of its layer, in every engine's words.
LAYER_SETTINGS = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "rope_scaling": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def toy_config(vocab_size=64, **changes) -> DecoderConfig:
    values = dict(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=512,
        rms_norm_eps=1e-5,
        rope=Rope(1e4),
        tie_embeddings=False,
    )
    return DecoderConfig(**(values | changes))


def toy_target(seed=0, sharpness=3.0, **changes):
    """(config, params) whose logits are spread out by `sharpness`, so that argmaxes are clear and p is not uniform."""
    config = toy_config(**changes)
    params = random_params(config, seed)
    params["norm"]["scale"] = params["norm"]["scale"] * sharpness
    return config, params


def as_target(config, params) -> Target:
    """A target without a tokenizer."""
    return Target(config, params, None, "toy", "toy", ())


def toy_draft(config, seed=1):
    draft = draft_config(config)
    return draft, random_draft(draft, seed)


def good_draft(config, params):
    """A draft that is often right: fc passes the hidden state through and the layer adds nothing."""
    _, draft_params = toy_draft(config)
    width = config.hidden_size
    draft_params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), draft_params)
    draft_params["fc"]["kernel"][width:] = np.eye(width)
    draft_params["layer"]["mlp_norm"]["scale"][:] = 1
    return jax.device_put(draft_params)


# For tests that read programs: emitted as users' are, which conftest.py's flags leave out to compile fast.
USERS_PROGRAM = {"xla_cpu_use_fusion_emitters": True}


@functools.cache
def compiled_decoder(setup):
    """`generate` as one program on one device; tests of one setup share it."""
    return jax.jit(make_generate(setup, make_mesh(data=1)))


TOY_LENGTHS = [3, 9, 5, 12]


def toy_prompts(lengths=TOY_LENGTHS, width=12, vocab=64, seed=5):
    rng = np.random.default_rng(seed)
    tokens = np.zeros((len(lengths), width), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.integers(0, vocab, length)
    keys = jax.random.split(jax.random.key(seed), len(lengths))
    return PromptBatch(*jax.device_put((tokens, np.array(lengths, np.int32))), keys)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_tokenizer():
    """One token a byte, and ChatML's two special tokens: 258 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, eos_token="<|im_end|>")


def loaded_target(seed=0) -> Target:
    """A toy target as `load_target` would give it."""
    config, params = toy_target(seed, vocab_size=258, max_position=1024)
    return Target(config, params, toy_tokenizer(), "toy", f"toy-{seed}", (257,))


def toy_chats(answers=("Because it scatters.", "Forty-two, I think.")) -> list[Chat]:
    """Chats of one turn, as if they had been read from a file."""
    return [
        Chat(f"c{i}", "toy", ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}), f"toy:{i + 1}")
        for i, answer in enumerate(answers)
    ]


def damped_target(stop_tokens=(257,)):
    """A target whose hidden state is its last token's embedding, but for a little of its layers."""
    target = loaded_target()
    layers = target.params["layers"]
    for part, name in (("attention", "o_proj"), ("mlp", "down_proj")):
        layers[part][name]["kernel"] = 0.3 * layers[part][name]["kernel"]
    return target._replace(stop_tokens=stop_tokens)


def often_right(target, vocabulary=()):
    """A draft that passes the embedding through, and has a little of its own layer, so that what it attends to matters."""
    draft, params = toy_draft(target.config)
    width = target.config.hidden_size
    params["fc"]["kernel"] = jnp.zeros_like(params["fc"]["kernel"]).at[:width].set(jnp.eye(width))
    params["layer"] = jax.tree.map(lambda x: 0.5 * x, params["layer"])
    return dataclasses.replace(draft, vocabulary=vocabulary), params


WORDS = "the cat sat on a mat and saw one red bird fly over two green hills".split()


def write_chats(path, count=24):
    """A file of short chats of two sources."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(count):
            text = [" ".join(rng.choice(WORDS, 3 + i % 5)) for _ in range(2)]
            messages = [{"role": "user", "content": text[0]}, {"role": "assistant", "content": text[1]}]
            file.write(json.dumps({"id": f"c{i}", "source": "ab"[i % 2], "messages": messages}) + "\n")
    return path


def write_prompts(path):
    """A file of five prompts."""
    rows = [{"id": f"p{i}", "source": "x", "turns": [WORDS[i]]} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_target(directory, seed=0, target=None):
    """A toy target as a Hugging Face directory with tokenizer and template: what `--target DIR` takes."""
    target = target or loaded_target(seed)
    c, p = target.config, target.params
    tensors = {
        "model.embed_tokens.weight": p["embed"]["embedding"],
        "model.norm.weight": p["norm"]["scale"],
        "lm_head.weight": p["head"]["kernel"].T,
    }
    layer_names = {
        "input_layernorm": p["layers"]["input_norm"]["scale"],
        "post_attention_layernorm": p["layers"]["mlp_norm"]["scale"],
        **{f"self_attn.{n}": p["layers"]["attention"][n]["kernel"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")},
        **{f"mlp.{n}": p["layers"]["mlp"][n]["kernel"] for n in ("gate_proj", "up_proj", "down_proj")},
    }
    for name, stacked in layer_names.items():
        for i in range(c.num_layers):
            tensors[f"model.layers.{i}.{name}.weight"] = stacked[i].T
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}, directory / "model.safetensors"
    )
    settings = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope.theta,
        rope_scaling=None if c.rope.kind == "default" else {"rope_type": c.rope.kind, "factor": c.rope.factor},
        hidden_act="silu",
        tie_word_embeddings=False,
        eos_token_id=257,
    )
    (directory / "config.json").write_text(json.dumps(settings))
    target.tokenizer.save_pretrained(directory)
    return directory
