"""Downloads. Each file is verified before it is moved to its final place."""

import hashlib
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

from slmops.infra.errors import StageFailed
from slmops.infra.storage.holders import move_to, name_prefix, protect_from_writing
from slmops.infra.storage.local import flush_to_disk
from slmops.infra.storage.objects import Blob, OnBytes
from slmops.infra.storage.s3.bucket import MIB, TRANSFERS, Bucket, workers
from slmops.infra.storage.s3.client import NOT_FOUND, error_code, s3_errors
from slmops.infra.storage.s3.transfer_progress import TransferProgress

SMALL_BYTES = 4 * MIB  # files up to this size are read into memory, TRANSFERS of them at once


def download(
    bucket: Bucket, files: Sequence[tuple[Blob, Path]], aside: Path, on_bytes: OnBytes
) -> list[tuple[Blob, Path]]:
    """Download files into the folder `aside`, verify and place them; returns those that were altered.

    Raises `KeyError` for a missing blob, `StageFailed` if this machine cannot store it.
    """
    with (
        s3_errors(bucket.uri),
        workers(TRANSFERS) as pool,
        bucket.transfers(max(blob.size_bytes for blob, _ in files)) as (manager, _),
    ):
        under_way = {}
        for blob, path in files:
            part = aside / f"{name_prefix()}{uuid.uuid4().hex}"
            if blob.size_bytes <= SMALL_BYTES:
                fetched = pool.submit(_fetch_small, bucket, part, blob, path, on_bytes)
            else:
                subscribers: Any = [TransferProgress(on_bytes, size_bytes=blob.size_bytes)]
                future = manager.download(bucket.name, bucket.key(blob.key), str(part), None, subscribers)
                fetched = pool.submit(_await_and_place, future, part, blob, path)
            under_way[fetched] = (blob, path)
        return [file for done in as_completed(under_way) if not _placed(bucket, done, (file := under_way[done])[0])]


def _fetch_small(bucket: Bucket, part: Path, blob: Blob, path: Path, on_bytes: OnBytes) -> bool:
    """Fetch a small file; one request is faster than the transfer manager's threads."""
    chunks = bucket.again(lambda: list(bucket.chunks(blob.key)))
    on_bytes(blob.size_bytes)
    found = hashlib.sha256()
    for chunk in chunks:
        found.update(chunk)
    if found.hexdigest() != blob.sha256:
        return False
    try:
        with part.open("wb") as stream:
            stream.writelines(chunks)
            flush_to_disk(stream)
        _move_in(part, path)
    finally:
        part.unlink(missing_ok=True)
    return True


def _placed(bucket: Bucket, done: "Future[bool]", blob: Blob) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return done.result()
    except ClientError as error:
        if error_code(error) in NOT_FOUND:
            raise KeyError(blob.key) from None
        raise
    except BotoCoreError:  # some of these are `OSError` too
        raise
    except OSError as error:
        raise StageFailed(
            f"The files of {bucket.uri} cannot be saved: {error.strerror or error}.",
            "Check the disk's free space and the permissions under SLMOPS_HOME.",
            code="disk-failed",
        ) from error


def _await_and_place(future: Any, part: Path, blob: Blob, path: Path) -> bool:
    try:
        future.result()
        return _place(part, blob, path)
    finally:
        part.unlink(missing_ok=True)


def _place(part: Path, blob: Blob, path: Path) -> bool:
    """Move a fetched file to its place if it has the blob's digest; otherwise return False and do nothing."""
    with part.open("r+b") as stream:  # Windows flushes only what may be written
        if hashlib.file_digest(stream, "sha256").hexdigest() != blob.sha256:
            return False
        os.fsync(stream.fileno())
    _move_in(part, path)
    return True


def _move_in(part: Path, path: Path) -> None:
    protect_from_writing(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    move_to(part, path)
