"""The GGUF container: its metadata and tensor directory, read with every size checked against the file.

The gguf package's own reader trusts counts and offsets: a truncated file makes it fail far from the cause or loop over
counts that the file cannot hold, and it needs seconds for a vocabulary. Here each read is bounded, so a truncated or
hostile file is a ValueError that says at which byte, and the header of a real model takes a fraction of a second. The
package still does what only it knows: the block sizes and the dequantisation of every tensor type.

Format: little-endian; magic "GGUF", u32 version, u64 tensor count, u64 key count; the keys, each a string, a u32 type
and a value; the tensors, each a string, u32 number of dimensions, u64 dimensions (fastest first), u32 type, u64 offset
into the data section, which starts at the next multiple of general.alignment.

A model may be split into several files, NAME-00001-of-00003.gguf and so on. Each is a complete GGUF file; the first has the
metadata.
"""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from jsfdd.base.files import check_no_pointer

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_MAX_DIMENSIONS = 4
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.gguf)", re.IGNORECASE)
_CHUNK = 1 << 16  # numbers dequantised at once


class GGUFTensor(NamedTuple):
    """One entry of the tensor directory: its file, shape as NumPy has it (slowest first), place and size in bytes."""

    path: Path
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile(NamedTuple):
    """A GGUF file's metadata (numbers, strings, lists of them) and tensor directory, all inside the file's bounds.

    Of a model in several files, `path` is the first, and the directory is that of all.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_header(path: str | Path) -> GGUFFile:
    """Metadata and tensor directory of a GGUF file, or of all files of the model of which it is a part; no tensor data is read.

    Raises:
      FileNotFoundError: no such file, or another part is missing.
      ValueError: not a GGUF file, truncated, corrupt, big-endian, of an unknown version, or parts that are not of one model.
    """
    file = _read_part(Path(path))
    count = file.metadata.get("split.count", 1)
    if count in (0, 1):
        return file
    named = _PART.fullmatch(file.path.name)
    if named is None or int(named["count"]) != count:
        raise ValueError(
            f"{path}: one of {count} parts of a model, whose names end in -00001-of-{count:05d}.gguf; give all of them such "
            "names, or join them with llama.cpp's llama-gguf-split --merge"
        )
    return _joined([_read_part(part) for part in part_files(path)])


def part_files(path: str | Path) -> list[Path]:
    """The files of the model that a GGUF file belongs to, by its name; often only that file."""
    path = Path(path)
    named = _PART.fullmatch(path.name)
    if named is None:
        return [path]
    numbers = range(1, int(named["count"]) + 1)
    return [path.with_name(f"{named['stem']}-{number:05d}-of-{named['count']}{named['ending']}") for number in numbers]


def _joined(parts: list[GGUFFile]) -> GGUFFile:
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, len(parts)):
            raise ValueError(f"{part.path}: not part {number + 1} of {len(parts)}, as its name says; download the parts again")
        if repeated := tensors.keys() & part.tensors.keys():
            raise ValueError(f"{part.path}: tensor {min(repeated)} is in another part too; download the parts again")
        tensors |= part.tensors
    expected = parts[0].metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise ValueError(f"{parts[0].path}: its parts hold {len(tensors)} tensors, and should {expected}; download them again")
    return GGUFFile(parts[0].path, parts[0].metadata, tensors)


def _read_part(path: Path) -> GGUFFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path, and of a model in parts get all of them")
    check_no_pointer(path)
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are no GGUF file, whose header alone has 24")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Cursor(path, data).header()


def read_tensor(file: GGUFFile, name: str, rows: slice = slice(None)) -> np.ndarray:  # noqa: B008 (immutable)
    """A tensor dequantised to float32, or these rows of it.

    Raises:
      ValueError: its type is one that the gguf package cannot dequantise, or the file has shrunk since.
    """
    tensor = file.tensors[name]
    if len(tensor.shape) == 1:  # blocks need not end where rows end
        return _dequantized(file, name, tensor.offset, tensor.num_bytes)[rows]
    start, stop, _ = rows.indices(tensor.shape[0])
    row_bytes = tensor.num_bytes // tensor.shape[0]
    values = _dequantized(file, name, tensor.offset + start * row_bytes, (stop - start) * row_bytes)
    return values.reshape(stop - start, *tensor.shape[1:])


def _dequantized(file: GGUFFile, name: str, offset: int, num_bytes: int) -> np.ndarray:
    kind = file.tensors[name].kind
    path = file.tensors[name].path
    data = np.fromfile(path, np.uint8, num_bytes, offset=offset)
    if data.size != num_bytes:
        raise ValueError(f"{path}: tensor {name} ends before its last bytes: the file has shrunk")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    values = np.empty(num_bytes // block_bytes * block, np.float32)
    size = _CHUNK // block
    for first in range(0, num_bytes // block_bytes, size):
        # One row of as many blocks as stay in the cache: the package works through 16 rows at a time, however short.
        blocks = data[first * block_bytes : (first + size) * block_bytes].reshape(1, -1)
        try:
            values[first * block : (first + size) * block] = dequantize(blocks, kind)[0]
        except NotImplementedError as error:
            raise ValueError(
                f"{path}: tensor {name} has type {kind.name}, which the gguf package cannot dequantise; "
                "requantise the model, for example to Q8_0"
            ) from error
    return values


class _Cursor:
    """A position in the mapped file that never passes its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.size, self.position = path, data, len(data), 0

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {problem}; the file is truncated or corrupt, download or convert it again")

    def take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > self.size - self.position:
            raise self.error(f"{what} at byte {self.position} needs {num_bytes} bytes of a file of {self.size}")
        start, self.position = self.position, self.position + num_bytes
        return self.data[start : self.position]

    def integer(self, code: str, what: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, smallest: int, what: str) -> int:
        """A u64 count of things of at least `smallest` bytes each, which the rest of the file must be able to hold."""
        count = self.integer("Q", what)
        if count * smallest > self.size - self.position:
            raise self.error(f"{what} at byte {self.position - 8} is {count}, more than {self.size} bytes can hold")
        return count

    def string(self, what: str) -> str:
        length = self.count(1, f"the length of {what}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} at byte {self.position - length} is not UTF-8") from error

    def strings(self, count: int, what: str) -> list[str]:
        """Read what `string` would read one by one, but faster: a vocabulary has a hundred thousand."""
        data, position, values = self.data, self.position, []
        try:
            for _ in range(count):
                (length,) = _LENGTH.unpack_from(data, position)
                text = data[position + 8 : position + 8 + length]
                if len(text) != length:
                    break
                values.append(text.decode("utf-8"))
                position += 8 + length
        except (struct.error, OverflowError, UnicodeDecodeError):
            pass
        self.position = position
        # Read again what failed, for an error that says why.
        return values + [self.string(what) for _ in range(count - len(values))]

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            element = self.integer("I", what)
            if element == _STRING:
                return self.strings(self.count(8, what), what)
            dtype = self.dtype(element, what)
            count = self.count(dtype.itemsize, what)
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype).tolist()
        dtype = self.dtype(kind, what)
        return np.frombuffer(self.take(dtype.itemsize, what), dtype).item()

    def dtype(self, kind: int, what: str) -> np.dtype:
        if kind not in _SCALARS:
            raise self.error(f"{what} has the unknown type {kind} before byte {self.position}")
        return np.dtype(_SCALARS[kind])

    def header(self) -> GGUFFile:
        if self.take(4, "the magic") != _MAGIC:
            raise ValueError(f"{self.path}: not a GGUF file: it does not begin with {_MAGIC.decode()}")
        version = self.integer("I", "the version")
        if version not in _VERSIONS:
            kind = "a big-endian file" if version >= 1 << 16 else f"GGUF version {version}"
            raise ValueError(f"{self.path}: {kind}; versions 2 and 3, little-endian, are supported: convert the model again")
        num_tensors = self.count(24, "the number of tensors")
        num_keys = self.count(12, "the number of metadata keys")
        metadata: dict[str, Any] = {}
        for index in range(num_keys):
            key = self.string(f"the name of metadata key {index}")
            if key in metadata:
                raise self.error(f"metadata key {key} appears twice")
            metadata[key] = self.value(self.integer("I", f"the type of {key}"), f"metadata key {key}")
        entries = [self.directory_entry(index) for index in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {alignment!r}, not a power of two")
        data_start = -(-self.position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self.error(f"tensor {name} appears twice")
            tensors[name] = self.place(name, shape, kind, data_start + offset)
        return GGUFFile(self.path, metadata, tensors)

    def directory_entry(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string(f"the name of tensor {index}")
        dimensions = self.integer("I", f"the dimensions of tensor {name}")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.error(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.integer("Q", f"the shape of tensor {name}") for _ in range(dimensions))[::-1]
        return name, shape, self.integer("I", f"the type of tensor {name}"), self.integer("Q", f"the offset of {name}")

    def place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        """The directory entry with its size in bytes, once the whole tensor is known to lie inside the file."""
        try:
            kind = GGMLQuantizationType(kind)
        except ValueError as error:
            raise self.error(f"tensor {name} has the unknown type {kind}") from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        elements = 1
        for size in shape:
            elements *= size
        if elements == 0 or shape[-1] % block:
            raise self.error(f"tensor {name} has shape {list(shape)}, impossible in {kind.name}'s blocks of {block}")
        num_bytes = elements // block * block_bytes
        if offset + num_bytes > self.size:
            raise self.error(f"tensor {name} at byte {offset} needs {num_bytes} bytes of a file of {self.size}")
        return GGUFTensor(self.path, shape, kind, offset, num_bytes)
