"""The target's tokenizer and chat template, from a Hugging Face directory or a GGUF file's metadata, without torch.

A GGUF file holds a vocabulary, merges or scores, and one word that names how text is split before merging. What that
word means is built here from `tokenizers` parts; a word that is not known is an error, because a guess would silently
train a draft on other tokens than the target's.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jsfdd.base.files import check_no_pointer, read_json
from jsfdd.weights.gguf_file import GGUFFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LARGEST_ID = 10_000_000
_SHOWN = 200  # characters of a library's complaint
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # beside a tokenizer.json
_REMEDY = "use the model's Hugging Face directory (with its tokenizer.json) as the target instead"

# How text is split before byte-level merges, apart from numbers: contractions, words with at most one leading other
# character, other characters with at most one leading space, line breaks, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Mistral's Tekken takes letters apart by their case.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A writer's name for a split -> the name used here.
_PRE_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_NOT_LOADED = (
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)  # what transformers raises for a damaged file
_WHOLE_TOKENS = ("llama-bpe", "tekken")  # take a piece that is a token as it is, even where merges would not arrive there
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type; the others are unknown, unused and byte
_SPACE = "▁"  # SentencePiece's mark


def tokenizer_from_directory(directory: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hugging Face directory: its tokenizer.json as it is, or its tokenizer.model converted.

    Raises:
      ValueError: there is none, or it needs packages that are not installed.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # most of a second of CPU time

    directory = Path(directory)
    # AutoTokenizer follows the class name in tokenizer_config.json and, in transformers 5, rebuilds that class's own
    # text splitting around the vocabulary: SmolLM2 names GPT-2's class, and its digit split would be lost.
    reader = PreTrainedTokenizerFast if (directory / "tokenizer.json").exists() else AutoTokenizer
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", *_SETTINGS):
        check_no_pointer(directory / name)
    for name in _SETTINGS:
        if (directory / name).is_file():
            read_json(directory / name, dict, remedy="download it again")
    if (directory / "tokenizer.json").is_file():
        _check_ids(directory / "tokenizer.json")
    try:
        tokenizer = reader.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # The Rust library raises Exception itself, and no narrower class, for a file that it does not know.
        if type(error) is not Exception and not isinstance(error, _NOT_LOADED):
            raise
        raise ValueError(_not_loaded(directory, error)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{directory}: only a slow tokenizer ({type(tokenizer).__name__}); a tokenizer.json is needed")
    return tokenizer


def _check_ids(path: Path) -> None:
    """ValueError for a token's id that no vocabulary is large enough for: libraries make room for all below it."""
    if not re.search(rb"\d{%d}" % len(str(_LARGEST_ID)), path.read_bytes()):
        return  # no number is that long, and reading megabytes of JSON takes a while
    values = read_json(path, dict, remedy="download it again")
    model, added = values.get("model"), values.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    largest = max((token_id for token_id in ids if isinstance(token_id, int)), default=0)
    if largest >= _LARGEST_ID:
        raise ValueError(f"{path}: a token has the id {largest}, and no vocabulary is that large; download it again")


