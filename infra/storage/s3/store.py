"""A store of objects in an S3 bucket, on AWS or on a compatible server."""

import base64
import hashlib
import os
import random
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from slmops.infra.errors import PassingFault, StageFailed
from slmops.infra.settings import StoreSettings
from slmops.infra.storage.holders import has_ended
from slmops.infra.storage.local import aside_prefix, flush_to_disk, holder_of
from slmops.infra.storage.objects import BLOBS, Blob, Entry, OnBytes, untold
from slmops.infra.storage.s3.client import (
    CONNECTIONS,
    NOT_FOUND,
    cut_off,
    error_code,
    make_client,
    parse_s3_uri,
    s3_errors,
)
from slmops.infra.storage.s3.resume import Parts, resume_upload

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig
    from mypy_boto3_s3 import S3Client
    from s3transfer.manager import TransferManager

MIB = 1 << 20
# Large enough that requests cost little, small enough that all parts under way take little memory.
PART_BYTES = 16 * MIB
TRANSFERS = 8
SMALL_BYTES = 4 * MIB  # TRANSFERS of them are held in memory
BLOBS_PER_LISTED_PAGE = 50  # to list 1,000 names costs about as much as to ask for so many
MOST_PARTS = 10_000  # S3's limit
DOWNLOAD_ATTEMPTS = 3
UPLOAD_ATTEMPTS = 2
DELETED_AT_ONCE = 1000  # S3's limit
PROBES = "probes"
CLAIMS = "claims"
# What only one process writes, so that it can be compared with what was sent.
WRITTEN_ONCE = re.compile(r"models/[^/]+/[0-9]+/|inputs/")
# Codes by which servers refuse a body that does not have the SHA-256 sent with it.
BAD_CHECKSUM = {
    "BadDigest",
    "InvalidDigest",
    "InvalidRequest",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "ChecksumMismatch",
}
NO_UPLOAD = NOT_FOUND | {"NoSuchUpload"}
TAKEN = {"412", "PreconditionFailed"}
# Codes by which servers refuse a header that they do not know.
UNKNOWN = {"501", "NotImplemented", "InvalidArgument"}
CLAIM_ATTEMPTS = 6
CLAIM_WAIT_S = 0.1
CLAIM_TERM = timedelta(minutes=5)  # another machine's claim counts for so long


T = TypeVar("T")


@dataclass(frozen=True)
class Capabilities:
    """What a server was found to do: refuse to replace an object where that is asked, and verify SHA-256 headers."""

    conditional_writes: bool
    verifies_sha256: bool


@dataclass
class _Connection:
    """What is made at the first request."""

    client: "S3Client"
    part_digests: dict[str, list[str]] = field(default_factory=dict)  # key -> SHA-256 of each part, in base 64


