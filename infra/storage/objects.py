"""What slmops asks of a store of objects; a local folder is one (`infra.storage.local`), S3 another."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class ObjectStore(Protocol):
    """Objects under `/`-separated keys. An object is either whole or not there.

    Every method raises `infra.errors.StageFailed` when the store cannot be used (full, no permission, gone),
    and `KeyError` when a key that must be there is not.
    """

    def put_file(self, key: str, source: Path) -> None:
        """Store a file's bytes; an object that is there with the same size is left as it is."""

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store bytes, replacing what is there."""

    def put_bytes_if_absent(self, key: str, data: bytes) -> bool:
        """Store bytes under a key that is free; False, and nothing done, when it is taken."""

    def read_bytes(self, key: str) -> bytes:
        """Return an object's bytes."""

    def size_bytes(self, key: str) -> int | None:
        """Return an object's size, or None when it is not there."""

    def fetch_file(self, key: str, destination: Path) -> None:
        """Place an object's bytes at `destination`, which does not exist yet; a hard link where that is possible."""

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys under a prefix, sorted."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens when it is not there."""

    def lock(self) -> AbstractContextManager[None]:
        """Hold the store against other committers and deleters."""

    def uri(self, key: str) -> str:
        """Return the object's address."""
