"""Progress of boto3's transfer manager."""

from typing import Any

from slmops.infra.storage.objects import OnBytes


class TransferProgress:
    """A subscriber of boto3's transfer manager that reports how many bytes were transferred."""

    def __init__(self, on_bytes: OnBytes, size_bytes: int | None = None) -> None:
        self._on_bytes = on_bytes
        self._size_bytes = size_bytes

    def on_queued(self, future: Any, **_: object) -> None:
        if self._size_bytes is not None:  # known from the manifest, so that boto3 need not request it
            future.meta.provide_transfer_size(self._size_bytes)

    def on_progress(self, bytes_transferred: int, **_: object) -> None:
        self._on_bytes(bytes_transferred)

    def on_done(self, **_: object) -> None:
        pass