class S3ObjectStore:
    """`ObjectStore` under `s3://BUCKET/PREFIX`; raises `BadInput` for an address that is not valid."""

    def __init__(self, uri: str, settings: StoreSettings) -> None:
        self._bucket, self._prefix = parse_s3_uri(uri)
        self._uri = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self._settings = settings
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self._capabilities: Capabilities | None = None

    # What the server can do

    def check(self, *, by_writing: bool = False) -> None:
        """See `ObjectStore.check`."""
        with s3_errors(self._uri):
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._key("models/"), MaxKeys=1)
        if by_writing:
            _ = self.capabilities

    def notices(self) -> tuple[str, ...]:
        """See `ObjectStore.notices`."""
        found = self._capabilities
        if found is None:
            return ()
        texts = []
        if not found.conditional_writes:
            texts.append(
                f"{self._uri}: the server does not know conditional writes (If-None-Match). A version number is "
                "claimed and looked at again before it is taken, which is as safe and may skip one."
            )
        if not found.verifies_sha256:
            texts.append(f"{self._uri}: the server does not verify SHA-256 checksums. What is stored is read back.")
        return tuple(texts)

    @property
    def capabilities(self) -> Capabilities:
        """Found out by trying, once, in a folder of its own; an echoed header is no proof that a server verifies."""
        with self._lock:
            if self._capabilities is None:
                with s3_errors(self._uri):
                    self._capabilities = self._probe()
            return self._capabilities

    def _probe(self) -> Capabilities:
        key = f"{PROBES}/{aside_prefix()}{uuid.uuid4().hex}"
        self._put(key, b"probe")
        try:
            return Capabilities(
                conditional_writes=self._refuses(TAKEN, key, b"probe again", IfNoneMatch="*"),
                verifies_sha256=self._refuses(BAD_CHECKSUM, key, b"altered", ChecksumSHA256=_base64_sha256(b"probe")),
            )
        finally:
            self._client.delete_object(Bucket=self._bucket, Key=self._key(key))

    def _refuses(self, codes: set[str], key: str, data: bytes, **conditions: Any) -> bool:
        from botocore.exceptions import ClientError

        try:
            self._put(key, data, **conditions)
        except ClientError as error:
            if error_code(error) in codes:
                return True
            if error_code(error) not in UNKNOWN:
                raise
        return False

    # Blobs

    def missing(self, blobs: Iterable[Blob]) -> list[Blob]:
        """See `ObjectStore.missing`."""
        wanted = list(blobs)
        with s3_errors(self._uri), _workers(CONNECTIONS) as pool:
            listed, is_all = self._listed(BLOBS, most_pages=len(wanted) // BLOBS_PER_LISTED_PAGE)
            sizes: dict[str, int | None] = {entry.key: entry.size_bytes for entry in listed}
            unknown = [] if is_all else [blob.key for blob in wanted if blob.key not in sizes]
            sizes.update(zip(unknown, pool.map(self._size_bytes, unknown), strict=True))
        return [blob for blob in wanted if sizes.get(blob.key) != blob.size_bytes]

    def _size_bytes(self, key: str) -> int | None:
        from botocore.exceptions import ClientError

        try:
            return self._client.head_object(Bucket=self._bucket, Key=self._key(key))["ContentLength"]
        except ClientError as error:
            if error_code(error) in NOT_FOUND:
                return None
            raise

    def put_blobs(self, files: Sequence[tuple[Blob, Path]], on_bytes: OnBytes = untold) -> None:
        """See `ObjectStore.put_blobs`."""
        if not files:
            return
        verifies = self.capabilities.verifies_sha256
        largest_first = sorted(files, key=lambda file: -file[0].size_bytes)
        self._upload(largest_first, on_bytes, with_checksums=verifies)
        if not verifies:
            self._read_back([blob for blob, _ in largest_first])

    def _upload(self, files: Sequence[tuple[Blob, Path]], on_bytes: OnBytes, *, with_checksums: bool) -> None:
        left = list(files)
        for _ in range(UPLOAD_ATTEMPTS):
            # A multipart upload vanishes when another process completes it first (see slmops.infra.storage.s3.resume).
            vanished = self._send(left, on_bytes, with_checksums=with_checksums)
            gone = set(self.missing(blob for blob, _ in vanished))
            left = [(blob, path) for blob, path in vanished if blob in gone]
            if not left:
                return
        raise PassingFault(f"{self._uri}: the upload of {left[0][0].key} was removed on the way.", "Try again.")

    def _send(
        self, files: Sequence[tuple[Blob, Path]], on_bytes: OnBytes, *, with_checksums: bool
    ) -> list[tuple[Blob, Path]]:
        """Upload files; returns those whose multipart upload vanished."""
        from botocore.exceptions import ClientError

        extra = {"ChecksumAlgorithm": "SHA256"} if with_checksums else {}
        told: Any = [_Told(on_bytes)]
        under_way, vanished = [], []
        with s3_errors(self._uri):
            try:
                with (
                    self._transfers(max(blob.size_bytes for blob, _ in files)) as (manager, config),
                    _workers(TRANSFERS) as pool,
                ):
                    future: Any
                    for blob, path in files:
                        if blob.size_bytes <= config.multipart_chunksize:
                            future = pool.submit(self._put_small, blob, path, config, on_bytes, with_checksums)
                            under_way.append((blob, path, future))
                            continue
                        digests = _part_digests(path, blob, config) if with_checksums else None
                        if digests:
                            self._connected.part_digests[self._key(blob.key)] = digests
                        parts = Parts(path, blob.size_bytes, config.multipart_chunksize, digests)
                        if not self._resumed(blob, parts, on_bytes):
                            future = manager.upload(str(path), self._bucket, self._key(blob.key), extra, told)
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
                    raise PassingFault(f"{self._uri}: a file was altered on its way there.", "Try again.") from None
                raise
            except FileNotFoundError as error:
                raise StageFailed(f"{error.filename} is gone.", "It was removed meanwhile: try again.") from None
            finally:
                self._connected.part_digests.clear()
        return vanished

    def _put_small(
        self, blob: Blob, path: Path, config: "TransferConfig", on_bytes: OnBytes, with_checksums: bool
    ) -> None:
        """Upload a file of one part, for which the transfer manager's threads cost more than they save."""
        checksum: Any = {"ChecksumSHA256": _part_digests(path, blob, config)[0]} if with_checksums else {}
        with path.open("rb") as body:
            self._client.put_object(Bucket=self._bucket, Key=self._key(blob.key), Body=body, **checksum)
        on_bytes(blob.size_bytes)

    def _resumed(self, blob: Blob, parts: Parts, on_bytes: OnBytes) -> bool:
        from botocore.exceptions import ClientError

        told = 0

        def tell(moved: int) -> None:
            nonlocal told
            told += moved
            on_bytes(moved)

        try:
            return resume_upload(self._client, self._bucket, self._key(blob.key), parts, TRANSFERS, tell)
        except ClientError:  # it vanished, or the server does not go on with it: from the beginning, then
            on_bytes(-told)
            return False

    def _read_back(self, blobs: Sequence[Blob]) -> None:
        """Remove what does not have its digest: the server has altered it, or the file was while it was read."""
        altered = [blob for blob, sha256, _ in self.digests(blobs) if sha256 != blob.sha256]
        if altered:
            self.delete(blob.key for blob in altered)
            raise PassingFault(
                f"{self._uri}: {len(altered)} of {len(blobs)} files were read back otherwise than they were stored.",
                "Try again; if it stays so, check the files (slmops verify) and the server's disk.",
            )

    def fetch_blobs(self, files: Sequence[tuple[Blob, Path]], aside: Path, on_bytes: OnBytes = untold) -> None:
        """See `ObjectStore.fetch_blobs`."""
        if not files:
            return
        aside.mkdir(parents=True, exist_ok=True)
        left = sorted(files, key=lambda file: -file[0].size_bytes)
        for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
            left = self._download(left, aside, on_bytes if attempt == 1 else untold)
            if not left:
                return
        blob = left[0][0]
        raise StageFailed(
            f"{self._uri}: {blob.key} came altered {DOWNLOAD_ATTEMPTS} times.",
            "See with slmops verify whether the store holds it so, or the way to it alters it.",
        )

    def _download(self, files: Sequence[tuple[Blob, Path]], aside: Path, on_bytes: OnBytes) -> list[tuple[Blob, Path]]:
        """Download, verify and place files; returns those that came altered."""
        with (
            s3_errors(self._uri),
            _workers(TRANSFERS) as pool,
            self._transfers(max(blob.size_bytes for blob, _ in files)) as (manager, _),
        ):
            under_way = {}
            for blob, path in files:
                part = aside / f"{aside_prefix()}{uuid.uuid4().hex}"
                if blob.size_bytes <= SMALL_BYTES:
                    fetched = pool.submit(self._fetch_small, part, blob, path, on_bytes)
                else:
                    told: Any = [_Told(on_bytes, size_bytes=blob.size_bytes)]
                    future = manager.download(self._bucket, self._key(blob.key), str(part), None, told)
                    fetched = pool.submit(_await_and_place, future, part, blob, path)
                under_way[fetched] = (blob, path)
            return [file for done in as_completed(under_way) if not self._placed(done, (file := under_way[done])[0])]

    def _fetch_small(self, part: Path, blob: Blob, path: Path, on_bytes: OnBytes) -> bool:
        """Fetch a file that is verified before it is written, and faster than by the transfer manager's threads."""
        chunks = self._again(lambda: list(self._chunks(blob.key)))
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

    def _placed(self, done: "Future[bool]", blob: Blob) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return done.result()
        except ClientError as error:
            if error_code(error) in NOT_FOUND:
                raise KeyError(blob.key) from None
            raise
        except BotoCoreError:  # some are `OSError` too
            raise
        except OSError as error:
            raise StageFailed(
                f"The files of {self._uri} cannot be kept: {error.strerror or error}.",
                "Check the disk's free space and the permissions under SLMOPS_HOME.",
            ) from error

    def digests(self, blobs: Iterable[Blob], on_bytes: OnBytes = untold) -> Iterator[tuple[Blob, str | None, int]]:
        """See `ObjectStore.digests`."""
        with s3_errors(self._uri), _workers(TRANSFERS) as pool:
            yield from pool.map(lambda blob: (blob, *self._digest(blob.key, on_bytes)), list(blobs))

    def _digest(self, key: str, on_bytes: OnBytes) -> tuple[str | None, int]:
        from botocore.exceptions import ClientError

        def digest() -> tuple[str, int]:
            found, size_bytes = hashlib.sha256(), 0
            try:
                for chunk in self._chunks(key):
                    found.update(chunk)
                    size_bytes += len(chunk)
                    on_bytes(len(chunk))
            except cut_off():
                on_bytes(-size_bytes)
                raise
            return found.hexdigest(), size_bytes

        try:
            return self._again(digest)
        except ClientError as error:
            if error_code(error) in NOT_FOUND:
                return None, 0
            raise

    def _chunks(self, key: str) -> Iterator[bytes]:
        from botocore.exceptions import ReadTimeoutError, ResponseStreamingError

        body = self._client.get_object(Bucket=self._bucket, Key=self._key(key))["Body"]
        try:
            yield from body.iter_chunks(MIB)
        except ReadTimeoutError as error:  # in mid-body, where botocore does not try again
            raise ResponseStreamingError(error=error) from None

    def _again(self, ask: Callable[[], T]) -> T:
        """Ask again where the answer was cut off, which botocore does not."""
        for _ in range(DOWNLOAD_ATTEMPTS - 1):
            with suppress(*cut_off()):
                return ask()
        return ask()

    # Small objects

    def put_bytes(self, key: str, data: bytes) -> None:
        """See `ObjectStore.put_bytes`."""
        with s3_errors(self._uri):
            self._put(key, data)
        self._check_stored(key, data)

    def _put(self, key: str, data: bytes, **conditions: Any) -> None:
        conditions.setdefault("ChecksumSHA256", _base64_sha256(data))
        self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data, **conditions)

    def _check_stored(self, key: str, data: bytes) -> None:
        # A lease is renewed and a pointer moved by others too; only what is written once can be compared.
        if not WRITTEN_ONCE.match(key) or self.capabilities.verifies_sha256 or self._holds(key, data):
            return
        self.delete([key])
        raise PassingFault(
            f"{self.uri(key)} was read back otherwise than it was stored.",
            "Try again; if it stays so, check the server's disk.",
        )

    def put_bytes_if_absent(self, key: str, data: bytes) -> bool:
        """See `ObjectStore.put_bytes_if_absent`."""
        if not self.capabilities.conditional_writes:
            return self._put_bytes_alone(key, data)
        from botocore.exceptions import ClientError

        with s3_errors(self._uri):
            try:
                self._put(key, data, IfNoneMatch="*")
            except ClientError as error:
                if error_code(error) not in TAKEN:
                    raise
                return self._holds(key, data)  # ours, if only the answer to an earlier attempt was lost
        self._check_stored(key, data)
        return True

    def _put_bytes_alone(self, key: str, data: bytes) -> bool:
        """Store bytes under a free key of a server without conditional writes.

        Whoever wants the key leaves a claim on it and only then looks: of two, the later one sees the other's claim,
        or the object. One that is not alone withdraws and tries again; so at most one of them writes. A claim that
        another machine left behind counts for a while: as long as it does, the key is taken.
        """
        folder = f"{CLAIMS}/{key}"
        claim = f"{folder}/{aside_prefix()}{uuid.uuid4().hex}"
        for attempt in range(CLAIM_ATTEMPTS):
            deadline = time.monotonic() + CLAIM_TERM.total_seconds() / 2
            try:
                self.put_bytes(claim, b"")
                alone = self._is_alone(folder, claim)
                taken = self._is_taken(key)  # in this order: one that wrote took its claim away only after that
                alone = alone and time.monotonic() < deadline  # held up for longer, the claim may count no more
                if alone and not taken:
                    self.put_bytes(key, data)
            finally:
                self.delete([claim])
            if alone or taken:
                return not taken or self._holds(key, data)
            time.sleep(random.uniform(0, CLAIM_WAIT_S * 2**attempt))  # noqa: S311
        return False

    def _is_alone(self, folder: str, claim: str) -> bool:
        entries = {entry.key: entry.modified_at for entry in self.entries(folder)}
        now = entries.pop(claim, None)
        return now is not None and all(
            now - claimed_at > CLAIM_TERM or has_ended(holder_of(key)) for key, claimed_at in entries.items()
        )

    def _is_taken(self, key: str) -> bool:
        with s3_errors(self._uri):
            return self._size_bytes(key) is not None

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.read_bytes(key) == data
        except KeyError:
            return False

    def read_bytes(self, key: str) -> bytes:
        """See `ObjectStore.read_bytes`."""
        with _named(key), s3_errors(self._uri):
            return self._again(lambda: b"".join(self._chunks(key)))

    def entries(self, folder: str) -> Iterator[Entry]:
        """See `ObjectStore.entries`."""
        with s3_errors(self._uri):
            found, _ = self._listed(folder)
        yield from sorted(found, key=lambda entry: entry.key)

    def _listed(self, folder: str, most_pages: int | None = None) -> tuple[list[Entry], bool]:
        """List a folder, or its first pages only; returns what was found, and whether that is all there is."""

        def ask() -> tuple[list[Entry], bool]:
            found: list[Entry] = []
            is_all = False
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._key(f"{folder}/")
            )
            for page in islice(pages, most_pages):
                found += [
                    Entry(self._without_prefix(one["Key"]), one["Size"], one["LastModified"])
                    for one in page.get("Contents", [])
                ]
                is_all = not page.get("IsTruncated")
            return found, is_all

        return self._again(ask)

    def delete(self, keys: Iterable[str]) -> None:
        """See `ObjectStore.delete`."""
        wanted = [self._key(key) for key in keys]
        with s3_errors(self._uri):
            for start in range(0, len(wanted), DELETED_AT_ONCE):
                batch = wanted[start : start + DELETED_AT_ONCE]
                if len(batch) == 1:
                    self._client.delete_object(Bucket=self._bucket, Key=batch[0])
                    continue
                answer = self._client.delete_objects(
                    Bucket=self._bucket, Delete={"Objects": [{"Key": key} for key in batch], "Quiet": True}
                )
                failed = [one for one in answer.get("Errors", []) if one.get("Code") not in NOT_FOUND]
                if failed:
                    raise StageFailed(
                        f"{self._uri}: {len(failed)} objects could not be deleted ({failed[0].get('Code')}).",
                        "See whether they are locked, and whether this user may delete.",
                    )

    def leftovers(self, older_than: datetime) -> list[Entry]:
        """See `ObjectStore.leftovers`: parts of uploads that were never completed, claims and probes."""
        from botocore.exceptions import ClientError

        uploads = []
        with s3_errors(self._uri):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._key("")
            )
            try:
                for page in pages:
                    for one in page.get("Uploads", []):
                        key = f"{self._without_prefix(one['Key'])}?{one['UploadId']}"
                        uploads.append(Entry(key, 0, one["Initiated"]))
            except ClientError as error:
                if error_code(error) not in NO_UPLOAD:  # rclone's answer where there is none
                    raise
        aside = (*uploads, *self.entries(CLAIMS), *self.entries(PROBES))
        return [one for one in aside if one.modified_at < older_than or has_ended(holder_of(one.key))]

    def remove_leftovers(self, found: Iterable[Entry]) -> None:
        """See `ObjectStore.remove_leftovers`."""
        from botocore.exceptions import ClientError

        for entry in found:
            key, _, upload_id = entry.key.partition("?")
            if not upload_id:
                self.delete([key])
                continue
            with s3_errors(self._uri):
                try:
                    self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._key(key), UploadId=upload_id)
                except ClientError as error:
                    if error_code(error) not in NO_UPLOAD:
                        raise

    def uri(self, key: str) -> str:
        """See `ObjectStore.uri`."""
        return f"{self._uri}/{key}"

    # The connection

    @property
    def _connected(self) -> _Connection:
        if self._connection is None:
            client = make_client(self._settings)
            self._connection = connection = _Connection(client)

            def add_checksum(params: dict[str, Any], **_: Any) -> Any:
                digests = connection.part_digests.get(params["Key"])
                return {**params, "ChecksumSHA256": digests[params.get("PartNumber", 1) - 1]} if digests else params

            for operation in ("PutObject", "UploadPart"):
                client.meta.events.register(f"provide-client-params.s3.{operation}", add_checksum)
        return self._connection

    @property
    def _client(self) -> "S3Client":
        return self._connected.client

    @contextmanager
    def _transfers(self, largest_bytes: int) -> Iterator[tuple["TransferManager", "TransferConfig"]]:
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        part_bytes = max(PART_BYTES, -(-largest_bytes // MOST_PARTS))
        config = TransferConfig(
            multipart_threshold=part_bytes,
            multipart_chunksize=part_bytes,
            max_concurrency=TRANSFERS,
            io_chunksize=MIB,
            # boto3 takes AWS's native client where it is installed and pays; it knows no other endpoint than AWS's.
            preferred_transfer_client="classic" if self._settings.endpoint_url else "auto",
        )
        with create_transfer_manager(self._client, config) as manager:
            yield manager, config

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _without_prefix(self, key: str) -> str:
        return key.removeprefix(f"{self._prefix}/") if self._prefix else key


class _Told:
    """A subscriber of boto3's transfer manager that passes on how many bytes moved."""

    def __init__(self, on_bytes: OnBytes, size_bytes: int | None = None) -> None:
        self._on_bytes = on_bytes
        self._size_bytes = size_bytes

    def on_queued(self, future: Any, **_: Any) -> None:
        if self._size_bytes is not None:  # known from the manifest: it need not be asked for
            future.meta.provide_transfer_size(self._size_bytes)

    def on_progress(self, bytes_transferred: int, **_: Any) -> None:
        self._on_bytes(bytes_transferred)

    def on_done(self, **_: Any) -> None:
        pass


def _await_and_place(future: Any, part: Path, blob: Blob, path: Path) -> bool:
    try:
        future.result()
        return _place(part, blob, path)
    finally:
        part.unlink(missing_ok=True)


def _place(part: Path, blob: Blob, path: Path) -> bool:
    """Move a fetched file to its place if it has the blob's digest; False, and nothing done, otherwise."""
    with part.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != blob.sha256:
            return False
        os.fsync(stream.fileno())
    _move_in(part, path)
    return True


def _move_in(part: Path, path: Path) -> None:
    # A model folder may be a hard link to this file: whoever writes there must not alter it.
    part.chmod(stat.S_IREAD | stat.S_IRGRP | stat.S_IROTH)
    path.parent.mkdir(parents=True, exist_ok=True)
    part.replace(path)


def _part_digests(path: Path, blob: Blob, config: "TransferConfig") -> list[str]:
    """Return the SHA-256 of each part (base 64), of the very bytes whose SHA-256 as a whole is the blob's.

    The server refuses a part that has another: what it stores is what was digested here. Raises `StageFailed` for a
    file that is not the blob's.
    """
    whole = hashlib.sha256()
    parts = []
    with path.open("rb") as stream:
        while chunk := stream.read(config.multipart_chunksize):
            whole.update(chunk)
            parts.append(_base64_sha256(chunk))
    if whole.hexdigest() != blob.sha256:
        raise StageFailed(
            f"{path} is not what it was: its SHA-256 is {whole.hexdigest()}, not {blob.sha256}.",
            "It was altered: bring it anew from where it came from.",
        )
    return parts or [_base64_sha256(b"")]


def _base64_sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads; after an error, what they have not begun is not begun."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except KeyError:
        raise KeyError(key) from None
