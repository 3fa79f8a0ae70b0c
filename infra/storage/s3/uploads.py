"""Uploads: small files by one request each, large ones in parts; parts of an interrupted upload are reused."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.infra.errors import PassingFault, StageFailed
from slmops.infra.storage.objects import Blob, OnBytes
from slmops.infra.storage.s3.bucket import TRANSFERS, Bucket, base64_sha256, workers
from slmops.infra.storage.s3.client import BAD_CHECKSUM, NO_UPLOAD, error_code, s3_errors
from slmops.infra.storage.s3.resume import Parts, resume_upload
from slmops.infra.storage.s3.transfer_progress import TransferProgress

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig

UPLOAD_ATTEMPTS = 2


Missing = Callable[[Iterable[Blob]], list[Blob]]


def upload(
    bucket: Bucket, files: Sequence[tuple[Blob, Path]], missing: Missing, on_bytes: OnBytes, *, with_checksums: bool
) -> None:
    """Upload files; a file whose upload vanished is sent again if its blob is `missing`.

    With checksums, the SHA-256 of each part is sent. Raises `StageFailed` for a file that is missing or does not match
    its blob, `PassingFault` for one that the server refuses or that was removed during the upload.
    """
    left = list(files)
    for _ in range(UPLOAD_ATTEMPTS):
        # A multipart upload vanishes when another process completes it first (see slmops.infra.storage.s3.resume).
        vanished = _send(bucket, left, on_bytes, with_checksums=with_checksums)
        gone = set(missing(blob for blob, _ in vanished))
        left = [(blob, path) for blob, path in vanished if blob in gone]
        if not left:
            return
    raise PassingFault(f"{bucket.uri}: the upload of {left[0][0].key} was removed on the way.", "Try again.")


def _send(
    bucket: Bucket, files: Sequence[tuple[Blob, Path]], on_bytes: OnBytes, *, with_checksums: bool
) -> list[tuple[Blob, Path]]:
    """Upload files; returns those whose multipart upload vanished."""
    from botocore.exceptions import ClientError

    extra = {"ChecksumAlgorithm": "SHA256"} if with_checksums else {}
    subscribers: Any = [TransferProgress(on_bytes)]
    under_way, vanished = [], []
    with s3_errors(bucket.uri):
        try:
            with (
                bucket.transfers(max(blob.size_bytes for blob, _ in files)) as (manager, config),
                workers(TRANSFERS) as pool,
            ):
                future: Any
                for blob, path in files:
                    if blob.size_bytes <= config.multipart_chunksize:
                        future = pool.submit(_put_small, bucket, blob, path, config, on_bytes, with_checksums)
                        under_way.append((blob, path, future))
                        continue
                    digests = _part_digests(path, blob, config) if with_checksums else None
                    if digests:
                        bucket.part_digests[bucket.key(blob.key)] = digests
                    parts = Parts(path, blob.size_bytes, config.multipart_chunksize, digests)
                    if not _resumed(bucket, blob, parts, on_bytes):
                        future = manager.upload(str(path), bucket.name, bucket.key(blob.key), extra, subscribers)
                        under_way.append((blob, path, future))
                for blob, path, future in under_way:
                    try:
                        future.result()
                    except ClientError as error:
                        if error_code(error) not in NO_UPLOAD:
                            raise
                        vanished.append((blob, path))
        except ClientError as error:
            if with_checksums and error_code(error) in BAD_CHECKSUM:
                raise PassingFault(
                    f"{bucket.uri}: a file was altered in transit.", "Try again.", "s3-altered"
                ) from None
            raise
        except FileNotFoundError as error:
            raise StageFailed(f"{error.filename} is missing.", "It was removed during the upload: try again.") from None
        finally:
            bucket.part_digests.clear()
    return vanished


def _put_small(
    bucket: Bucket, blob: Blob, path: Path, config: "TransferConfig", on_bytes: OnBytes, with_checksums: bool
) -> None:
    """Upload a file of one part, without the transfer manager's threads, which would cost more than they save."""
    checksum: Any = {"ChecksumSHA256": _part_digests(path, blob, config)[0]} if with_checksums else {}
    with path.open("rb") as body:
        bucket.client.put_object(Bucket=bucket.name, Key=bucket.key(blob.key), Body=body, **checksum)
    on_bytes(blob.size_bytes)


def _resumed(bucket: Bucket, blob: Blob, parts: Parts, on_bytes: OnBytes) -> bool:
    from botocore.exceptions import ClientError

    reported = 0

    def report(moved: int) -> None:
        nonlocal reported
        reported += moved
        on_bytes(moved)

    try:
        return resume_upload(bucket.client, bucket.name, bucket.key(blob.key), parts, TRANSFERS, report)
    except ClientError:  # it vanished, or the server refuses to continue it: start from the beginning
        on_bytes(-reported)
        return False


def _part_digests(path: Path, blob: Blob, config: "TransferConfig") -> list[str]:
    """Return the SHA-256 of each part (base 64), computed from the same reading of the file as the blob's SHA-256.

    The server refuses a part with another SHA-256, so it stores the bytes that were digested here. Raises `StageFailed`
    for a file that is not the blob's.
    """
    whole = hashlib.sha256()
    parts = []
    with path.open("rb") as stream:
        while chunk := stream.read(config.multipart_chunksize):
            whole.update(chunk)
            parts.append(base64_sha256(chunk))
    if whole.hexdigest() != blob.sha256:
        raise StageFailed(
            f"{path} was altered: its SHA-256 is {whole.hexdigest()}, not {blob.sha256}.",
            "Copy it again from its origin.",
        )
    return parts or [base64_sha256(b"")]
