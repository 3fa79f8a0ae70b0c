"""Other programs on the PATH."""

import shutil
from pathlib import Path


def installed_program(name: str) -> str | None:
    """Return a program's absolute path, or None; a program under the current directory does not count.

    On Windows the current directory is searched first, and a PATH may name relative folders anywhere.
    """
    found = shutil.which(name)
    return found if found and Path(found).is_absolute() else None
