"""Files that are there whole or not at all."""

import os
import uuid
from pathlib import Path


def write_whole(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write a file, or replace it, in one step; its folder is made where it is missing. Text is written in UTF-8.

    A reader finds the former content or the new one, also after a crash. If several processes write at once, the
    content of the last one stays, whole. `mode` has the permissions, less the process's umask. Raises `OSError`; the
    file is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that a rename is atomic; of a name that no other process and no other thread has.
    aside = path.with_name(f".{uuid.uuid4().hex}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        aside.touch(mode, exist_ok=False)
        with aside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