def _not_loaded(directory: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:_SHOWN] or type(error).__name__
    if (directory / "tokenizer.json").exists():
        version = importlib.metadata.version("tokenizers")
        return (
            f"{directory / 'tokenizer.json'}: cannot be read by the installed tokenizers {version} ({reason}); upgrade "
            "tokenizers and transformers, or download the file again"
        )
    return (
        f"{directory}: its tokenizer cannot be loaded ({reason}); a tokenizer.json is needed, which "
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes where sentencepiece is installed"
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 hex of all that decides a text's tokens."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    # Each call that encodes may set these two anew.
    del parts["truncation"], parts["padding"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_from_gguf(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The fast tokenizer that a GGUF file's metadata describes, with its chat template; no weights are read.

    Raises:
      ValueError: a tokenizer model or pre-tokenizer that is not supported, or a vocabulary that contradicts itself.
    """
    from transformers import PreTrainedTokenizerFast  # most of a second of CPU time

    path, metadata = file.path, file.metadata
    tokens, kinds = _vocabulary(metadata, path)
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    pre = _PRE_NAMES.get(pre, pre)
    if model == "gpt2":
        tokenizer = _byte_level(metadata, tokens, pre, path)
    elif model == "llama":
        tokenizer = _sentencepiece(metadata, tokens, kinds, path)
    else:
        raise ValueError(f"{path}: tokenizer.ggml.model is {model!r}; supported are gpt2 and llama: {_REMEDY}")
    for wanted, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        add([AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds, strict=True) if kind == wanted])
    named = {role: _named_token(metadata, tokens, key, path) for role, key in _ROLES.items()}
    named["pad_token"] = named["pad_token"] or named["eos_token"]
    # llama.cpp's defaults where the file is silent.
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or pre in _WHOLE_TOKENS)
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    around = [named["bos_token"]] if adds_bos and named["bos_token"] else []
    suffix = [named["eos_token"]] if adds_eos and named["eos_token"] else []
    if around or suffix:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*around, "$A", *suffix],
            special_tokens=[(token, tokens.index(token)) for token in {*around, *suffix}],
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    wrapped.chat_template = _templates(metadata, path)
    return wrapped


def _templates(metadata: dict[str, Any], path: Path) -> str | dict[str, str] | None:
    """The file's chat template, or several by name where it holds others beside."""
    usual = "tokenizer.chat_template"
    templates = {key: value for key, value in metadata.items() if key == usual or key.startswith(f"{usual}.")}
    for key, value in templates.items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: {key} is {value!r}, not a string")
    if len(templates) < 2:
        return templates.get(usual)
    return {key.removeprefix(usual).removeprefix(".") or "default": value for key, value in templates.items()}


_ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def _vocabulary(metadata: dict[str, Any], path: Path) -> tuple[list[str], list[int]]:
    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens) or not tokens:
        raise ValueError(f"{path}: no list of strings under tokenizer.ggml.tokens: {_REMEDY}")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.token_type does not have one entry for each of {len(tokens)} tokens")
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens holds the same token twice: {_REMEDY}")
    return tokens, kinds


def _named_token(metadata: dict[str, Any], tokens: list[str], key: str, path: Path) -> str | None:
    token_id = metadata.get(key)
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ValueError(f"{path}: {key} is {token_id!r}, outside the vocabulary of {len(tokens)}")
    return tokens[token_id]


def _byte_level(metadata: dict[str, Any], tokens: list[str], pre: str | None, path: Path) -> Tokenizer:
    """Byte-level BPE, its text split as `pre` says."""
    whole_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2_split = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits by GPT-2's own rule
    normalizer = None
    if pre == "smollm":
        # Its digits stand alone, before GPT-2's rule; without this "2024" becomes other tokens than the model learnt.
        steps = [pre_tokenizers.Digits(individual_digits=True), gpt2_split]
    elif pre == "qwen2":
        normalizer = normalizers.NFC()
        steps = [pre_tokenizers.Split(Regex(_SPLIT.format(numbers=r"\p{N}")), "isolated"), whole_bytes]
    elif pre == "llama-bpe":
        steps = [pre_tokenizers.Split(Regex(_SPLIT.format(numbers=r"\p{N}{1,3}")), "isolated"), whole_bytes]
    elif pre == "tekken":
        steps = [pre_tokenizers.Split(Regex(_TEKKEN_SPLIT), "isolated"), whole_bytes]
    elif pre == "gpt-2":
        steps = [gpt2_split]
    else:
        # "default" too: writers used it when they did not recognise the model, so it says nothing.
        raise ValueError(
            f"{path}: tokenizer.ggml.pre is {pre!r}; supported are smollm, qwen2, llama-bpe, tekken and gpt-2: {_REMEDY}"
        )
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = _merges(metadata, vocabulary, path)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_TOKENS))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(metadata: dict[str, Any], vocabulary: dict[str, int], path: Path) -> list[tuple[str, str]]:
    stored = metadata.get("tokenizer.ggml.merges")
    if not isinstance(stored, list):
        raise ValueError(f"{path}: no list under tokenizer.ggml.merges: {_REMEDY}")
    merges = []
    for index, merge in enumerate(stored):
        first, separator, second = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
        if not separator or not {first, second, first + second} <= vocabulary.keys():
            raise ValueError(f"{path}: tokenizer.ggml.merges[{index}] is {merge!r}, not two tokens that make a third")
        merges.append((first, second))
    return merges


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], kinds: list[int], path: Path) -> Tokenizer:
    """SentencePiece's BPE (Llama 2, Mistral, Gemma): the higher a piece's score, the earlier its merge."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not all(isinstance(s, float) for s in scores):
        raise ValueError(f"{path}: tokenizer.ggml.scores does not have one number for each of {len(tokens)} tokens")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = []
    pieces = [i for i, kind in enumerate(kinds) if kind in (_NORMAL, _USER_DEFINED) and len(tokens[i]) > 1]
    for token_id in sorted(pieces, key=lambda i: (-scores[i], i)):
        piece = tokens[token_id]
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
    unknown = _named_token(metadata, tokens, "tokenizer.ggml.unknown_token_id", path)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback="<0x00>" in vocabulary)
    )
    marks = normalizers.Replace(" ", _SPACE)
    to_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), marks])
        tokenizer.decoder = decoders.Sequence([*to_text, decoders.Strip(content=" ", left=1)])
    else:
        tokenizer.normalizer = marks
        tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer
