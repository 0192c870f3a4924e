"""Hidden states that another program wrote, as vLLM's extract connector and speculators write them.

    DIR/*.safetensors   one conversation each: token_ids [T], and hidden_states [T, n, D] or [T, n · D], n states a token

The last of the n states is the residual stream after the last layer, which the final norm has yet to read. Those in front of
it are the streams that enter some layers, for an EAGLE-3 draft. A file belongs to the sample whose tokens it has, whatever its
name. It may end early, but not before the last token whose score counts: a server that saves what it answers has read all but
the answer's last token.

    index = find_states(directory, samples, config, longest)           # by headers and tokens, in seconds
    states = ImportedStates(index, config, norm_scale)                 # sample id -> [T, D]; files are read when asked for
    check_head(target, states, samples)                                # are they what the target's head reads?
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from jsfdd.base.records import Sample
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.target import head_logits
from jsfdd.weights.huggingface import open_tensors

if TYPE_CHECKING:
    from jsfdd.weights.target import Target  # brings transformers

_FLOATS = ("F32", "F16", "BF16")
_INTEGERS = ("I64", "I32", "I16", "U64", "U32", "U16", "U8")
_LARGEST = 1e15  # of a state: the mean of the squares of larger ones may be no float32
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_TOKENS, _STATES = "token_ids", "hidden_states"
# The head is checked at so many tokens, of so many samples.
_CHECKED_SAMPLES, _CHECKED_TOKENS = 32, 8
_CLEARLY = 0.05  # nats, or a share of the tokens


class StateFile(NamedTuple):
    """One file: where it is, the tokens it begins with, and how many of them have states."""

    path: Path
    tokens: int


@dataclasses.dataclass(frozen=True)
class StateIndex:
    """Which file holds the states of each sample, as `find_states` determined it.

    Attributes:
      directory: of the files.
      files: by sample id; a sample in which no token counts may have none.
      lengths: tokens of each sample.
      streams: n, the states a token.
      digest: sha256 hex of what the files hold, as far as their sizes and ends tell.
      unused: files that belong to no sample.
    """

    directory: Path
    files: Mapping[str, StateFile]
    lengths: Mapping[str, int]
    streams: int
    digest: str
    unused: int


def find_states(directory: Path, samples: Sequence[Sample], config: DecoderConfig, longest: int) -> StateIndex:
    """The file of every sample, checked by its header and its tokens; no state is read.

    Args:
      longest: tokens after which samples were cut.

    Raises:
      FileNotFoundError: there is no such directory, no file in it, or none with a sample's tokens; names the sample, the
        nearest file and the first token that differs.
      ValueError: a file is cut short, or its tensors are missing, misshapen or of another dtype; names it.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"--hidden-from {directory}: no such directory; check the path")
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"--hidden-from {directory}: no .safetensors file in it; give the directory in which the server saved hidden states"
        )
    by_digest: dict[bytes, StateFile] = {}
    streams: dict[int, Path] = {}
    for path in paths:
        tokens, count = _read_header(path, config)
        streams.setdefault(count, path)
        tokens = tokens[:longest]
        by_digest.setdefault(_digest(tokens), StateFile(path, len(tokens)))
    if len(streams) > 1:
        (count, first), (other_count, second), *_ = streams.items()
        raise ValueError(
            f"{first}: {count} states a token, and {second.name} has {other_count}; keep files of one run in a directory"
        )
    files: dict[str, StateFile] = {}
    sha = hashlib.sha256()
    for sample in samples:
        file = _file_of(sample, by_digest)
        if file is not None:
            files[sample.id] = file
            sha.update(f"{sample.id}\0{file.tokens}\0".encode() + _ends(file.path))
        elif sample.counted.any():
            raise FileNotFoundError(_why_no_file(directory, sample, paths, len(samples)))
    used = len({file.path for file in files.values()})
    lengths = {sample.id: len(sample.tokens) for sample in samples}
    return StateIndex(directory, files, lengths, next(iter(streams)), sha.hexdigest(), len(paths) - used)


