"""Programs of other people's that are on the PATH."""

import shutil
from pathlib import Path


def installed_program(name: str) -> str | None:
    """Return a program's absolute path, or None; one that lies where the current directory leads to is none.

    On Windows the current directory is searched first, and a PATH may name relative folders anywhere.
    """
    found = shutil.which(name)
    return found if found and Path(found).is_absolute() else None
