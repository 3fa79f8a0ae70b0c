"""The conversion of a GGUF file into a checkpoint in the Hub's layout, piece by piece of each tensor."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from slmops.infra.checkpoints.tensor_writer import PlannedTensor, write_tensors
from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import open_regular
from slmops.infra.gguf.architectures import SourceTensor, config_of, stored_as, tensors_of
from slmops.infra.gguf.file import FLOATING_POINT, GgufFile, Parsed, read_gguf
from slmops.infra.gguf.tokenizer import save_tokenizer, token_id
from slmops.infra.process.call import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONVERTER_VERSION = 2  # increased when the same file gives other bytes
ORIGIN_FILE = "gguf.json"  # beside the weights: their source
PIECE_ELEMENTS = 2**22  # size of a piece of a tensor: 16 MiB in fp32


def convert(path: Path, folder: Path, progress: Progress) -> None:
    """Write config.json, the tokenizer and model.safetensors of a GGUF file into a new folder.

    Matrices in F32, F16 and BF16 keep their bits. Quantized ones are dequantized and rounded to F16 (BF16 for Gemma).
    Norms and biases, which llama.cpp stores in F32, get the type of the matrices: the builder loads a checkpoint in one
    type, and would round them too.

    Raises `BadInput` for a file that cannot be converted or has weights that are not finite.
    """
    file = read_gguf(path)
    tensors = tensors_of(file)
    folder.mkdir(parents=True)
    write_text_files(file, folder)
    _write_weights(file, tensors, folder / "model.safetensors", progress)


def write_text_files(file: GgufFile, folder: Path) -> None:
    """Write all but the weights into an existing folder; raises `BadInput` for a file that cannot be converted."""
    config = config_of(file)
    save_tokenizer(file, folder)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(file, config))
    _write_json(folder / ORIGIN_FILE, {"quantization": file.quantization, "converter": CONVERTER_VERSION})


def written_as(file: GgufFile, tensor: SourceTensor) -> str:
    """Return the type of a written tensor."""
    is_kept = len(tensor.source.shape) > 1 and tensor.source.kind in FLOATING_POINT
    return tensor.source.kind if is_kept else stored_as(file)


def _generation_config(file: GgufFile, config: Parsed) -> Parsed:
    """Return generation_config.json: a model may end its turn with more than one token."""
    ends = [token_id(file, name) for name in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(number for number in ends if number is not None))
    ids = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config[name] is not None}
    return ids | ({"eos_token_id": known[0] if len(known) == 1 else known} if known else {})


def _write_weights(file: GgufFile, tensors: list[SourceTensor], target: Path, progress: Progress) -> None:
    with open_regular(file.path) as source:
        planned = [
            PlannedTensor(
                name=tensor.name,
                dtype=written_as(file, tensor),
                shape=tensor.source.shape,
                pieces=partial(_pieces, source, tensor, written_as(file, tensor)),
            )
            for tensor in tensors
        ]
        write_tensors(target, planned, progress, "converting the GGUF file")


def _pieces(source: BinaryIO, tensor: SourceTensor, kind: str) -> Iterator[bytes]:
    """Yield a tensor's bytes in the type `kind`, some rows at a time."""
    stored, shape = tensor.source, tensor.source.shape
    rows = shape[0] if tensor.heads else int(np.prod(shape[:-1]))  # a bias is one row with interleaved values
    packed: NDArray[np.uint8] = np.memmap(source, np.uint8, "r", stored.start, (rows, stored.size_bytes // rows))
    order = _order(rows, tensor.heads)
    step = max(1, PIECE_ELEMENTS * rows // int(np.prod(shape)))
    for first in range(0, rows, step):
        piece = packed[order[first : first + step]]
        yield piece.tobytes() if stored.kind == kind and not tensor.minus else _converted(piece, tensor, kind)


def _order(rows: int, heads: int | None) -> "NDArray[np.int64]":
    """Return the file's rows in the checkpoint's order: in the file, a head's two halves are interleaved."""
    order = np.arange(rows)
    return order.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1) if heads else order


def _converted(piece: "NDArray[np.uint8]", tensor: SourceTensor, kind: str) -> bytes:
    from gguf import GGMLQuantizationType, dequantize, quantize

    values = dequantize(np.ascontiguousarray(piece), GGMLQuantizationType[tensor.source.kind]) - np.float32(
        tensor.minus
    )
    if not np.isfinite(values).all() or (kind == "F16" and np.abs(values).max() > np.finfo(np.float16).max):
        raise BadInput(
            f"The tensor {tensor.source.name!r} of the GGUF file has values that are not finite in {kind}.",
            "Export it again.",
            code="gguf-not-finite",
        )
    converted = quantize(values, GGMLQuantizationType[kind])
    return bytes(converted.tobytes())


def _write_json(path: Path, value: Parsed) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), "utf-8", newline="\n")