def needed(sample: Sample) -> int:
    """The tokens of a sample whose states scoring and training read: up to the last that counts."""
    counted = np.flatnonzero(sample.counted)
    return int(counted[-1]) + 1 if len(counted) else 0


class ImportedStates(Mapping[str, np.ndarray]):
    """Hidden states [T, D] by sample id, after the final norm, or with streams in front [T, (n + 1) D]; as `HiddenStore`.

    Behind the last token of a file the states are 0; nothing that counts reads them.

    Args:
      index: from `find_states`.
      config: of the target.
      scale: [D], of the target's final norm.
      dtype: of the arrays.
      layers: the layers whose inputs stand in front of the final state in the files, if they are wanted.

    Raises:
      ValueError: the files do not hold so many states; when one is asked for, it is damaged or not finite.
    """

    def __init__(
        self,
        index: StateIndex,
        config: DecoderConfig,
        scale: Float[np.ndarray, " D"],
        dtype: Literal["bfloat16", "float32"] = "float32",
        layers: tuple[int, ...] = (),
    ):
        check_streams(index, config, layers)
        self._index, self._config, self._scale = index, config, np.asarray(scale, np.float32)
        self.dtype, self.layers = dtype, layers

    def __getitem__(self, sample_id: str) -> Float[np.ndarray, "T S"]:
        width = self._config.hidden_size
        states = np.zeros((self._index.lengths[sample_id], (len(self.layers) + 1) * width), _DTYPES[self.dtype])
        if sample_id in self._index.files:
            raw = self.raw(sample_id)
            final = normed(raw[:, -1], self._scale, self._config.rms_norm_eps)
            parts = [*raw[:, :-1].swapaxes(0, 1), final] if self.layers else [final]
            states[: len(raw)] = np.concatenate(parts, axis=1)
        return states

    def raw(self, sample_id: str) -> Float[np.ndarray, "T n D"]:
        """The states as they are in the sample's file, float32."""
        file = self._index.files[sample_id]
        with open_tensors(file.path) as tensors:
            raw = tensors.get_tensor(_STATES)[: file.tokens]
        raw = raw.astype(np.float32).reshape(len(raw), self._index.streams, self._config.hidden_size)
        if not (np.abs(raw) < _LARGEST).all():
            raise ValueError(
                f"{file.path}: {_STATES} are not finite, or beyond {_LARGEST:.0e}; let the server write them in another dtype"
            )
        return raw

    @property
    def directory(self) -> Path:
        """Of the files."""
        return self._index.directory

    @property
    def scale(self) -> Float[np.ndarray, " D"]:
        """Of the target's final norm."""
        return self._scale

    def __contains__(self, sample_id: object) -> bool:  # Mapping's would read the sample
        return sample_id in self._index.lengths

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.lengths)

    def __len__(self) -> int:
        return len(self._index.lengths)


def check_streams(index: StateIndex, config: DecoderConfig, layers: tuple[int, ...]) -> None:
    """Raise ValueError unless the files hold the inputs of `layers` in front of the final state."""
    if layers and index.streams != len(layers) + 1:
        raise ValueError(
            f"{index.directory}: {index.streams} states a token, and an EAGLE-3 draft reads {len(layers) + 1}: let the server "
            f"save those of layers {' '.join(map(str, (*layers, config.num_layers)))}, in this order, or train EAGLE-1/2"
        )


def normed(x: Float[np.ndarray, "T D"], scale: Float[np.ndarray, " D"], eps: float) -> Float[np.ndarray, "T D"]:
    """The target's final norm (`models.layers.RMSNorm`), on the host."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps)) * scale


# --- Are they what the head reads? -----------------------------------------------------------------------------------


class HeadFit(NamedTuple):
    """How well the target's head predicts the next tokens from the states.

    Attributes:
      tokens: at which it was tried.
      top1: the share of them at which the likeliest token came next; 1 for greedy answers of this very target.
      nll: the mean of −log p of the next token.
    """

    tokens: int
    top1: float
    nll: float


def check_head(target: Target, states: ImportedStates, samples: Sequence[Sample]) -> HeadFit:
    """Try `head(norm(h))` on some tokens that count, beside other readings of the files.

    Raises:
      ValueError: another reading predicts the next tokens clearly better (another layer, states that went through the norm
        already, states of the token before or after), or none does better than guessing; names it.
    """
    rows, tokens = _trial_rows(states, samples)
    readings = {}
    for stream in range(rows.shape[1]):
        for is_normed in (True, False):
            read = rows[:, stream]
            read = normed(read, states.scale, target.config.rms_norm_eps) if is_normed else read
            nll, hits = map(np.asarray, _next_tokens(target.config, target.params, read, tokens))
            for shift in (-1, 0, 1):
                readings[stream - rows.shape[1] + 1, is_normed, shift] = nll[:, shift + 1], hits[:, shift + 1]
    nll, hits = readings[0, True, 0]
    best = min(readings, key=lambda reading: readings[reading][0].mean())
    best_nll, best_hits = readings[best]
    if _clearly_positive(nll - best_nll) or _clearly_positive(1.0 * best_hits - hits):
        raise ValueError(
            f"{states.directory}: the target's norm and head give the next tokens with −log p {nll.mean():.2f} on average, "
            f"but {best_nll.mean():.2f} if {_in_words(*best)}; let the server save the stream after the last layer "
            f"(layer {target.config.num_layers} to vLLM) as the last one, before the norm, each with its own token"
        )
    if nll.mean() >= np.log(target.config.vocab_size):
        raise ValueError(
            f"{states.directory}: the target's norm and head give the next tokens with −log p {nll.mean():.2f} on average, "
            f"no better than guessing among {target.config.vocab_size:,}; are these states of another model than {target.name}?"
        )
    return HeadFit(len(tokens), float(hits.mean()), float(nll.mean()))


def _clearly_positive(differences: np.ndarray) -> bool:
    mean = differences.mean()
    return bool(mean > _CLEARLY and mean > 4 * differences.std() / len(differences) ** 0.5)


def _in_words(stream: int, is_normed: bool, shift: int) -> str:
    parts = []
    if stream:
        parts.append(f"state {stream - 1} from the end (-1 is the last) is read")
    if not is_normed:
        parts.append("no norm is applied, as behind the final norm")
    if shift:
        parts.append("a state is taken for that of the token " + ("after it" if shift > 0 else "before it"))
    return " and ".join(parts)


def _trial_rows(states: ImportedStates, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """States [R, n, D] at some tokens that count, and the token of each, the next and the one after: [R, 3]."""
    with_answer = [sample for sample in samples if sample.counted[:-2].any()]
    if not with_answer:
        raise ValueError(
            f"{states.directory}: no sample has a token after two of an answer, to try the head on; give longer answers"
        )
    chosen = [with_answer[i] for i in _spread(len(with_answer), _CHECKED_SAMPLES)]
    rows, tokens = [], []
    for sample in chosen:
        places = np.flatnonzero(sample.counted[:-2])
        places = places[_spread(len(places), _CHECKED_TOKENS)]
        rows.append(states.raw(sample.id)[places])
        tokens.append(np.stack([sample.tokens[places + step] for step in range(3)], axis=1))
    return np.concatenate(rows), np.concatenate(tokens)


def _spread(size: int, most: int) -> Int[np.ndarray, " n"]:
    """Up to `most` indices of `size`, evenly spread."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(int))


@functools.partial(jax.jit, static_argnums=0)
def _next_tokens(config: DecoderConfig, params: dict, hidden, tokens):
    """−log p of each of the tokens [R, 3], and whether it is the likeliest."""
    logits = head_logits(config, params, jnp.asarray(hidden))
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, tokens, axis=-1), jnp.argmax(logits, axis=-1)[:, None] == tokens


# --- Files -----------------------------------------------------------------------------------------------------------


