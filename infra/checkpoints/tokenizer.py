"""How a checkpoint's tokenizer.json splits texts, and whether its model was trained with that file.

transformers 5 rebuilds the tokenizers of some classes (LlamaTokenizer, Qwen2Tokenizer): vocabulary and merges come from
tokenizer.json, the splitting of texts from the class. transformers 4, onnxruntime-genai and every other runtime follow
the file. A model needs the tokens that it was trained with.
"""

import json
from pathlib import Path
from typing import Any

from slmops.infra.checkpoints.folder import read_json
from slmops.infra.records import Json

TokenizerFile = dict[str, Any]  # a tokenizer.json
TOKENIZER = "tokenizer.json"
SPLITTING_PARTS = ("normalizer", "pre_tokenizer")
# transformers' first release whose tokenizers do not follow tokenizer.json.
FIRST_THAT_REBUILDS = 5
FOLLOWS_THE_FILE = "TokenizersBackend"


def splitting_parts(tokenizer: TokenizerFile) -> dict[str, str]:
    """Return the parts of a tokenizer.json that determine the splitting of texts, in a form that can be compared."""
    return {part: json.dumps(_without_offsets(tokenizer.get(part)), sort_keys=True) for part in SPLITTING_PARTS}


def _without_offsets(value: object) -> object:
    """Leave out the settings of token offsets, which do not change tokens."""
    if isinstance(value, dict):
        return {key: _without_offsets(part) for key, part in value.items() if key != "trim_offsets"}
    return [_without_offsets(part) for part in value] if isinstance(value, list) else value


def trained_by_file(checkpoint: Path) -> bool:
    """Whether the model was trained with the splitting of tokenizer.json if transformers 5 would split differently.

    The release of transformers that saved the checkpoint is assumed to be that of the training: up to release 4 all
    tokenizers follow the file, later only `TokenizersBackend`. If config.json names no release, the file applies, as in
    every other runtime.
    """
    release = str(saved_by(checkpoint)).partition(".")[0]
    follows = _read(checkpoint / "tokenizer_config.json").get("tokenizer_class") == FOLLOWS_THE_FILE
    return follows or not (release.isdigit() and int(release) >= FIRST_THAT_REBUILDS)


def saved_by(checkpoint: Path) -> str | None:
    """Return the release of transformers that saved a checkpoint, or None if config.json does not name it."""
    found = _read(checkpoint / "config.json").get("transformers_version")
    return found if isinstance(found, str) else None


def _read(path: Path) -> Json:
    return read_json(path) if path.is_file() else {}
