"""A checkpoint folder on disk. Its code is not run and its weights are not read, only their headers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import BYTE_ORDER_MARK, NotRegularFile, begins_with_mark, read_text

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LONGEST_TEMPLATE = 200_000  # characters: ten times the longest of a known model; more takes minutes to parse
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
BYTES_PER_ELEMENT = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """Shape and dtype of one tensor according to the safetensors header (dtype: `BF16`, `F32`, ...)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self.elements * BYTES_PER_ELEMENT.get(self.dtype, 4)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; raises `BadInput` when the file is missing, damaged or not an object."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise BadInput(
            f"{path.parent} has no {path.name}.",
            "Give the folder that save_pretrained wrote: config, tokenizer, weights.",
            code="file-missing",
        ) from None
    except OSError as error:
        code = "file-not-regular" if isinstance(error, NotRegularFile) else "file-unreadable"
        raise BadInput(f"{path} cannot be read: {error.strerror}.", "Save the checkpoint again.", code=code) from None
    except (ValueError, RecursionError) as error:  # damaged, not UTF-8, nested too deep
        raise BadInput(
            f"{path} is not valid JSON: {error}.", "Save the checkpoint again.", code="file-not-json"
        ) from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} is not a JSON object.", "Save the checkpoint again.", code="file-not-object")
    return value


def read_tensor_headers(folder: Path, weights: str = WEIGHTS) -> dict[str, TensorHeader]:
    """Return name -> header of all weights after checking that every safetensors file is whole.

    Raises `BadInput` for missing, truncated or pickled weights and for an index that does not match its files.
    """
    headers: dict[str, TensorHeader] = {}
    index = _read_index(folder / WEIGHTS_INDEX) if (folder / WEIGHTS_INDEX).is_file() else {}
    for name in weights_names(folder, weights):
        headers |= _read_file(folder, name)
    missing = sorted(set(index) - set(headers))
    if missing:
        raise BadInput(
            f"{folder / WEIGHTS_INDEX} lists {missing[0]}, which no file has.",
            "Save the checkpoint again.",
            code="tensor-without-file",
        )
    if not headers:
        raise BadInput(f"The weights in {folder} have no tensor.", "Save the checkpoint again.", code="no-tensors")
    return headers


def weights_names(folder: Path, weights: str = WEIGHTS) -> list[str]:
    """Return the names of a folder's files with weights: the shards in its index, or `weights`."""
    index = _read_index(folder / WEIGHTS_INDEX) if (folder / WEIGHTS_INDEX).is_file() else {}
    return sorted(set(index.values())) or [weights]


def _read_index(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise BadInput(
            f"{path} has no weight_map from tensors to files.", "Save the checkpoint again.", code="index-not-valid"
        )
    return files


def _read_file(folder: Path, name: str) -> dict[str, TensorHeader]:
    path = folder / name
    if not name or Path(name).name != name:
        raise BadInput(
            f"{folder / WEIGHTS_INDEX} names {name!r}, which is not a file of this folder.",
            "Save it again.",
            code="index-names-foreign-file",
        )
    if not path.is_file():
        pickled = next((found.name for pattern in PICKLED_WEIGHTS for found in folder.glob(pattern)), None)
        if pickled:
            raise BadInput(
                f"{folder} has its weights as {pickled} only, a pickle, which can run code when it is loaded.",
                "Save them as safetensors: model.save_pretrained(folder).",
                code="weights-pickled",
            )
        raise BadInput(
            f"{folder} has no {name}.", "Save the checkpoint again with save_pretrained.", code="shard-missing"
        )
    try:
        with safe_open(path, framework="numpy") as weights:
            slices = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118
            return {key: TensorHeader(tuple(tensor.get_shape()), tensor.get_dtype()) for key, tensor in slices.items()}
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"{path} is not a whole safetensors file ({path.stat().st_size:,} bytes): {error}.",
            "It was cut off or damaged: copy or save it again.",
            code="weights-damaged",
        ) from None


def read_chat_template(folder: Path) -> str | None:
    """Return the tokenizer's (default) chat template as Jinja text, or None if the checkpoint has none.

    Raises `BadInput` if its file cannot be read, or if it is longer than `LONGEST_TEMPLATE`.
    """
    template = _read_chat_template(folder)
    if template and len(template) > LONGEST_TEMPLATE:
        raise BadInput(
            f"The chat template in {folder} has {len(template):,} characters, more than {LONGEST_TEMPLATE:,}.",
            "Give the template that the model was trained with: --chat-template FILE.",
            code="chat-template-too-long",
        )
    return template


def _read_chat_template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            mark = BYTE_ORDER_MARK if begins_with_mark(path) else ""  # transformers reads it as a part of the prompts
            return mark + read_text(path) or None
        except ValueError as error:
            raise BadInput(
                f"{path} cannot be read: {error}.", "Save the tokenizer again.", code="file-not-utf8"
            ) from None
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        template = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(template, list):  # several named templates
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if template:
            return str(template)
    return None
