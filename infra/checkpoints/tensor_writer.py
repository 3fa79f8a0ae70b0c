"""Writes a safetensors file a piece of a tensor at a time (https://huggingface.co/docs/safetensors); the library wants
all tensors in memory."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops.infra.checkpoints.folder import BYTES_PER_ELEMENT
from slmops.infra.process.call import Progress
from slmops.infra.records import Json


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: `pieces` yields its bytes in the type `dtype` (`F16`, ...), row by row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes]]


def write_tensors(path: Path, planned: Sequence[PlannedTensor], progress: Progress, what: str) -> None:
    """Write a safetensors file; those of wide elements come first, so that each lies at a multiple of its width."""
    laid_out = sorted(planned, key=lambda tensor: (-BYTES_PER_ELEMENT[tensor.dtype], tensor.name))
    header: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in laid_out:
        start = end
        end += math.prod(tensor.shape) * BYTES_PER_ELEMENT[tensor.dtype]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for done, tensor in enumerate(laid_out):
            progress(done, len(laid_out), what)
            for piece in tensor.pieces():
                sink.write(piece)
