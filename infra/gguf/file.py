"""A GGUF file's metadata and tensor table. No weight is read.

Every length in the file is compared with the file's size before anything is read. The reader of the library gguf trusts
them: an array that claims to be longer than the file would exhaust the memory.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import open_regular

T = TypeVar("T")
Value = object  # a value a value of the metadata: a number, a text, or a tuple of either
Entry = tuple[str, tuple[int, ...], int, int]  # of the tensor table: name, shape in torch's order, type, offset
Parsed = dict[str, Any]  # a JSON object with values of many types, as in the files of a checkpoint

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Known vocabularies take less than 20 MiB.
LARGEST_HEADER_BYTES = 64 * 1024**2
LARGEST_TENSOR_COUNT = 100_000
LARGEST_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
# Types of metadata: number in the file -> struct's code (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Types of plain numbers, and types that the library gguf can dequantize.
FLOATING_POINT = ("F32", "F16", "BF16")
QUANTIZED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS"),
)


@dataclass(frozen=True)
class GgufTensor:
    """The place of a tensor: `start` in bytes from the file's beginning; `shape` has rows first, as in torch."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    size_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file: metadata by key (numbers, texts, tuples of either) and tensors by name."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """The architecture's name as llama.cpp writes it."""
        return self.get("general.architecture", str)

    @property
    def quantization(self) -> str | None:
        """The quantization of its weights, such as `Q4_K_M`; None if all are plain numbers."""
        from gguf.constants import LlamaFileType

        quantized = [tensor for tensor in self.tensors.values() if tensor.kind in QUANTIZED]
        if not quantized:
            return None
        number = self.metadata.get("general.file_type")
        name = LlamaFileType(number).name if isinstance(number, int) and number in {*LlamaFileType} else ""
        if name.startswith("MOSTLY_"):
            return name.removeprefix("MOSTLY_")
        return max(quantized, key=lambda tensor: tensor.size_bytes).kind

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return a value of the metadata.

        Raises `BadInput` for a value of another type, or one that is missing without a default.
        """
        value = self.metadata.get(key, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "is missing" if value is None else f"is {str(value)[:40]!r}"
            raise _not_valid(self.path, f"{key} {found}")
        return value


def is_gguf(path: Path) -> bool:
    """Whether a path names a file with the ending of a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def gguf_of(path: Path) -> Path | None:
    """Return the GGUF file at `path`, or the only weights of a folder; None for another checkpoint.

    Raises `BadInput` for a folder with several GGUF files and no other weights.
    """
    if is_gguf(path):
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(file for file in path.iterdir() if is_gguf(file))
    if len(found) > 1:
        raise BadInput(
            f"{path} has {len(found)} GGUF files: {', '.join(file.name for file in found[:5])}.",
            f"Give the one to deploy: {found[0]}.",
            code="gguf-several",
        )
    return found[0] if found else None


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file; raises `BadInput` for one that is damaged, truncated or a part of several."""
    size = path.stat().st_size
    with open_regular(path) as stream:
        reader = _Reader(path, stream, size)
        if reader.read(4) != MAGIC:
            raise _not_valid(path, "it does not begin with GGUF")
        version, tensors, values = reader.unpack("IQQ")
        if version not in VERSIONS:
            raise _not_valid(path, f"its version is {version}, and only {' and '.join(map(str, VERSIONS))} are read")
        metadata = dict(reader.entry() for _ in range(reader.counted(values, 12)))
        if (parts := metadata.get("split.count", 0)) not in (0, 1):
            raise BadInput(
                f"{path} is one of {parts} parts of a GGUF file.",
                "Merge them first: llama-gguf-split --merge FIRST_PART MERGED.gguf.",
                code="gguf-part",
            )
        table = [reader.tensor() for _ in range(reader.counted(tensors, 24, LARGEST_TENSOR_COUNT))]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
            raise _not_valid(path, f"general.alignment is {alignment!r}")
        start = math.ceil(stream.tell() / alignment) * alignment
    return GgufFile(path, metadata, _located(path, table, start, size))


def _located(path: Path, table: list[Entry], start: int, size: int) -> dict[str, GgufTensor]:
    """Return the tensors by name, each within the file and without overlap."""
    tensors: dict[str, GgufTensor] = {}
    end = start
    for name, shape, number, offset in sorted(table, key=lambda entry: entry[3]):
        kind, size_bytes = _stored(path, name, shape, number)
        begin = start + offset
        if name in tensors or begin < end:
            raise _not_valid(path, f"the tensor {name!r} overlaps another or occurs twice")
        end = begin + size_bytes
        if end > size:
            raise _cut_off(path, size, f"the tensor {name!r} ends at byte {end:,}")
        tensors[name] = GgufTensor(name, shape, kind, begin, size_bytes)
    return tensors


def _stored(path: Path, name: str, shape: tuple[int, ...], number: int) -> tuple[str, int]:
    """Return the name of a tensor's type, and its size in bytes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise _not_valid(path, f"the tensor {name!r} is of the unknown type {number}") from None
    if kind.name not in (*FLOATING_POINT, *QUANTIZED):
        raise _not_valid(path, f"the tensor {name!r} is of the type {kind.name}, which cannot be read")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise _not_valid(path, f"the tensor {name!r} has rows of {shape[-1]} in blocks of {block}")
    return kind.name, math.prod(shape) // block * block_bytes


class _Reader:
    """Reads a file, and raises `BadInput` if it claims to have more than its size."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self.path, self.stream, self.size = path, stream, size

    def read(self, count: int) -> bytes:
        end = self.stream.tell() + count
        if end > self.size:
            raise _cut_off(self.path, self.size, f"its header extends to byte {end:,}")
        if end > LARGEST_HEADER_BYTES:
            raise _not_valid(self.path, f"its header has more than {LARGEST_HEADER_BYTES // 1024**2} MiB")
        return self.stream.read(count)

    def counted(self, count: int, least_bytes: int, most: int | None = None) -> int:
        """Return a count of entries of `least_bytes` each; raises if the file is too small for them."""
        if most is not None and count > most:
            raise _not_valid(self.path, f"it claims {count:,} tensors")
        if self.stream.tell() + count * least_bytes > min(self.size, LARGEST_HEADER_BYTES):
            raise _cut_off(self.path, self.size, f"it claims {count:,} entries after byte {self.stream.tell():,}")
        return count

    def unpack(self, code: str) -> tuple[Any, ...]:
        form = struct.Struct(f"<{code}")
        return form.unpack(self.read(form.size))

    def text(self) -> str:
        (length,) = self.unpack("Q")
        try:
            return self.read(length).decode("utf-8")
        except UnicodeDecodeError:
            raise _not_valid(self.path, "a text of its header is not UTF-8") from None

    def entry(self) -> tuple[str, Value]:
        key, (number,) = self.text(), self.unpack("I")
        return key, self._value(key, number)

    def tensor(self) -> Entry:
        """Return a tensor's name, its shape in torch's order, the number of its type and its offset."""
        name, (dimensions,) = self.text(), self.unpack("I")
        if not 0 < dimensions <= LARGEST_DIMENSIONS:
            raise _not_valid(self.path, f"the tensor {name!r} has {dimensions} dimensions")
        shape = self.unpack(f"{dimensions}Q")
        if not all(0 < size < 2**40 for size in shape):
            raise _not_valid(self.path, f"the tensor {name!r} has the shape {list(shape)}")
        number, offset = self.unpack("IQ")
        return name, tuple(reversed(shape)), number, offset

    def _value(self, key: str, number: int) -> Value:
        if number in SCALARS:
            return self.unpack(SCALARS[number])[0]
        if number == STRING:
            return self.text()
        if number != ARRAY:
            raise _not_valid(self.path, f"{key!r} is of the unknown type {number}")
        element, count = self.unpack("IQ")
        if element == STRING:
            return tuple(self.text() for _ in range(self.counted(count, 8)))
        if element not in SCALARS:
            raise _not_valid(self.path, f"{key!r} has elements of the unknown type {element}")
        return self.unpack(f"{self.counted(count, struct.calcsize(SCALARS[element]))}{SCALARS[element]}")


def _not_valid(path: Path, fault: str) -> BadInput:
    return BadInput(
        f"{path} is not a readable GGUF file: {fault}.", "Export or download it again.", code="gguf-not-valid"
    )


def _cut_off(path: Path, size: int, fault: str) -> BadInput:
    return BadInput(
        f"{path} is truncated or damaged: {fault}, but the file has {size:,} bytes.",
        "Export or download it again.",
        code="gguf-cut-off",
    )
