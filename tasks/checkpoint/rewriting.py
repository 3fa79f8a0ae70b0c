"""A checkpoint with some of its text files rewritten, so that every runtime reads the same; its weights are linked."""

import json
from collections.abc import Mapping
from pathlib import Path

from slmops.infra.checkpoints.dequantization import PACKED
from slmops.infra.checkpoints.folder import read_json
from slmops.infra.foreign_files import marked_files, read_text
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import link_or_copy, made_once
from slmops.infra.storage.manifest import digest_of
from slmops.tasks.checkpoint.inspection import digest_with_rows

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def without_marks(folder: Path, settings: Settings) -> Path:
    """Return a checkpoint whose JSON and text files have no byte order mark, with which no library reads them.

    A chat template in a file of its own keeps it: transformers reads the mark as a part of every prompt.
    """
    marked = marked_files(folder, (".json", ".txt")) if folder.is_dir() else []
    return with_files(folder, {path.name: read_text(path) for path in marked}, settings) if marked else folder


def with_own_lm_head(folder: Path, settings: Settings) -> Path:
    """Return a checkpoint whose config.json says that embedding and lm_head are separate, as transformers loads it."""
    configs = [name for name in ("config.json", f"{PACKED}/config.json") if (folder / name).is_file()]
    untied = {name: _json(read_json(folder / name) | {"tie_word_embeddings": False}) for name in configs}
    return with_files(folder, untied, settings)


def with_chat_template(folder: Path, template: str, settings: Settings) -> Path:
    """Return a checkpoint with another chat template."""
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    # The runtimes read it here, transformers in each of the files.
    written = {"tokenizer_config.json": _json(config | {"chat_template": template})}
    return with_files(folder, dict.fromkeys(TEMPLATE_FILES) | written, settings)


def with_files(folder: Path, files: Mapping[str, str | None], settings: Settings) -> Path:
    """Return a folder with a checkpoint's files, of which some have another text; those with None are left out.

    Equal contents are made once.
    """
    target = (
        settings.cache_dir / "checkpoints" / digest_of({"checkpoint": digest_with_rows(folder), "files": {**files}})
    )
    with made_once(target, settings) as made:
        if made:
            made.mkdir()
            packed = (folder / PACKED).iterdir() if (folder / PACKED).is_dir() else ()
            for path in (*folder.iterdir(), *packed):
                name = path.relative_to(folder)
                if path.is_file() and name.as_posix() not in files:
                    (made / name).parent.mkdir(exist_ok=True)
                    link_or_copy(path, made / name)
            for text_name, text in files.items():
                if text is not None:
                    (made / text_name).parent.mkdir(exist_ok=True)
                    (made / text_name).write_text(text, "utf-8", newline="\n")
    return target


def _json(value: object) -> str:
    return json.dumps(value, indent=2)
