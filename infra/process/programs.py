"""Programs on the PATH."""

import shutil
from pathlib import Path


def installed_program(name: str) -> str | None:
    """Return a program's absolute path, or None; a program under the current directory does not count.

    Windows searches the current directory first, and on any system a PATH may contain relative folders.
    """
    found = shutil.which(name)
    return found if found and Path(found).is_absolute() else None
