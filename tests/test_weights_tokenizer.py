"""Tokenizers built from GGUF metadata, against what others make of the same vocabularies."""

import json
from pathlib import Path

import gguf_files
import pytest
from toy import toy_tokenizer

from jsfdd.weights.gguf_file import read_header
from jsfdd.weights.target import load_tokenizer
from jsfdd.weights.tokenizer import tokenizer_digest, tokenizer_from_directory, tokenizer_from_gguf

FIXTURE = json.loads((Path(__file__).parent / "golden" / "tokenizer.json").read_text(encoding="utf-8"))
TEXTS = FIXTURE["texts"]


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer("smollm2")


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def byte_level(path, pre, merges=None, edit=lambda writer: None):
    case = FIXTURE["byte_level"]
    kinds = [3 if token.startswith("<|") else 1 for token in case["tokens"]]

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_merges(case["merges"] if merges is None else merges)
        edit(writer)

    return gguf_files.write_vocabulary(path / "vocabulary.gguf", case["tokens"], kinds, add)


def sentencepiece(path, case, edit=lambda writer: None):
    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(case["scores"])
        writer.add_add_space_prefix(case["add_space_prefix"])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        edit(writer)

    return gguf_files.write_vocabulary(path / "pieces.gguf", case["tokens"], case["kinds"], add)


def test_smollm2_equals_transformers_where_no_digit_is(smollm2):
    assert len(FIXTURE["smollm2"]) > 15
    for text, ids in FIXTURE["smollm2"]:
        assert encode(smollm2, text) == ids, text


def test_smollm2_digits_stand_alone(smollm2):
    """Checked by hand: its model was trained on single digits, and the space before a number is a token of its own."""
    tokens = smollm2.convert_ids_to_tokens(encode(smollm2, "in 2024 (12.5%)"))
    assert tokens == ["in", "Ġ", "2", "0", "2", "4", "Ġ(", "1", "2", ".", "5", "%)"]


def test_smollm2_round_trip_and_specials(smollm2):
    for text in TEXTS:
        assert smollm2.decode(encode(smollm2, text)) == text
    ids = encode(smollm2, "<|im_start|>user\nhi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2) and smollm2.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert smollm2("hi").input_ids == encode(smollm2, "hi")  # this model adds no begin-of-sequence token
    chat = smollm2.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n") and "named SmolLM" in chat


@pytest.mark.parametrize("pre, reference", [("qwen2", "qwen2"), ("llama-bpe", "llama3")])
def test_byte_level_splits(tmp_path, pre, reference):
    tokenizer = tokenizer_from_gguf(read_header(byte_level(tmp_path, pre)))
    for text, ids in zip(TEXTS, FIXTURE["byte_level"][reference], strict=True):
        assert encode(tokenizer, text) == ids, text


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("smollm", ["in", "Ġ", "1", "2", "3", "4", "5", "'ll"]),
        ("qwen2", ["in", "Ġ", "1", "2", "3", "4", "5", "'ll"]),
        ("llama-bpe", ["in", "Ġ", "123", "45", "'ll"]),
        ("llama3", ["in", "Ġ", "123", "45", "'ll"]),
        ("llama-v3", ["in", "Ġ", "123", "45", "'ll"]),
        ("deepseek-r1-qwen", ["in", "Ġ", "1", "2", "3", "4", "5", "'ll"]),
        ("tekken", ["in", "Ġ", "1", "2", "3", "4", "5", "'ll"]),
        ("gpt-2", ["in", "Ġ12345", "'ll"]),
    ],
)
def test_number_splits(tmp_path, pre, expected):
    tokenizer = tokenizer_from_gguf(read_header(byte_level(tmp_path, pre))).backend_tokenizer
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("in 12345'll")] == expected


def test_tekken_parts_words_by_case(tmp_path):
    tokenizer = tokenizer_from_gguf(read_header(byte_level(tmp_path, "tekken"))).backend_tokenizer
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("anHTMLPage a/b/\nx")]
    assert pieces == ["an", "HTMLPage", "Ġa", "/b", "/Ċ", "x"]


def test_only_llama3_and_tekken_take_whole_tokens_that_merges_do_not_reach(tmp_path):
    for pre, whole in (("llama-bpe", True), ("llama3", True), ("tekken", True), ("qwen2", False)):
        tokenizer = tokenizer_from_gguf(read_header(byte_level(tmp_path, pre)))
        assert ("Ġstrawberry" in tokenizer.convert_ids_to_tokens(encode(tokenizer, "a strawberry"))) is whole


@pytest.mark.parametrize("name", ["llama2", "gemma"])
def test_sentencepiece(tmp_path, name):
    tokenizer = tokenizer_from_gguf(read_header(sentencepiece(tmp_path, FIXTURE[name])))
    for text, ids in zip(TEXTS, FIXTURE[name]["ids"], strict=True):
        assert encode(tokenizer, text) == ids, text
        assert tokenizer.decode(ids) == text


