"""A checkpoint cut to a few layers and tokens: one layer of each kind, with its weights, widths and rotation."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops.infra.checkpoints.folder import WEIGHTS, TensorHeader, read_json, read_tensor_headers, weights_names
from slmops.infra.errors import BadInput
from slmops.infra.records import Json, Untyped

# Rows of embedding and lm_head that are kept, evenly spread. The builder identifies the two matrices by this number, so
# no other matrix may have it.
KEPT_TOKENS = 1021
LEAST_LAYERS = 2  # the builder makes the first and the last layer differently from the others
LAYER = re.compile(r"^(.*\blayers\.)(\d+)(\..+)$")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Counts and lists of layers that `layer_types` repeats.
FIRST_LAYERS = ("num_dense_layers",)
SAID_AGAIN = ("full_attn_idxs", "max_window_layers", "sliding_window_pattern", "full_attention_interval")

TOKENIZER: Json = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
}


@dataclass(frozen=True)
class CutCheckpoint:
    """The cut folder; `layers` are the numbers of the kept layers, `tokens` the kept rows of the embedding."""

    folder: Path
    layers: tuple[int, ...]
    tokens: int
    dtype: str
    parameters: int


def cut_checkpoint(folder: Path, config: Untyped, target: Path) -> CutCheckpoint:
    """Write a checkpoint's first layer of each kind, and `KEPT_TOKENS` of its tokens, as a checkpoint to `target`.

    `config` is the folder's config in transformers. Raises `BadInput` for weights that lack a layer.
    """
    headers = read_tensor_headers(folder)
    kept = _layers_of_each_kind(config, headers)
    rows = _kept_rows(config.vocab_size)
    target.mkdir(parents=True)
    parameters = _write_weights(folder, target, kept, config.vocab_size, rows)
    raw = read_json(folder / "config.json")
    files = {
        "config.json": json.dumps(_cut_config(raw, config, kept, len(rows)), indent=2),
        "tokenizer.json": json.dumps(TOKENIZER),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}),
    }
    for name, text in files.items():
        (target / name).write_text(text, "utf-8", newline="\n")
    names = [name for name in headers if LAYER.match(name)]
    return CutCheckpoint(target, kept, len(rows), headers[names[0]].dtype, parameters)


def _layers_of_each_kind(config: Untyped, headers: Mapping[str, TensorHeader]) -> tuple[int, ...]:
    """Return the first layer of each kind; a kind is a layer's settings, and its tensors' names and shapes."""
    count = config.num_hidden_layers
    tensors: list[set[tuple[str, tuple[int, ...]]]] = [set() for _ in range(count)]
    for name, header in headers.items():
        if (found := LAYER.match(name)) and int(found[2]) < count:
            tensors[int(found[2])].add((found[3], header.shape))
    lists = _per_layer_lists(config)
    kinds: dict[object, int] = {}
    for layer in range(count):
        if not tensors[layer]:
            raise BadInput(
                f"The weights have no layer {layer}, which config.json requires.",
                "The weights and config.json are not of the same model: save both again.",
                code="tensor-missing",
            )
        kinds.setdefault((frozenset(tensors[layer]), *(repr(values[layer]) for values in lists.values())), layer)
    first = set(kinds.values())
    first |= set(range(min(count, LEAST_LAYERS))) if len(first) < LEAST_LAYERS else set()
    return tuple(sorted(first))


def _per_layer_lists(config: Untyped) -> dict[str, list[Untyped]]:
    values = {name: value for name, value in config.to_dict().items() if isinstance(value, list)}
    return {name: value for name, value in values.items() if len(value) == config.num_hidden_layers}


def _kept_rows(vocabulary_size: int) -> list[int]:
    if vocabulary_size <= KEPT_TOKENS:
        return list(range(vocabulary_size))
    return [index * vocabulary_size // KEPT_TOKENS for index in range(KEPT_TOKENS)]


def _write_weights(folder: Path, target: Path, kept: Sequence[int], vocabulary_size: int, rows: list[int]) -> int:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    number = {layer: index for index, layer in enumerate(kept)}
    tensors: dict[str, Untyped] = {}
    for shard in weights_names(folder):
        with safe_open(folder / shard, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                layer = LAYER.match(name)
                if layer is None:
                    tensor = weights.get_tensor(name)
                    if tensor.shape[:1] == (vocabulary_size,):
                        tensor = tensor[torch.tensor(rows)].contiguous()
                    tensors[name] = tensor
                elif int(layer[2]) in number:
                    tensors[f"{layer[1]}{number[int(layer[2])]}{layer[3]}"] = weights.get_tensor(name)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _cut_config(raw: dict[str, Untyped], config: Untyped, kept: Sequence[int], tokens: int) -> dict[str, Untyped]:
    lists = {name: [value[layer] for layer in kept] for name, value in _per_layer_lists(config).items()}
    first = {name: sum(layer < raw[name] for layer in kept) for name in FIRST_LAYERS if isinstance(raw.get(name), int)}
    changed: dict[str, Untyped] = {**lists, **first, "num_hidden_layers": len(kept), "vocab_size": tokens}
    changed |= dict.fromkeys(TOKEN_IDS, tokens - 1)
    return {name: value for name, value in raw.items() if name not in SAID_AGAIN} | changed
