"""Checkpoints whose weights are quantized already, by GPTQ, AWQ or Olive: what their headers say.

Accepted is what onnxruntime-genai 0.18's builder reads (`onnxruntime_genai/models/loaders`) and its CPU runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from slmops.infra.checkpoints.folder import TensorHeader
from slmops.infra.errors import BadInput
from slmops.infra.records import Json

METHODS = ("gptq", "awq", "olive")
OTHER_METHODS = dict.fromkeys(
    ("compressed-tensors", "modelopt"),
    "onnxruntime-genai reads only its forms FP8 and NVFP4, and builds them for CUDA alone",
)
PRECISIONS = {4: "int4", 8: "int8"}
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized: `overrides` are the widths of single modules, for the others it is `bits`."""

    method: str
    bits: int
    group_size: int
    overrides: Mapping[str, int]

    @property
    def precision(self) -> str:
        """The one precision that it can be built at."""
        return PRECISIONS[self.bits]

    def bits_of(self, module: str) -> int:
        """Return the width of a module's weights in bits."""
        return self.overrides.get(module, self.bits)

    def shape_of(self, module: str, qweight: tuple[int, ...]) -> tuple[int, int]:
        """Return the rows and columns that the packed weights of a module stand for."""
        bits = self.bits_of(module)
        if self.method == "gptq":
            return qweight[1], qweight[0] * 32 // bits
        if self.method == "awq":
            return qweight[1] * 32 // bits, qweight[0]
        return qweight[0], qweight[1] * 8 // bits


def quantization_of(config: Json) -> Quantization | None:
    """Return how the checkpoint of this config.json is quantized; None for one in floating point.

    Raises `BadInput` for a method or a form of one that is not built.
    """
    section = config.get("quantization_config")
    if not section:
        return None
    if not isinstance(section, dict):
        raise _not_built("of an unknown kind", "its quantization_config is not an object")
    method, bits = str(section.get("quant_method")), section.get("bits", section.get("w_bit"))
    if method not in METHODS:
        raise _not_built(method, OTHER_METHODS.get(method, f"only {', '.join(METHODS)} are read"))
    if bits not in PRECISIONS or (method == "awq" and bits != 4):
        raise _not_built(method, f"its weights have {bits} bits")
    fault = {
        "gptq": (section.get("desc_act") and "its columns are in another order (desc_act)")
        or (section.get("dynamic") and "its modules have several widths (dynamic)")
        or (section.get("checkpoint_format", "gptq") != "gptq" and f"its format is {section.get('checkpoint_format')}"),
        "awq": section.get("version", "gemm") != "gemm" and f"its format is {section.get('version')}",
        "olive": section.get("embeds") and "its embedding is quantized too",
    }[method]
    if fault:
        raise _not_built(method, fault)
    group_size = section.get("group_size", section.get("q_group_size"))
    if not isinstance(group_size, int) or group_size < 16 or group_size & (group_size - 1):
        raise _not_built(method, f"its groups are of {group_size}")
    widths = section.get("overrides") if method == "olive" else None
    overrides = {
        name: override["bits"]
        for name, override in (widths.items() if isinstance(widths, dict) else ())
        if isinstance(override, dict) and override.get("bits") in PRECISIONS
    }
    return Quantization(method, int(str(bits)), group_size, overrides)  # type: ignore[arg-type]


def float_headers(headers: dict[str, TensorHeader], quantization: Quantization) -> dict[str, TensorHeader]:
    """Return the headers of the weights in floating point that packed ones stand for, and of the others, all in F16."""
    found = {}
    for name, header in headers.items():
        module, _, part = name.rpartition(".")
        if part == "qweight" and len(header.shape) == 2:
            found[f"{module}.weight"] = TensorHeader(quantization.shape_of(module, header.shape), "F16")
        elif part not in PARTS:
            found[name] = TensorHeader(header.shape, "F16")
    return found


def _not_built(method: str, fault: str) -> BadInput:
    return BadInput(
        f"The checkpoint is already quantized ({method}), and cannot be built as it is: {fault}.",
        "Give the checkpoint in floating point; slmops makes the quantized variants from it.",
        code="checkpoint-quantized",
    )
