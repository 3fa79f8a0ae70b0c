"""The tokens of a checkpoint's tokenizer, read from tokenizer.json."""

from pathlib import Path

from slmops.infra.checkpoints.folder import read_chat_template, read_json
from slmops.infra.records import Json, Untyped

SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def added_tokens(folder: Path) -> dict[str, int]:
    """Return the added tokens of a folder's tokenizer.json and their ids; none without that file."""
    path = folder / "tokenizer.json"
    added = read_json(path).get("added_tokens") if path.is_file() else None
    return {
        entry["content"]: entry["id"]
        for entry in added or []
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and isinstance(entry.get("id"), int)
    }


def tokens_without_rows(folder: Path, rows: int) -> tuple[list[str], list[str]]:
    """Return the tokens without a row in the embedding: those that prompts may have, and those that no prompt needs.

    No prompt needs a control token that neither the chat template nor the tokenizer's roles mention: Gemma 3's small
    text models have one for images. A tokenizer without tokenizer.json is not judged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return [], []
    tokenizer = read_json(path)
    added = [entry for entry in tokenizer.get("added_tokens") or [] if isinstance(entry, dict)]
    control = {entry.get("content") for entry in added if entry.get("special")}
    beyond = [
        token
        for token, number in (*_vocabulary(tokenizer), *((entry.get("content"), entry.get("id")) for entry in added))
        if isinstance(number, int) and number >= rows
    ]
    mentioned = _mentions(folder)
    needed = [token for token in dict.fromkeys(beyond) if token not in control or token in mentioned]
    return needed, [token for token in dict.fromkeys(beyond) if token not in needed]


def _vocabulary(tokenizer: Json) -> list[tuple[Untyped, Untyped]]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return list(vocabulary.items())
    pieces = vocabulary if isinstance(vocabulary, list) else []  # a unigram model's: [token, score], by their id
    return [(piece[0], number) for number, piece in enumerate(pieces) if isinstance(piece, list) and piece]


def _mentions(folder: Path) -> str:
    files = [folder / name for name in SPECIAL_TOKEN_FILES if (folder / name).is_file()]
    roles = [
        str(value)
        for path in files
        for key, value in read_json(path).items()
        if key in ("bos_token", "eos_token", "pad_token", "unk_token")
    ]
    return "\n".join((read_chat_template(folder) or "", *roles))
