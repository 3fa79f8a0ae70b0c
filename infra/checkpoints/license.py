"""The license of a checkpoint, as the metadata of its model card says."""

import re
from pathlib import Path

import yaml

from slmops.infra.foreign_files import read_beginning, text_of

MODEL_CARD = "README.md"
MAX_CARD_BYTES = 100_000
_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---(?:\n|\Z)", re.DOTALL)
_NAME = re.compile(r"[\w.+ -]{1,100}")


def license_of(folder: Path) -> str | None:
    """Return the license that a folder's README.md names, such as `apache-2.0`; None if it names none.

    A license that the Hub does not know (`other`) has its name in `license_name`.
    """
    try:
        found = _FRONT_MATTER.match(text_of(read_beginning(folder / MODEL_CARD, MAX_CARD_BYTES)).replace("\r\n", "\n"))
        card = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    if not isinstance(card, dict):
        return None
    name = card.get("license")
    name = card.get("license_name", name) if name == "other" else name
    return name if isinstance(name, str) and _NAME.fullmatch(name) else None
