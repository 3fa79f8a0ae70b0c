"""The interface of object stores; implementations are a local folder (`slmops.infra.storage.local`) and S3."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

BLOBS = "blobs/sha256"

# Called with the number of transferred bytes, in any thread; a negative number subtracts the bytes of a failed attempt.
OnBytes = Callable[[int], None]


def no_report(_moved: int) -> None:
    """An `OnBytes` that reports nothing."""


@dataclass(frozen=True)
class Blob:
    """Content by its SHA-256 (hex) and its size."""

    sha256: str
    size_bytes: int

    @property
    def key(self) -> str:
        """Where a store keeps it."""
        return f"{BLOBS}/{self.sha256}"


@dataclass(frozen=True)
class Entry:
    """An object of a listing; `modified_at` is by the store's own clock."""

    key: str
    size_bytes: int
    modified_at: datetime


class ObjectStore(Protocol):
    """Objects under `/`-separated keys. An object is either complete or absent.

    Every method raises `slmops.infra.errors.BadInput` when its address or credentials are wrong, `StageFailed` when it
    fails (full, unreachable), its kind `PassingFault` when another attempt may succeed, and `KeyError` when a required
    key is missing.
    """

    def check(self, *, by_writing: bool = False) -> None:
        """Raise the error that the first use would raise; with `by_writing` also that of the first write."""

    def notices(self) -> tuple[str, ...]:
        """Return the store's limitations and their substitutes, one sentence each; none before the first write."""

    def missing(self, blobs: Iterable[Blob]) -> list[Blob]:
        """Return the blobs that the store does not have in full size."""

    def put_blobs(self, files: Sequence[tuple[Blob, Path]], on_bytes: OnBytes = no_report) -> None:
        """Store files as blobs, replacing existing ones.

        Afterwards the bytes in the store are known to have the digests: raises `StageFailed` for a file that does not.
        """

    def fetch_blobs(self, files: Sequence[tuple[Blob, Path]], aside: Path, on_bytes: OnBytes = no_report) -> None:
        """Place blobs at paths that do not exist yet, each atomically.

        `aside` is a folder on the file system of the paths, for temporary files. Blobs that are fetched over a network
        are verified; a local store makes hard links if possible.
        """

    def digests(self, blobs: Iterable[Blob], on_bytes: OnBytes = no_report) -> Iterator[tuple[Blob, str | None, int]]:
        """Read blobs as they are stored; yields (blob, SHA-256 in hex, size), or (blob, None, 0) for a missing one."""

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store bytes, replacing an existing object."""

    def put_bytes_if_absent(self, key: str, data: bytes) -> bool:
        """Store bytes under a free key; returns False, with nothing changed, if the key has other bytes."""

    def read_bytes(self, key: str) -> bytes:
        """Return an object's bytes."""

    def entries(self, folder: str) -> Iterator[Entry]:
        """Yield the objects under a folder, sorted by key."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; a missing one is no error."""

    def leftovers(self, older_than: datetime) -> list[Entry]:
        """Return the remains of interrupted writes, outside of any key, that were not modified since `older_than`."""

    def remove_leftovers(self, found: Iterable[Entry]) -> None:
        """Remove remains that `leftovers` returned."""

    def uri(self, key: str) -> str:
        """Return the object's address."""
