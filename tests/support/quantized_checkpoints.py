"""Quantized checkpoints: GPTQ's and AWQ's packing as their formats have it, Olive's by Olive's own pass."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from slmops.infra.process.channel import QUIET_ENVIRONMENT

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the columns that AutoAWQ packs into a word, from the lowest bits up


def quantized_as(method: str, checkpoint: Path, target: Path, *, bits: int = 4, group_size: int = 32) -> Path:
    """Write a checkpoint with its matrices in the layers quantized, round to nearest and asymmetric."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, target)
    weights = load_file(target / "model.safetensors")
    packed: dict[str, Any] = {}
    for name, weight in weights.items():
        if weight.dim() == 2 and ".layers." in name:
            module = name.removesuffix(".weight")
            parts = _packed(method, weight.float().numpy(), bits, group_size)
            packed |= {f"{module}.{part}": torch.from_numpy(value.copy()) for part, value in parts.items()}
        else:
            packed[name] = weight
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text("utf-8"))
    shared = {"quant_method": method, "bits": bits, "group_size": group_size}
    config["quantization_config"] = shared | (
        {"desc_act": False, "sym": False, "checkpoint_format": "gptq"}
        if method == "gptq"
        else {"version": "gemm", "zero_point": True}
    )
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return target


def _packed(method: str, weight: Any, bits: int, group_size: int) -> dict[str, Any]:
    """Return qweight, qzeros, scales and GPTQ's g_idx of a matrix, rows first."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group_size, group_size)
    low, high = groups.min(-1), groups.max(-1)
    scales = ((high - low) / (2**bits - 1)).astype(np.float16)
    zeros = np.clip(np.round(-low / scales.astype(np.float32)), 1, 2**bits - 1).astype(np.int64)
    values = np.round(groups / scales.astype(np.float32)[..., None]) + zeros[..., None]
    values = np.clip(values, 0, 2**bits - 1).astype(np.int64).reshape(rows, columns)
    if method == "gptq":
        return {
            "qweight": _words(values, bits).T,
            "qzeros": _words(zeros.T - 1, bits),
            "scales": scales.T,
            "g_idx": np.arange(columns, dtype=np.int32) // group_size,
        }
    return {"qweight": _words(_awq(values.T), bits), "qzeros": _words(_awq(zeros.T), bits), "scales": scales.T}


def _awq(values: Any) -> Any:
    return values.reshape(*values.shape[:-1], -1, 8)[..., AWQ_ORDER].reshape(values.shape)


def _words(values: Any, bits: int) -> Any:
    """Pack the last dimension into words of 32 bits, the lowest first."""
    per_word = 32 // bits
    spread = values.reshape(*values.shape[:-1], -1, per_word).astype(np.uint64) << np.arange(0, 32, bits, np.uint64)
    return spread.sum(-1).astype(np.uint32).view(np.int32)


def quantized_by_olive(checkpoint: Path, target: Path, *, bits: int = 4) -> Path:
    """Quantize a checkpoint by Olive's own pass `Rtn`, in a process of its own: slmops's pass has the same name."""
    config = {
        "input_model": {"type": "HfModel", "model_path": str(checkpoint)},
        "passes": {"rtn": {"type": "Rtn", "bits": bits, "group_size": 32, "sym": False}},
        "output_dir": str(target),
        "cache_dir": f"{target}-cache",
    }
    script = f"from olive.workflows import run; run({config!r})"
    environment = {**os.environ, **QUIET_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return target / "model"
