"""Whether a checkpoint's embedding and lm_head are one matrix, as transformers 5 decides when it loads the model.

config.json can say that they are, and the weights can have an lm_head that differs: transformers then loads it, and
ties nothing (`PreTrainedModel.tie_weights`). Where the weights have lm_head alone, it serves as the embedding too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from slmops.infra.checkpoints.folder import TensorHeader, weights_names
from slmops.infra.foreign_files import open_regular
from slmops.infra.records import Json

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# The model types whose embedding is tied where config.json does not state it (transformers 5.23).
TIED_BY_DEFAULT = (
    *("ernie4_5", "gemma", "gemma2", "gemma3", "gemma3_text", "lfm2", "lfm2_moe", "mistral3", "smollm3"),
)
LENGTH_BYTES = 8  # size of the number at the beginning of a safetensors file, which is the length of its header
PIECE_BYTES = 1 << 24


def says_tied(config: Json) -> bool:
    """Whether config.json (parsed) says, by itself or by its model type, that lm_head is the embedding's matrix."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") in TIED_BY_DEFAULT))


def headers_as_tied(headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Return the headers of tied weights with the one matrix under the embedding's name, whichever name it has."""
    return {EMBEDDING if name == LM_HEAD else name: header for name, header in headers.items()}


class _Place(NamedTuple):
    """Where the bytes of a tensor lie, and what they are."""

    path: Path
    begin: int
    dtype: str
    shape: list[int]
    size_bytes: int


def are_equal(folder: Path, first: str, second: str) -> bool:
    """Whether two tensors of a checkpoint, whose weights were checked, have the same type, shape and bytes."""
    places = _places(folder)
    one, other = places[first], places[second]
    if one[2:] != other[2:]:
        return False
    with open_regular(one.path) as stream, open_regular(other.path) as other_stream:
        stream.seek(one.begin)
        other_stream.seek(other.begin)
        left = one.size_bytes
        while (piece := stream.read(min(PIECE_BYTES, left))) and piece == other_stream.read(len(piece)):
            left -= len(piece)
    return left == 0


def _places(folder: Path) -> dict[str, _Place]:
    places = {}
    for shard in weights_names(folder):
        with open_regular(folder / shard) as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            start = LENGTH_BYTES + length + begin
            places[name] = _Place(folder / shard, start, entry["dtype"], entry["shape"], end - begin)
    return places
