"""Archives as tar files of plain files. The reader accepts exactly the bytes that `TarWriter` writes.

`tarfile` reads each header. On a whole file it would follow other dialects of tar, keep extended headers in memory, and
stop without an error at a damaged header. Therefore it gets three blocks per member, the most that a header takes here,
and what it reads is compared with the header that would be written.
"""

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import NotRegularFile, open_regular
from slmops.infra.storage.local import CHUNK_BYTES

_BLOCK = tarfile.BLOCKSIZE
_HEADER_BYTES = 3 * _BLOCK  # a long name, or a size of 8 GiB or more, is in an extended header of two blocks before it
_LARGEST = 1 << 64
_MEMBER = re.compile(r"[A-Za-z0-9._/-]+")
_KINDS = {
    **{tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link", tarfile.DIRTYPE: "a folder"},
    **{tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe"},
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_COMPRESSED = {
    **{b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"},
    **{b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7-Zip"},
}
_REFUSED = "Nothing was imported. Copy or export it again, and compare its SHA-256 with that of slmops export."


def header_of(name: str, size_bytes: int) -> bytes:
    """Return a member's header with mode 0644 and without owner and time: equal content gives equal archives."""
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    return member.tobuf(tarfile.PAX_FORMAT, "ascii", "strict")


def padding(size_bytes: int) -> int:
    """Return the number of zero bytes after a member of this size."""
    return -size_bytes % _BLOCK


def whole_size(size_bytes: int) -> int:
    """Return the size of an archive from that of its members: two zero blocks follow, and zeros to a full record."""
    return -(-(size_bytes + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def shown(name: str) -> str:
    """Return a foreign name in a form that is safe in a message."""
    return ascii(name) if len(name) <= 100 else f"{name[:100]!a}…"


class TarWriter:
    """Writes an archive into a stream: `add` for each member, then `end`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    @property
    def sha256(self) -> str:
        """The SHA-256 (hex) of what was written so far."""
        return self._hash.hexdigest()

    def add(self, name: str, size_bytes: int, chunks: Iterable[bytes]) -> None:
        """Write a member, whose chunks have this many bytes."""
        self._write(header_of(name, size_bytes))
        for chunk in chunks:
            self._write(chunk)
        self._write(bytes(padding(size_bytes)))

    def end(self) -> None:
        """Write the end of the archive, and flush all of it to the disk."""
        self._write(bytes(whole_size(self.size_bytes) - self.size_bytes))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self.size_bytes += len(data)


class TarReader:
    """The members of an archive, one after the other: `next`, then its `chunks`.

    Raises `BadInput` for anything that `TarWriter` does not write.
    """

    def __init__(self, file: Path, stream: IO[bytes]) -> None:
        self._file = file
        self._stream = stream
        self.size_bytes = os.fstat(stream.fileno()).st_size

    def refusal(self, what: str, fault: str) -> BadInput:
        """Return the error for a fault of the archive."""
        return BadInput(f"{self._file} cannot be imported: {what} {fault}.", _REFUSED)

    def check_compression(self) -> None:
        """Raise `BadInput` for a compressed file."""
        start = self._stream.read(_BLOCK)
        self._stream.seek(0)
        compression = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
        if compression:
            raise BadInput(
                f"{self._file} cannot be imported: it is compressed ({compression}).", "Decompress it to a .tar first."
            )

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member, None at the end of the archive."""
        begin = self._stream.tell()
        blocks = self._stream.read(_HEADER_BYTES)
        if len(blocks) < _BLOCK:
            raise self.refusal("it", f"ends too early, at byte {self.size_bytes:,}")
        member = self._parsed(blocks, begin)
        if member is None:
            self._check_end(begin)
            return None
        name = shown(member.name)
        content = begin + member.offset_data
        if member.type != tarfile.REGTYPE:
            raise self.refusal(name, f"is {_KINDS.get(member.type, 'of a kind of tar')}, not a plain file")
        if not _MEMBER.fullmatch(member.name):
            raise self.refusal(name, "is not a valid name in an archive")
        header = blocks[: member.offset_data]
        if not 0 <= member.size < _LARGEST or header != header_of(member.name, member.size):
            raise self.refusal(name, "has a header that slmops export does not write")
        if member.size > self.size_bytes - content:
            raise self.refusal(name, f"has {member.size:,} bytes by its header, but fewer follow")
        self._stream.seek(content)
        return member

    def chunks(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        """Yield the bytes of the member that `next` returned."""
        left = member.size
        while left:
            chunk = self._stream.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise self.refusal("it", "became shorter while it was read")
            left -= len(chunk)
            yield chunk
        if any(self._stream.read(padding(member.size))):
            raise self.refusal(shown(member.name), "is followed by bytes that do not belong to it")

    def content(self, member: tarfile.TarInfo, at_most_bytes: int) -> bytes:
        """Return the bytes of the member that `next` returned, unless they are too many."""
        if member.size > at_most_bytes:
            fault = f"has {member.size:,} bytes by its header, and at most {at_most_bytes:,} are allowed"
            raise self.refusal(shown(member.name), fault)
        return b"".join(self.chunks(member))

    def _parsed(self, blocks: bytes, begin: int) -> tarfile.TarInfo | None:
        """Return `tarfile`'s parse of a header, or None for a block of zeros."""
        try:
            return tarfile.TarFile(fileobj=io.BytesIO(blocks), encoding="ascii", errors="surrogateescape").next()
        except (tarfile.TarError, ArithmeticError, LookupError, ValueError) as error:
            fault = f"is damaged ({error}), or it is not a tar file of slmops export"
            raise self.refusal(f"its header at byte {begin:,}", fault) from None

    def _check_end(self, end: int) -> None:
        whole = whole_size(end)
        if self.size_bytes != whole:
            raise self.refusal("it", f"has {self.size_bytes:,} bytes and should have {whole:,}")
        self._stream.seek(end)
        if any(self._stream.read(whole - end)):
            raise self.refusal("it", "has data after its last member")


@contextmanager
def opened_tar(file: Path) -> Iterator[TarReader]:
    """Open an archive; raises `BadInput` if it is not a file, cannot be read or is compressed."""
    if not file.exists():
        raise BadInput(f"There is no file {file}.", "Name a file that slmops export wrote.")
    if file.is_dir():
        raise BadInput(f"{file} is a folder.", "Name a file that slmops export wrote.")
    try:
        stream = open_regular(file)
    except NotRegularFile as error:  # the check of an archive reads it more than once
        message = f"{file} cannot be read: {error.strerror}."
        raise BadInput(message, "Write its content to a file, and import that.", code="file-not-regular") from None
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror or error}.", "Check its permissions.") from error
    with stream:
        archive = TarReader(file, stream)
        archive.check_compression()
        yield archive
