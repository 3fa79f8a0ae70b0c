"""A built model's files for chats, corrected so that the runtimes give the tokens of its checkpoint."""

import hashlib
import json
from pathlib import Path

from slmops.infra.checkpoints.folder import read_chat_template, read_json
from slmops.infra.checkpoints.tokenizer import TOKENIZER, trained_by_file
from slmops.infra.genai.template_files import mend_template
from slmops.infra.genai.tokenizer_files import mend_tokenizer
from slmops.infra.records import Json, Record

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Increased when the corrections change, so that earlier builds are not reused.
MENDS = 2


class MendedFile(Record):
    """A file that differs from the checkpoint's: the SHA-256 (hex) of both, and the corrections."""

    file: str
    source_sha256: str
    variant_sha256: str
    mends: tuple[str, ...]


def mend_files(model_dir: Path, checkpoint: Path) -> tuple[MendedFile, ...]:
    """Correct the chat template and the tokenizer of a model that was built from a checkpoint; returns the corrections.

    Raises `BadInput` for a chat template that is not Jinja.
    """
    return tuple(
        file for file in (_mend_template(model_dir, checkpoint), _mend_tokenizer(model_dir, checkpoint)) if file
    )


def _mend_template(model_dir: Path, checkpoint: Path) -> MendedFile | None:
    source = read_chat_template(checkpoint)
    mended = mend_template(source) if source else None
    if source is None or mended is None or not mended.mends:
        return None
    _write(model_dir / CHAT_TEMPLATE, mended.text)
    config = model_dir / TOKENIZER_CONFIG
    settings: Json = read_json(config) if config.is_file() else {}
    if "chat_template" in settings:  # genai would prefer it to the file
        del settings["chat_template"]
        _write(config, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return MendedFile(
        file=CHAT_TEMPLATE,
        source_sha256=_sha256(source.encode()),
        variant_sha256=_sha256(mended.text.encode()),
        mends=mended.mends,
    )


def _mend_tokenizer(model_dir: Path, checkpoint: Path) -> MendedFile | None:
    path, source = model_dir / TOKENIZER, checkpoint / TOKENIZER
    if not path.is_file():
        return None
    own = read_json(source) if source.is_file() and trained_by_file(checkpoint) else None
    mended, mends = mend_tokenizer(read_json(path), own)
    if not mends:
        return None
    built = path.read_bytes()
    _write(path, json.dumps(mended, indent=2, ensure_ascii=False))
    return MendedFile(
        file=TOKENIZER,
        source_sha256=_sha256(source.read_bytes() if source.is_file() else built),
        variant_sha256=_sha256(path.read_bytes()),
        mends=mends,
    )


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # the file may be a link
    path.write_bytes(text.encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
