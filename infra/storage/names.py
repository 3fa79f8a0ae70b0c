"""Names of models, aliases and files that every operating system can store, and a training run's longest text."""

import re
import unicodedata
from collections.abc import Iterable

from slmops.infra.errors import BadInput

NAME_PATTERN = r"[a-z0-9][a-z0-9-]{0,62}"
LONGEST_TRAINING_RUN = 2000

# https://learn.microsoft.com/en-us/windows/win32/fileio/naming-a-file
WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
NOT_ON_WINDOWS = set('\\:*?"<>|')
LONGEST_PART_BYTES = 255  # of a file system of Linux and macOS


def as_compared(path: str) -> str:
    """Return a path as Windows and macOS compare it: equal ones are one file there."""
    return unicodedata.normalize("NFC", path).casefold()


def fault_of_paths(paths: Iterable[str]) -> str | None:
    """Return why files with these relative paths (parts joined by slashes) cannot be stored, or None if they can."""
    found: dict[str, str] = {}
    for path in paths:
        if fault := _fault_of_path(path):
            return f"{path[:LONGEST_PART_BYTES]!r} {fault}"
        if (first := found.setdefault(as_compared(path), path)) != path:
            return f"{first!r} and {path!r} are one file on Windows and macOS"
    return None


def is_device(name: str) -> bool:
    """Whether Windows takes a file or folder of this name for a device, whatever its ending."""
    return name.partition(".")[0].rstrip().casefold() in WINDOWS_DEVICES


def _fault_of_path(path: str) -> str | None:
    if not path.isprintable():
        return "has a character that cannot be shown"
    if marks := sorted(NOT_ON_WINDOWS & set(path)):
        return f"contains {' '.join(marks)}, which Windows does not allow"
    return next(filter(None, map(_fault_of_part, path.split("/"))), None)


def _fault_of_part(part: str) -> str | None:
    if part in ("", ".", ".."):
        return "is no plain path inside a folder"
    if part.endswith((".", " ")):
        return "has a part that ends with a dot or a space, which Windows does not allow"
    if is_device(part):
        return "has the name of a device on Windows"
    if len(part.encode()) > LONGEST_PART_BYTES:
        return f"has a part of more than {LONGEST_PART_BYTES} bytes"
    return None


def check_name(name: str) -> str:
    """Return a valid model name; raises `BadInput` for any other."""
    if not re.fullmatch(NAME_PATTERN, name):
        shown = name if len(name) <= 80 else name[:80] + "…"
        raise BadInput(
            f"The name {shown!r} is not valid.",
            "A name has 1 to 63 characters: lower-case letters, digits and hyphens, not starting with a hyphen.",
            code="name-not-valid",
        )
    return name


def check_new_name(name: str) -> str:
    """Return a name that a model may get; raises `BadInput` for one that is not valid, or a device on Windows."""
    if is_device(check_name(name)):
        raise BadInput(
            f"The name {name!r} is that of a device on Windows, where no folder can have it.",
            "Name the model otherwise.",
            code="name-not-valid",
        )
    return name
