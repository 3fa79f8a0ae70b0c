"""A checkpoint's tokenizer in transformers: that of the model's training."""

import json
from pathlib import Path
from typing import Any

from slmops.infra.checkpoints.folder import read_json
from slmops.infra.checkpoints.tokenizer import SPLITTING_PARTS, TOKENIZER, splitting_parts, trained_by_file
from slmops.infra.errors import StageFailed, reason_of

Tokenizer = Any  # transformers' tokenizers have no common class
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return a checkpoint's tokenizer; no code of the checkpoint is run.

    If transformers' class splits texts differently from tokenizer.json, it is the file's tokenizer if the model was
    trained with the file. Raises `StageFailed` for a tokenizer that transformers cannot load.
    """
    tokenizer = auto_tokenizer(folder)
    return file_tokenizer(folder) if trained_by_file(folder) and rebuilt_parts(tokenizer, folder) else tokenizer


def file_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer that a folder's tokenizer.json describes, with the folder's control tokens and template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, **LOCAL)


def auto_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer that transformers loads; raises `StageFailed` if it cannot."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **LOCAL)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise StageFailed(
            f"transformers cannot load the tokenizer in {folder}: {reason_of(error, -1)}.",
            "Load it with AutoTokenizer.from_pretrained and correct the reported fault.",
            code="tokenizer-does-not-load",
        ) from error


def rebuilt_parts(tokenizer: Tokenizer, folder: Path) -> tuple[str, ...]:
    """Return the parts of a folder's tokenizer.json that transformers replaced when it loaded the tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not (folder / TOKENIZER).is_file():
        return ()
    written = splitting_parts(read_json(folder / TOKENIZER))
    loaded = splitting_parts({part: _described(getattr(backend, part)) for part in SPLITTING_PARTS})
    return tuple(part for part in SPLITTING_PARTS if written[part] != loaded[part])


def _described(part: Tokenizer) -> object:
    return None if part is None else json.loads(part.__getstate__())
