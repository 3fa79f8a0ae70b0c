"""Files that are written atomically."""

import os
from pathlib import Path

from slmops.infra.storage.holders import move_to, temporary_name

PART_ENDING = ".part"


def write_whole(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write or replace a file in one step, and make its folder if it is missing. Text is written in UTF-8.

    A reader finds either the former or the new content, also after a crash. If several processes write at once, the
    complete content of the last one stays. `mode` is the file's permissions before the process's umask. Raises
    `OSError`; the file is then unchanged. A killed process leaves a file that `gc` removes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that a rename is atomic; the name is unique to this process and thread.
    aside = path.with_name(temporary_name(PART_ENDING))
    data = content.encode() if isinstance(content, str) else content
    try:
        aside.touch(mode, exist_ok=False)
        with aside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        move_to(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
