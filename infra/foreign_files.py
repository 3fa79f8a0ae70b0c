"""Files that others wrote: only regular files are read, up to a size, and the marks of Windows editors are understood.

Opening a pipe waits for its writer, and a device may have no end: neither is opened, nor a link to one.
"""

import errno
import io
import json
import os
import stat
from codecs import BOM_UTF8
from collections.abc import Collection, Iterable
from pathlib import Path

from slmops.infra.errors import BadInput

# Files of text and JSON; the largest tokenizer.json in use has some 35 MB.
MAX_TEXT_BYTES = 1 << 28
BYTE_ORDER_MARK = "\ufeff"
# Windows has none of them, nor pipes among the files of a folder.
_OPENED_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
}  # fmt: skip


class NotRegularFile(OSError):
    """A pipe, a device or a socket in place of a file; `strerror` says which."""


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading bytes; never waits.

    Raises `NotRegularFile` for a pipe, a device, a socket and a link to one, `OSError` as `open` does.
    """
    return open(path, "rb", opener=_open_regular)


def check_regular(path: Path) -> None:
    """Raise `NotRegularFile` if `path` is a pipe, a device, a socket or a link to one; before others open it."""
    _check_mode(path.stat().st_mode, path)


def check_files(paths: Iterable[Path]) -> None:
    """Raise `BadInput` for the first of these that is a pipe, a device, a socket or a link to one."""
    for path in paths:
        try:
            check_regular(path)
        except NotRegularFile as error:
            raise BadInput(
                f"{path} cannot be read: {error.strerror}.", "Remove it from the folder.", code="file-not-regular"
            ) from None
        except OSError:  # a link to nothing, which is as good as missing
            continue


def read_regular(path: Path, most_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Return the content of a regular file; raises `OSError` as `open_regular` does, and for a larger one."""
    data = read_beginning(path, most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
    return data


def read_beginning(path: Path, size: int) -> bytes:
    """Return at most `size` bytes of a regular file's beginning; raises `OSError` as `open_regular` does."""
    with open_regular(path) as stream:
        return stream.read(size)


def read_text(path: Path) -> str:
    """Return the text of a regular file in UTF-8, with plain line ends and without a byte order mark.

    Raises `OSError` as `read_regular` does, and `ValueError` for another encoding.
    """
    return text_of(read_regular(path)).replace("\r\n", "\n").replace("\r", "\n")


def marked_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files of a folder with these endings that begin with UTF-8's byte order mark."""
    files = (path for path in sorted(folder.iterdir()) if path.suffix in suffixes and path.is_file())
    return [path for path in files if begins_with_mark(path)]


def begins_with_mark(path: Path) -> bool:
    """Whether a file begins with UTF-8's byte order mark; raises `OSError` as `open_regular` does."""
    return read_beginning(path, len(BOM_UTF8)) == BOM_UTF8


def text_of(data: bytes) -> str:
    """Return a text in UTF-8 without a byte order mark; raises `ValueError` that names what it is instead."""
    encoding = json.detect_encoding(data)  # by the marks and null bytes of any text that begins with ASCII characters
    if not encoding.startswith("utf-8"):
        raise ValueError(f"it is {encoding[:6].upper()} and not UTF-8; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start + 1}") from None


def _open_regular(path: str, flags: int) -> int:
    check_regular(Path(path))  # a device may act when it is opened
    descriptor = os.open(path, flags | _OPENED_AT_ONCE)
    try:
        _check_mode(os.fstat(descriptor).st_mode, path)  # it may have been replaced meanwhile
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_mode(mode: int, path: str | Path) -> None:
    if kind := _KINDS.get(stat.S_IFMT(mode)):
        raise NotRegularFile(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
