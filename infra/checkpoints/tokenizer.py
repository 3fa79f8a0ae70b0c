"""How a checkpoint's tokenizer.json splits texts, and whether its model was trained by that file.

transformers 5 builds the tokenizers of some classes anew (LlamaTokenizer, Qwen2Tokenizer): vocabulary and merges come
from tokenizer.json, what splits the text from the class. transformers 4, onnxruntime-genai and every other runtime
follow the file. A model answers as it was trained only with the tokens that it was trained with.
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
    """Return the parts of a tokenizer.json that decide how a text is split, in a form that can be compared."""
    return {part: json.dumps(_without_offsets(tokenizer.get(part)), sort_keys=True) for part in SPLITTING_PARTS}


def _without_offsets(value: object) -> object:
    """Leave out where tokens begin and end in the text: it changes no token."""
    if isinstance(value, dict):
        return {key: _without_offsets(part) for key, part in value.items() if key != "trim_offsets"}
    return [_without_offsets(part) for part in value] if isinstance(value, list) else value


def trained_by_file(checkpoint: Path) -> bool:
    """Whether the model was trained with what tokenizer.json says, where transformers 5 would say something else.

    The transformers that saved the checkpoint is the one that it was trained with: up to release 4 all tokenizers
    follow the file, later the one that is called `TokenizersBackend` does. Where config.json does not name the release,
    the file decides, as it does in every other runtime.
    """
    release = str(saved_by(checkpoint)).partition(".")[0]
    follows = _read(checkpoint / "tokenizer_config.json").get("tokenizer_class") == FOLLOWS_THE_FILE
    return follows or not (release.isdigit() and int(release) >= FIRST_THAT_REBUILDS)


def saved_by(checkpoint: Path) -> str | None:
    """Return the release of transformers that saved a checkpoint, None where config.json does not name it."""
    found = _read(checkpoint / "config.json").get("transformers_version")
    return found if isinstance(found, str) else None


def _read(path: Path) -> Json:
    return read_json(path) if path.is_file() else {}
