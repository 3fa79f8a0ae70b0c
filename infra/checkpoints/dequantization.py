"""The numbers that packed weights stand for, written as a checkpoint in floating point, a tensor at a time."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open

from slmops.infra.checkpoints.folder import WEIGHTS, WEIGHTS_INDEX, read_json, read_tensor_headers
from slmops.infra.checkpoints.quantized import PARTS, Quantization, float_headers, quantization_of
from slmops.infra.checkpoints.tensor_writer import PlannedTensor, write_tensors
from slmops.infra.errors import BadInput
from slmops.infra.process.call import Call, Progress
from slmops.infra.records import AbsolutePath
from slmops.infra.storage.folders import link_or_copy

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACKED = "quantized"  # the folder below the checkpoint with the weights as they were
CONFIG = "config.json"
MARK = "quantized.json"  # how they were quantized
# AWQ packs eight columns into a word in this order (AutoAWQ, "gemm").
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class Dequantize(Call[None]):
    """Write a quantized checkpoint in floating point, with the packed weights in the folder `quantized` below it."""

    checkpoint_dir: AbsolutePath
    output_dir: AbsolutePath

    def perform(self, progress: Progress) -> None:
        """See `dequantize`."""
        dequantize(self.checkpoint_dir, self.output_dir, progress)


def dequantize(checkpoint: Path, folder: Path, progress: Progress) -> None:
    """Write the checkpoint into a new folder: all its weights as numbers in F16, its other files as links.

    The builder and transformers load a checkpoint in one type, so its other weights are in that type too.
    """
    config = read_json(checkpoint / CONFIG)
    quantization = quantization_of(config)
    assert quantization
    (folder / PACKED).mkdir(parents=True)
    for path in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        is_packed = path.suffix == ".safetensors" or path.name in (CONFIG, WEIGHTS_INDEX)
        link_or_copy(path, (folder / PACKED if is_packed else folder) / path.name, symbolic=False)
    section = config.pop("quantization_config")
    config |= {"dtype": "float16"}
    config.pop("torch_dtype", None)  # its older name
    (folder / CONFIG).write_text(json.dumps(config, indent=2), "utf-8", newline="\n")
    (folder / MARK).write_text(json.dumps(section, indent=2, sort_keys=True), "utf-8", newline="\n")
    packed = _Packed(checkpoint, quantization)
    headers = float_headers(read_tensor_headers(checkpoint), quantization)
    planned = [
        PlannedTensor(name, "F16", header.shape, partial(packed.pieces, name)) for name, header in headers.items()
    ]
    write_tensors(folder / WEIGHTS, planned, progress, "turning packed weights into numbers")


def packed_checkpoint(folder: Path, target: Path) -> Path:
    """Return what to build of a checkpoint: of a dequantized one its packed weights, linked into `target`."""
    if not (folder / PACKED).is_dir():
        return folder
    target.mkdir()
    of_weights = (CONFIG, MARK, WEIGHTS)
    described = (path for path in folder.iterdir() if path.is_file() and path.name not in of_weights)
    for path in (*described, *(folder / PACKED).iterdir()):
        link_or_copy(path, target / path.name)
    return target


class _Packed:
    """The tensors of a quantized checkpoint, wherever they lie."""

    def __init__(self, checkpoint: Path, quantization: Quantization) -> None:
        self.quantization = quantization
        self.files: dict[str, Path] = {}
        for path in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(path, framework="numpy") as weights:
                self.files |= dict.fromkeys(weights.keys(), path)

    def pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor of the checkpoint in floating point."""
        module = name.removesuffix(".weight")
        if f"{module}.qweight" not in self.files or name == module:
            yield self._tensor(name).astype(np.float16).tobytes()
            return
        parts = {part: self._tensor(f"{module}.{part}") for part in PARTS if f"{module}.{part}" in self.files}
        yield self._numbers(module, parts).astype(np.float16).tobytes()

    def _numbers(self, module: str, parts: "dict[str, NDArray[np.generic]]") -> "NDArray[np.float32]":
        """Return a module's weights, rows first: scale * (packed value - zero point), by group of columns."""
        method, bits = self.quantization.method, self.quantization.bits_of(module)
        qweight, qzeros, scales = parts["qweight"], parts.get("qzeros"), parts["scales"].astype(np.float32)
        if method == "olive":
            values = _unpacked(qweight, bits)
            zeros = np.full(scales.shape, 2 ** (bits - 1)) if qzeros is None else _unpacked(qzeros, bits)
        elif qzeros is None:
            raise BadInput(
                f"The weights of {module} are quantized and have no qzeros.",
                "Save the checkpoint again.",
                code="tensor-missing",
            )
        elif method == "gptq":
            values, scales = _unpacked(qweight.T, bits), scales.T
            zeros = (_unpacked(qzeros, bits).T + 1) & (2**bits - 1)
        else:
            values, zeros, scales = (
                _in_order(_unpacked(qweight, bits)).T,
                _in_order(_unpacked(qzeros, bits)).T,
                scales.T,
            )
        groups = np.arange(values.shape[1]) // (values.shape[1] // scales.shape[1])
        numbers: NDArray[np.float32] = scales[:, groups] * (values - zeros[:, : scales.shape[1]][:, groups])
        return numbers

    def _tensor(self, name: str) -> "NDArray[np.generic]":
        from safetensors.torch import safe_open as open_with_torch

        with open_with_torch(self.files[name], framework="pt") as weights:
            tensor = weights.get_tensor(name)
        array: NDArray[np.generic] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        return array


def _unpacked(packed: "NDArray[np.generic]", bits: int) -> "NDArray[np.int32]":
    """Return the values of `bits` that lie in the elements of the last dimension, the lowest bits first."""
    width = packed.dtype.itemsize * 8
    unsigned = np.ascontiguousarray(packed).view(f"u{packed.dtype.itemsize}")
    values = (unsigned[..., None] >> np.arange(0, width, bits, dtype=unsigned.dtype)) & (2**bits - 1)
    unpacked: NDArray[np.int32] = values.reshape(*packed.shape[:-1], -1).astype(np.int32)
    return unpacked


def _in_order(values: "NDArray[np.int32]") -> "NDArray[np.int32]":
    return values.reshape(*values.shape[:-1], -1, 8)[..., list(AWQ_ORDER)].reshape(values.shape)
