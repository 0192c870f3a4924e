"""Pieces of a text have the tokens and offsets that the library's encoding of the whole text has."""

import sys

import numpy as np
import pytest
from families import FAMILIES, family_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from jsfdd.data import pieces
from jsfdd.data.pieces import piece_tokenizer

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LLAMA3 = CONTRACTIONS + (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern, behavior="isolated"):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), BYTES])


WORDS = [
    "the model's",
    "DON'T don't I'll we'VE",
    "x = 12345.678;\n\n    return x.\n",
    "(word) one-two a_b",
    "é名 ünï e\u0301",
    "aé theé modelß Zé aé theé",
]


def trained(pre_tokenizer, normalizer=None):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.normalizer = pre_tokenizer, normalizer or backend.normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=460, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator(WORDS * 2, trainer)
    marks = [AddedToken(text, special=True, normalized=False) for text in ("<|im_end|>", "<|im_end|>\n", "<｜end｜>")]
    backend.add_special_tokens(marks)
    return backend


BACKENDS = {
    "gpt-2": trained(GPT2),
    "smollm": trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])),
    "llama-3": trained(split(LLAMA3)),
    "qwen2": trained(split(LLAMA3.replace("{1,3}", "")), normalizers.NFC()),
}
TOKENIZERS = {name: piece_tokenizer(backend) for name, backend in BACKENDS.items()}
PARTS = [
    *(" ", " ", " ", "  ", "\n", "\r\n", "\n ", "\t", "\u00a0", "\u2003", "\x1c", "\x85", "\u180e", "\u200b"),
    *("'", "'s", "'LL", "'ſ", ".", ",", "...", "(", "\x00", "_", "a", "the", "model", "Z", "é", "e\u0301", "\u0301", "ß", "名"),
    *("ก็", "👩‍👩‍👧", "ⅷ", "²", "7", "123", "<|im_end|>", "<|im", "<｜end｜>"),
]


def check(name, text):
    whole = BACKENDS[name].encode(text, add_special_tokens=False)
    made = TOKENIZERS[name].encode(text)
    if made is None:
        assert name == "qwen2" and normalizers.NFC().normalize_str(text) != text
        return
    ids, offsets = made
    assert ids.tolist() == whole.ids, text
    assert list(zip(offsets.starts.tolist(), offsets.ends.tolist())) == whole.offsets, text


@pytest.mark.parametrize("name", BACKENDS)
def test_pieces_have_the_tokens_and_offsets_of_the_whole(name):
    rng = np.random.default_rng(0)
    for length in rng.integers(0, 14, 1500):
        strange = "".join(map(chr, rng.integers(0, 0xD800, 2)))
        check(name, "".join(rng.choice([*PARTS, strange], length)))


@pytest.mark.parametrize("name", BACKENDS)
def test_every_pair_of_parts_has_the_tokens_of_the_whole(name):
    for first in PARTS:
        check(name, "".join(f"{first}{second}x <|im_end|>{second}{first}" for second in PARTS if "\u0301" not in second))


def test_pieces_that_were_forgotten_come_again(monkeypatch):
    monkeypatch.setattr(pieces, "_KEPT", 3)
    for text in ("one two three four the model one two" * 2, "the model's end"):
        check("gpt-2", text)
    assert len(TOKENIZERS["gpt-2"]._known) <= 3


def test_what_the_library_takes_for_white_space_python_does_too():
    characters = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x20000))))
    others = set(normalizers.Replace(Regex(r"\s"), "").normalize_str(characters))
    spaces = set(characters) - others
    assert {" ", "\u2003"} < spaces and all(map(str.isspace, spaces))


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "pre_tokenizer", split(LLAMA3.replace(r"\p{L}+", r"[\p{L} ]+"))),
        lambda backend: setattr(backend, "pre_tokenizer", split(LLAMA3, "merged_with_next")),
        lambda backend: setattr(backend, "pre_tokenizer", split(r"\p{N}|\s+")),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), BYTES])),
        lambda backend: setattr(backend, "pre_tokenizer", BYTES),
        lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
        lambda backend: backend.add_tokens([AddedToken("<wide>", lstrip=True, normalized=False)]),
        lambda backend: backend.add_tokens([AddedToken("<plain>", normalized=True)]),
        lambda backend: setattr(backend.model, "dropout", 0.1),
    ],
)
def test_a_tokenizer_that_splits_by_another_rule_has_no_pieces(change):
    backend = Tokenizer.from_str(BACKENDS["gpt-2"].to_str())
    assert piece_tokenizer(backend) is not None
    change(backend)
    assert piece_tokenizer(backend) is None


def test_a_text_with_bytes_that_the_vocabulary_does_not_have_has_no_pieces():
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"Ġ"})
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = GPT2
    assert piece_tokenizer(backend).encode("one two") is None
    assert piece_tokenizer(backend).encode("one")[0].tolist() == backend.encode("one").ids


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_of_bytes_have_pieces(name):
    backend = family_tokenizer(name).backend_tokenizer
    text = "".join(f"{token.content}\n\n the <{token.content}é" for token in backend.get_added_tokens_decoder().values())
    ids, offsets = piece_tokenizer(backend).encode(text)
    assert ids.tolist() == backend.encode(text).ids
    assert np.all(offsets.ends[:-1] <= offsets.ends[1:]) and offsets.ends[-1] == len(text) < sys.maxsize
