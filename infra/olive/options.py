"""The options of the `ModelBuilder` pass and the passes that Olive knows: plain data, without an import of Olive."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

BITS = {"int8": 8, "int4": 4}  # of the weights, per quantized precision


@dataclass(frozen=True)
class Option:
    """One option of the pass: its type and what it does."""

    type: Any
    description: str


BUILDER_OPTIONS: dict[str, Option] = {
    "precision": Option(Literal["fp32", "fp16", "int8", "int4"], "Precision of the weights."),
    "execution_provider": Option(Literal["cpu", "cuda", "dml", "webgpu"], "Where the model will run; default cpu."),
    "block_size": Option(Literal[16, 32, 64, 128, 256], "Weights that share a scale; default 32."),
    "is_symmetric": Option(bool, "Quantize around zero, without zero points; default true."),
    "accuracy_level": Option(
        Literal[0, 1, 2, 3, 4], "Least precision of activations: 1 fp32, 2 fp16, 3 bf16, 4 int8; default on CPU: 4."
    ),
    "algo_config": Option(
        Literal["default", "rtn", "rtn_last", "k_quant", "k_quant_last", "k_quant_mixed", "k_quant_linear"],
        "Method of quantization; default: round to nearest.",
    ),
    "op_types_to_quantize": Option(list[str], "Operators whose weights are quantized; default MatMul."),
    "nodes_to_exclude": Option(list[str], "Nodes that keep their weights in floating point."),
    "use_qdq": Option(bool, "Write quantize/dequantize pairs in place of MatMulNBits; int4 only."),
    "quantize_embedding": Option(bool, "Quantize the embedding too, or share lm_head's; default true."),
    "use_webgpu_fp32": Option(bool, "fp32 activations on WebGPU."),
    "use_cuda_bf16": Option(bool, "bf16 activations on CUDA."),
    "enable_cuda_graph": Option(bool, "Capture a CUDA graph at run time."),
    "search": Option(dict[str, Any], "Generation defaults written to genai_config.json."),
    "extra_options": Option(dict[str, Any], "Further options of onnxruntime-genai's builder, passed unchanged."),
}

BUILDER_QUANTIZATION_OPTIONS = (
    "block_size",
    "is_symmetric",
    "accuracy_level",
    "algo_config",
    "op_types_to_quantize",
    "nodes_to_exclude",
    "use_qdq",
    "use_webgpu_fp32",
    "use_cuda_bf16",
    "enable_cuda_graph",
)

# What a user may put into `extra_options`: onnxruntime-genai 0.18's options of a text decoder that keep the model's
# inputs and outputs. The builder silently ignores any other name.
EXTRA_OPTIONS = frozenset(
    {
        "enable_dml_graph",
        "enable_webgpu_graph",
        "fuse_mlp_gate_up",
        "fuse_qk_norm_gqa",
        "fuse_qkv",
        "kv_cache_quant_scheme",
        "kv_cache_scale_file",
        "matmul_mixed_precision",
        "matmulnbits_weights_prepacked",
        "prune_lm_head",
        "shared_embeddings",
        "windowed_kv_cache",
    }
)


@cache
def olive_pass_types() -> frozenset[str]:
    """Return the names of the passes in the package configuration of the installed Olive."""
    return frozenset(read_olive_package_config()["passes"])


def read_olive_package_config() -> dict[str, Any]:
    """Return Olive's package configuration, `{"passes": {NAME: {...}}, ...}`, without importing Olive."""
    spec = find_spec("olive")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("olive")
    path = Path(next(iter(spec.submodule_search_locations))) / "olive_config.json"
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return config