def test_begin_of_sequence_and_padding(tmp_path):
    tokenizer = tokenizer_from_gguf(read_header(sentencepiece(tmp_path, FIXTURE["llama2"])))
    assert tokenizer("x").input_ids == [1, *encode(tokenizer, "x")]  # the default of SentencePiece models
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"

    def only_eos(writer):
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)

    tokenizer = tokenizer_from_gguf(read_header(sentencepiece(tmp_path, FIXTURE["llama2"], only_eos)))
    assert tokenizer("x").input_ids == [*encode(tokenizer, "x"), 2]


@pytest.mark.parametrize(
    "pre, options, message",
    [
        ("viking", {}, "pre is 'viking'; supported are smollm, qwen2, llama-bpe, tekken and gpt-2.*Hugging Face directory"),
        ("default", {}, "tokenizer.ggml.pre is 'default'"),
        (None, {}, "tokenizer.ggml.pre is None"),
        ("gpt-2", dict(merges=["no-space"]), r"merges\[0\] is 'no-space'"),
        ("gpt-2", dict(merges=FIXTURE["byte_level"]["merges"][:1] + ["q z"]), r"merges\[1\] is 'q z'"),
        ("gpt-2", dict(edit=lambda w: w.add_eos_token_id(10**6)), "eos_token_id is 1000000, outside the vocabulary"),
    ],
)
def test_errors(tmp_path, pre, options, message):
    path = byte_level(tmp_path, pre, **options)
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_from_gguf(read_header(path))
    assert str(path) in str(error.value)


def test_named_templates(tmp_path):
    def named(writer):
        writer.add_chat_template("usual")
        writer.add_string("tokenizer.chat_template.tool_use", "with tools")

    tokenizer = tokenizer_from_gguf(read_header(byte_level(tmp_path, "gpt-2", edit=named)))
    assert tokenizer.chat_template == {"default": "usual", "tool_use": "with tools"}


def test_a_tokenizer_file_that_cannot_be_read_is_named(tmp_path, smollm2):
    smollm2.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "tokenizer.json"
    newer = json.loads(file.read_text())
    newer["model"]["type"] = "BPE2"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for text, error in (
        (json.dumps(newer), r"tokenizer\.json: cannot be read by the installed tokenizers \d.*; upgrade tokenizers"),
        ("[" * 100_000, r"tokenizer\.json: cannot be read"),
        ("{}", r"tokenizer\.json: cannot be read"),
        (pointer, r"tokenizer\.json: a Git LFS pointer.*run git lfs pull"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=error):
            tokenizer_from_directory(tmp_path)
    smollm2.save_pretrained(tmp_path)
    for name, text, error in (
        ("tokenizer_config.json", pointer, "tokenizer_config.json: a Git LFS pointer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: damaged JSON"),
        ("chat_template.jinja", pointer, "chat_template.jinja: a Git LFS pointer"),
    ):
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=error):
            tokenizer_from_directory(tmp_path)
        (tmp_path / name).write_text(whole)


def test_malformed_vocabularies(tmp_path):
    def write(tokens, kinds, model="gpt2"):
        return gguf_files.write_vocabulary(tmp_path / "v.gguf", tokens, kinds, lambda w: w.add_tokenizer_model(model))

    with pytest.raises(ValueError, match="token_type does not have one entry for each of 2"):
        tokenizer_from_gguf(read_header(write(["a", "b"], [1])))
    with pytest.raises(ValueError, match="the same token twice"):
        tokenizer_from_gguf(read_header(write(["a", "a"], [1, 1])))
    with pytest.raises(ValueError, match="tokenizer.ggml.model is 'bert'; supported are gpt2 and llama"):
        tokenizer_from_gguf(read_header(write(["a", "b"], [1, 1], "bert")))
    with pytest.raises(ValueError, match="tokenizer.ggml.scores"):
        tokenizer_from_gguf(read_header(write(["a", "b"], [1, 1], "llama")))


def test_directory_round_trip(tmp_path, smollm2):
    """A directory gives the ids of its tokenizer.json, whatever class it names (SmolLM2's names GPT2Tokenizer)."""
    smollm2.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for claimed in ("TokenizersBackend", "PreTrainedTokenizerFast", "GPT2Tokenizer"):
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": claimed}))
        tokenizer = tokenizer_from_directory(tmp_path)
        assert [encode(tokenizer, text) for text in TEXTS] == [encode(smollm2, text) for text in TEXTS]
        assert tokenizer.chat_template == smollm2.chat_template and tokenizer.eos_token_id == 2


def test_digest_is_of_what_decides_the_tokens():
    tokenizer = toy_tokenizer()
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "b c"], padding=False, truncation=True, max_length=1)  # leaves its mark in the backend
    assert tokenizer_digest(tokenizer) == digest == tokenizer_digest(toy_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|other|>"]})
    assert tokenizer_digest(tokenizer) != digest


def test_directory_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="tokenizer.json is needed") as error:
        tokenizer_from_directory(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_damaged_directory(tmp_path, smollm2):
    smollm2.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read by the installed tokenizers"):
        tokenizer_from_directory(tmp_path)


def test_directory_code_is_never_run(tmp_path, smollm2):
    smollm2.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    path = tmp_path / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Evil", "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nEvil = None\n")
    assert encode(tokenizer_from_directory(tmp_path), "hi") == encode(smollm2, "hi")
    assert not (tmp_path / "ran").exists()