def _read_header(path: Path, config: DecoderConfig) -> tuple[Int[np.ndarray, " T"], int]:
    """A file's tokens, and its states a token."""
    with open_tensors(path) as tensors:
        if missing := sorted({_TOKENS, _STATES} - set(tensors.keys())):
            raise ValueError(f"{path}: no tensor {missing[0]} in it; vLLM's extract connector and speculators write one")
        states = tensors.get_slice(_STATES)
        shape, kind = states.get_shape(), states.get_dtype()
        if kind not in _FLOATS:
            raise ValueError(f"{path}: {_STATES} have type {kind}; supported are {', '.join(_FLOATS)}")
        if (token_kind := tensors.get_slice(_TOKENS).get_dtype()) not in _INTEGERS:
            raise ValueError(f"{path}: {_TOKENS} have type {token_kind}; supported are {', '.join(_INTEGERS)}; write it again")
        tokens = tensors.get_tensor(_TOKENS)
    width = config.hidden_size
    last = shape[-1] if len(shape) > 1 else 0
    if len(shape) not in (2, 3) or (last != width if len(shape) == 3 else last % width or not last) or not all(shape):
        raise ValueError(
            f"{path}: {_STATES} are {shape}, not [tokens, states, {width}] as the target's hidden_size says; are they of "
            "another model?"
        )
    if tokens.ndim != 1 or len(tokens) != shape[0]:
        raise ValueError(f"{path}: {_TOKENS} are {tokens.dtype}{list(tokens.shape)} for {shape[0]} states; write it again")
    return tokens, shape[1] if len(shape) == 3 else last // width


def _file_of(sample: Sample, by_digest: Mapping[bytes, StateFile]) -> StateFile | None:
    """The file that holds a sample's tokens, or all that are needed of them."""
    for length in range(len(sample.tokens), max(needed(sample), 1) - 1, -1):
        file = by_digest.get(_digest(sample.tokens[:length]))
        if file is not None:
            return file
    return None


def _digest(tokens: Int[np.ndarray, " T"]) -> bytes:
    # Of int64, since files hold their ids in any integer type.
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int64).tobytes()).digest()


def _ends(path: Path, size: int = 4096) -> bytes:
    """A file's size, and its first and last bytes."""
    with path.open("rb") as stream:
        first = stream.read(size)
        total = stream.seek(0, 2)
        stream.seek(max(total - size, 0))
        return total.to_bytes(8, "little") + first + stream.read(size)


def _why_no_file(directory: Path, sample: Sample, paths: Sequence[Path], samples: int) -> str:
    """What to say of a sample without a file: the nearest one, and where it differs."""
    nearest, common, nearest_tokens = paths[0], -1, np.zeros(0, np.int64)
    for path in paths:
        with open_tensors(path) as tensors:
            tokens = tensors.get_tensor(_TOKENS)
        length = min(len(tokens), len(sample.tokens))
        differ = np.flatnonzero(tokens[:length] != sample.tokens[:length])
        shared = int(differ[0]) if len(differ) else length
        if shared > common:
            nearest, common, nearest_tokens = path, shared, tokens
    start = f"{directory}: no file for sample {sample.id} ({len(sample.tokens)} tokens), one of {samples}"
    if common == len(nearest_tokens):
        if common and not sample.assistant_mask[:common].any():
            return (
                f"{start}; {nearest.name} has its prompt alone: ask the server for the answer's states too (vLLM: "
                '"include_output_tokens": true), or let it read the whole conversation'
            )
        return f"{start}; {nearest.name} ends after {common} tokens, of which {needed(sample)} are needed: it was cut short"
    if common == len(sample.tokens):
        return f"{start}; {nearest.name} begins with them and goes on: give the whole conversation, or a larger --max-length"
    return (
        f"{start}; the nearest, {nearest.name}, has token {nearest_tokens[common]} at {common} and the sample "
        f"{sample.tokens[common]}: the server rendered another text (chat template, date, system prompt), or never wrote this "
        "conversation's file"
    )
