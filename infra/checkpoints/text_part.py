"""The text part of a multi-modal checkpoint, as a checkpoint of its own: the weights are copied as bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from slmops.infra.checkpoints.folder import WEIGHTS_INDEX, TensorHeader, weights_names
from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import open_regular
from slmops.infra.records import Json
from slmops.infra.storage.folders import link_or_copy

# Model type of the text part -> its class in transformers.
TEXT_ARCHITECTURES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
}
# Prefixes of the text part's tensors, in the Hub's files and in transformers 5, and their new prefixes.
PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)
OF_BOTH = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype")
NOT_OF_TEXT = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
LENGTH_BYTES = 8  # size of the number at the beginning of a safetensors file, which is the length of its header


def is_multimodal(config: Json) -> bool:
    """Whether config.json (parsed) is that of a multi-modal model with a text part."""
    return isinstance(config.get("text_config"), dict)


def text_config_of(config: Json, headers: Mapping[str, TensorHeader]) -> Json:
    """Return the text part's config.json; raises `BadInput` for an unknown kind of text part."""
    text = config["text_config"]
    assert isinstance(text, dict)
    architecture = TEXT_ARCHITECTURES.get(str(text.get("model_type")))
    if architecture is None:
        raise BadInput(
            f"The text part of the multi-modal checkpoint is of the unknown kind {text.get('model_type')!r}.",
            f"Known are: {', '.join(TEXT_ARCHITECTURES)}.",
            code="architecture-not-supported",
        )
    shared = {key: config[key] for key in OF_BOTH if config.get(key) is not None}
    tied = {"tie_word_embeddings": "lm_head.weight" not in text_headers(headers)}
    return {**tied, **text, **shared, "architectures": [architecture]}


def text_headers(headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Return the headers of the text part's tensors, by their names in a text model."""
    return {text: headers[name] for text, name in text_names(headers).items()}


def text_names(headers: Mapping[str, TensorHeader]) -> dict[str, str]:
    """Return the names of the text part's tensors: the name in a text model -> the name in the files."""
    return {text: name for name in headers if (text := _text_name(name))}


def _text_name(name: str) -> str | None:
    return next((new + name.removeprefix(old) for old, new in PREFIXES if name.startswith(old)), None)


def take_text_part(folder: Path, target: Path, config: Json) -> None:
    """Write the text part of the checkpoint in `folder` to `target`, with this config.json; other files are linked."""
    target.mkdir(parents=True)
    shards = weights_names(folder)
    weight_map: dict[str, str] = {}
    for shard in shards:
        for name in _copy_text_tensors(folder / shard, target / shard):
            weight_map[name] = shard
    if (folder / WEIGHTS_INDEX).is_file():
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (target / WEIGHTS_INDEX).write_text(index, "utf-8", newline="\n")
    (target / "config.json").write_text(json.dumps(config, indent=2), "utf-8", newline="\n")
    for path in folder.iterdir():
        left_out = (*shards, *NOT_OF_TEXT, "config.json", WEIGHTS_INDEX)
        if path.is_file() and path.name not in left_out:
            link_or_copy(path, target / path.name)


def _copy_text_tensors(source: Path, target: Path) -> list[str]:
    """Copy the text part's tensors of one safetensors file, under their new names; no file if there are none."""
    with open_regular(source) as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        header = json.loads(stream.read(length))
        chosen = {text: entry for name, entry in header.items() if (text := _text_name(name))}
        if not chosen:
            return []
        placed, end = {}, 0
        for name, entry in chosen.items():
            first, behind = entry["data_offsets"]
            placed[name] = {**entry, "data_offsets": [end, end + behind - first]}
            end += behind - first
        new_header = json.dumps({"__metadata__": {"format": "pt"}, **placed}).encode()
        new_header += b" " * (-len(new_header) % LENGTH_BYTES)
        with target.open("wb") as copy:
            copy.write(len(new_header).to_bytes(LENGTH_BYTES, "little") + new_header)
            for entry in chosen.values():
                first, behind = entry["data_offsets"]
                stream.seek(LENGTH_BYTES + length + first)
                _copy_bytes(stream, copy, behind - first)
    return list(chosen)


def _copy_bytes(source: BinaryIO, target: BinaryIO, count: int, step: int = 2**24) -> None:
    while count > 0 and (data := source.read(min(step, count))):
        target.write(data)
        count -= len(data)
