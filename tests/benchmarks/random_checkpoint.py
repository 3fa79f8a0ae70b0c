"""Checkpoints of any size with random weights, written shard by shard, so that only one shard is in memory.

Run as `python -m tests.benchmarks.random_checkpoint FOLDER [--shape qwen2.5-3b] [--shard-mb 2000]`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tests.benchmarks.build_resources import QWEN2_5_0_5B
from tests.support.checkpoints import make_tiny_checkpoint, read_config

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "qwen2.5-0.5b": {**QWEN2_5_0_5B, "num_attention_heads": 14},
    "qwen2.5-3b": {
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
    },
}
DEFAULT_SHARD_BYTES = 5_000_000_000  # as save_pretrained has it
INDEX = "model.safetensors.index.json"


def write_random_checkpoint(
    directory: Path, shape: dict[str, Any], *, shard_bytes: int = DEFAULT_SHARD_BYTES, seed: int = 0
) -> Path:
    """Write a tied Qwen2 of `shape` (entries of config.json) in bf16 into `directory` and return it.

    Configuration and tokenizer are a tiny checkpoint's but for the shape; the vocabulary may be larger than the
    tokenizer's.
    """
    make_tiny_checkpoint(directory, "qwen2")
    (directory / "model.safetensors").unlink()
    config = {**read_config(directory), **shape}
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    (directory / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    shards = _plan(_shapes(directory), shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(_bytes_of(tensor_shape) for shard in shards for tensor_shape in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
    for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
        _write_shard(directory / name, shard, seed + number)
    return directory


def _shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensor shapes of a configuration from transformers, without making any weight."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied one comes once


def _bytes_of(tensor_shape: tuple[int, ...]) -> int:
    numbers = 1
    for length in tensor_shape:
        numbers *= length
    return 2 * numbers


def _plan(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    left = shard_bytes
    for name, tensor_shape in shapes.items():
        size = _bytes_of(tensor_shape)
        if size > left and shards[-1]:
            shards.append({})
            left = shard_bytes
        shards[-1][name] = tensor_shape
        left -= size
    return shards


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """Draw as `tests.support.checkpoints` does: activations near 1, a wide embedding, norms near 1."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor_shape in shapes.items():
        tensor = torch.empty(tensor_shape, dtype=torch.bfloat16)
        if len(tensor_shape) == 1:
            tensor.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1, generator=generator)
        else:
            tensor.normal_(0.0, 0.5 if "embed" in name else tensor_shape[-1] ** -0.5, generator=generator)
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-3b")
    parser.add_argument("--shard-mb", type=int, default=2000)
    arguments = parser.parse_args()
    write_random_checkpoint(arguments.folder, SHAPES[arguments.shape], shard_bytes=1_000_000 * arguments.shard_mb)


if __name__ == "__main__":
    main()
