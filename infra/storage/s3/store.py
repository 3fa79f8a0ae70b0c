"""A store of objects in an S3 bucket, on AWS or on a compatible server."""

import random
import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from slmops.infra.errors import PassingFault, StageFailed
from slmops.infra.settings import StoreSettings
from slmops.infra.storage.holders import has_ended, holder_of, name_prefix
from slmops.infra.storage.objects import BLOBS, Blob, Entry, OnBytes, no_report
from slmops.infra.storage.s3.bucket import TRANSFERS, Bucket, base64_sha256, workers
from slmops.infra.storage.s3.client import BAD_CHECKSUM, CONNECTIONS, NO_UPLOAD, NOT_FOUND, error_code, s3_errors
from slmops.infra.storage.s3.downloads import download
from slmops.infra.storage.s3.uploads import upload

BLOBS_PER_LISTED_PAGE = 50  # listing 1,000 names costs about as much as this many requests
DOWNLOAD_ATTEMPTS = 3
DELETED_AT_ONCE = 1000  # S3's limit
PROBES = "probes"
CLAIMS = "claims"
# Objects that only one process writes, so that they can be compared with what was sent.
WRITTEN_ONCE = re.compile(r"models/[^/]+/[0-9]+/|inputs/")
TAKEN = {"412", "PreconditionFailed"}
# Error codes of servers for an unknown header.
UNKNOWN = {"501", "NotImplemented", "InvalidArgument"}
CLAIM_ATTEMPTS = 6
CLAIM_WAIT_S = 0.1
CLAIM_TERM = timedelta(minutes=5)  # after this time another machine's claim expires


@dataclass(frozen=True)
class Capabilities:
    """Whether a server supports conditional writes, and whether it verifies SHA-256 headers."""

    conditional_writes: bool
    verifies_sha256: bool


class S3ObjectStore:
    """`ObjectStore` under `s3://BUCKET/PREFIX`; raises `BadInput` for an address that is not valid."""

    def __init__(self, uri: str, settings: StoreSettings) -> None:
        self._bucket = Bucket(uri, settings)
        self._uri = self._bucket.uri
        self._lock = threading.Lock()
        self._capabilities: Capabilities | None = None

    # Capabilities of the server

    def check(self, *, by_writing: bool = False) -> None:
        """See `ObjectStore.check`."""
        with s3_errors(self._uri):
            self._bucket.client.list_objects_v2(Bucket=self._bucket.name, Prefix=self._bucket.key("models/"), MaxKeys=1)
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
                "claimed and checked again before it is used. This is as safe, but may skip a number."
            )
        if not found.verifies_sha256:
            texts.append(f"{self._uri}: the server does not verify SHA-256 checksums. Stored content is read back.")
        return tuple(texts)

    @property
    def capabilities(self) -> Capabilities:
        """Tested once in a separate folder, because an echoed header does not prove that a server verifies it."""
        with self._lock:
            if self._capabilities is None:
                with s3_errors(self._uri):
                    self._capabilities = self._probe()
            return self._capabilities

    def _probe(self) -> Capabilities:
        key = f"{PROBES}/{name_prefix()}{uuid.uuid4().hex}"
        self._bucket.put(key, b"probe")
        try:
            return Capabilities(
                conditional_writes=self._refuses(TAKEN, key, b"probe again", IfNoneMatch="*"),
                verifies_sha256=self._refuses(BAD_CHECKSUM, key, b"altered", ChecksumSHA256=base64_sha256(b"probe")),
            )
        finally:
            self._bucket.client.delete_object(Bucket=self._bucket.name, Key=self._bucket.key(key))

    def _refuses(self, codes: set[str], key: str, data: bytes, **conditions: object) -> bool:
        from botocore.exceptions import ClientError

        try:
            self._bucket.put(key, data, **conditions)
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
        with s3_errors(self._uri), workers(CONNECTIONS) as pool:
            listed, is_all = self._bucket.listed(BLOBS, most_pages=len(wanted) // BLOBS_PER_LISTED_PAGE)
            sizes: dict[str, int | None] = {entry.key: entry.size_bytes for entry in listed}
            unknown = [] if is_all else [blob.key for blob in wanted if blob.key not in sizes]
            sizes.update(zip(unknown, pool.map(self._bucket.size_bytes, unknown), strict=True))
        return [blob for blob in wanted if sizes.get(blob.key) != blob.size_bytes]

    def put_blobs(self, files: Sequence[tuple[Blob, Path]], on_bytes: OnBytes = no_report) -> None:
        """See `ObjectStore.put_blobs`."""
        if not files:
            return
        verifies = self.capabilities.verifies_sha256
        largest_first = sorted(files, key=lambda file: -file[0].size_bytes)
        upload(self._bucket, largest_first, self.missing, on_bytes, with_checksums=verifies)
        if not verifies:
            self._read_back([blob for blob, _ in largest_first])

    def _read_back(self, blobs: Sequence[Blob]) -> None:
        """Remove objects with a wrong digest: the server altered them, or the file changed during the upload."""
        altered = [blob for blob, sha256, _ in self.digests(blobs) if sha256 != blob.sha256]
        if altered:
            self.delete(blob.key for blob in altered)
            raise PassingFault(
                f"{self._uri}: {len(altered)} of {len(blobs)} files differ when they are read back.",
                "Try again. If this repeats, check the files (slmops verify) and the server's disk.",
                code="s3-read-back-otherwise",
            )

    def fetch_blobs(self, files: Sequence[tuple[Blob, Path]], aside: Path, on_bytes: OnBytes = no_report) -> None:
        """See `ObjectStore.fetch_blobs`."""
        if not files:
            return
        aside.mkdir(parents=True, exist_ok=True)
        left = sorted(files, key=lambda file: -file[0].size_bytes)
        for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
            left = download(self._bucket, left, aside, on_bytes if attempt == 1 else no_report)
            if not left:
                return
        blob = left[0][0]
        raise StageFailed(
            f"{self._uri}: {blob.key} arrived altered {DOWNLOAD_ATTEMPTS} times.",
            "slmops verify shows whether the store's copy is damaged; if not, check the network.",
            code="content-altered",
        )

    def digests(self, blobs: Iterable[Blob], on_bytes: OnBytes = no_report) -> Iterator[tuple[Blob, str | None, int]]:
        """See `ObjectStore.digests`."""
        with s3_errors(self._uri), workers(TRANSFERS) as pool:
            yield from pool.map(lambda blob: (blob, *self._bucket.digest(blob.key, on_bytes)), list(blobs))

    # Small objects

    def put_bytes(self, key: str, data: bytes) -> None:
        """See `ObjectStore.put_bytes`."""
        with s3_errors(self._uri):
            self._bucket.put(key, data)
        self._check_stored(key, data)

    def _check_stored(self, key: str, data: bytes) -> None:
        # Other processes renew leases and move pointers too; only objects that are written once can be compared.
        if not WRITTEN_ONCE.match(key) or self.capabilities.verifies_sha256 or self._holds(key, data):
            return
        self.delete([key])
        raise PassingFault(
            f"{self.uri(key)} differs from what was stored when it is read back.",
            "Try again. If this repeats, check the server's disk.",
            code="s3-read-back-otherwise",
        )

    def put_bytes_if_absent(self, key: str, data: bytes) -> bool:
        """See `ObjectStore.put_bytes_if_absent`."""
        if not self.capabilities.conditional_writes:
            return self._put_bytes_alone(key, data)
        from botocore.exceptions import ClientError

        with s3_errors(self._uri):
            try:
                self._bucket.put(key, data, IfNoneMatch="*")
            except ClientError as error:
                if error_code(error) not in TAKEN:
                    raise
                return self._holds(key, data)  # it is ours if the answer to an earlier attempt was lost
        self._check_stored(key, data)
        return True

    def _put_bytes_alone(self, key: str, data: bytes) -> bool:
        """Store bytes under a free key on a server without conditional writes.

        Each writer first writes a claim on the key, and then lists the claims. The later one of two writers therefore
        sees the other's claim, or the object. A writer that is not alone withdraws its claim and tries again, so that
        at most one of them writes. A claim of a killed process keeps the key taken until it expires.
        """
        folder = f"{CLAIMS}/{key}"
        claim = f"{folder}/{name_prefix()}{uuid.uuid4().hex}"
        for attempt in range(CLAIM_ATTEMPTS):
            deadline = time.monotonic() + CLAIM_TERM.total_seconds() / 2
            try:
                self.put_bytes(claim, b"")
                alone = self._is_alone(folder, claim)
                taken = self._is_taken(key)  # in this order: a writer removes its claim only after it has written
                alone = alone and time.monotonic() < deadline  # after this delay the claim may have expired
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
            return self._bucket.size_bytes(key) is not None

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.read_bytes(key) == data
        except KeyError:
            return False

    def read_bytes(self, key: str) -> bytes:
        """See `ObjectStore.read_bytes`."""
        with _named(key), s3_errors(self._uri):
            return self._bucket.again(lambda: b"".join(self._bucket.chunks(key)))

    def entries(self, folder: str) -> Iterator[Entry]:
        """See `ObjectStore.entries`."""
        with s3_errors(self._uri):
            found, _ = self._bucket.listed(folder)
        yield from sorted(found, key=lambda entry: entry.key)

    def delete(self, keys: Iterable[str]) -> None:
        """See `ObjectStore.delete`."""
        wanted = [self._bucket.key(key) for key in keys]
        with s3_errors(self._uri):
            for start in range(0, len(wanted), DELETED_AT_ONCE):
                batch = wanted[start : start + DELETED_AT_ONCE]
                if len(batch) == 1:
                    self._bucket.client.delete_object(Bucket=self._bucket.name, Key=batch[0])
                    continue
                answer = self._bucket.client.delete_objects(
                    Bucket=self._bucket.name, Delete={"Objects": [{"Key": key} for key in batch], "Quiet": True}
                )
                failed = [error for error in answer.get("Errors", []) if error.get("Code") not in NOT_FOUND]
                if failed:
                    raise StageFailed(
                        f"{self._uri}: {len(failed)} objects could not be deleted ({failed[0].get('Code')}).",
                        "Check whether they are locked, and whether this user may delete them.",
                    )

    def leftovers(self, older_than: datetime) -> list[Entry]:
        """See `ObjectStore.leftovers`: parts of uploads that were never completed, claims and probes."""
        from botocore.exceptions import ClientError

        uploads = []
        with s3_errors(self._uri):
            pages = self._bucket.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket.name, Prefix=self._bucket.key("")
            )
            try:
                for page in pages:
                    for upload in page.get("Uploads", []):
                        key = f"{self._bucket.without_prefix(upload['Key'])}?{upload['UploadId']}"
                        uploads.append(Entry(key, 0, upload["Initiated"]))
            except ClientError as error:
                if error_code(error) not in NO_UPLOAD:  # rclone's answer if there is none
                    raise
        aside = (*uploads, *self.entries(CLAIMS), *self.entries(PROBES))
        return [entry for entry in aside if entry.modified_at < older_than or has_ended(holder_of(entry.key))]

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
                    self._bucket.client.abort_multipart_upload(
                        Bucket=self._bucket.name, Key=self._bucket.key(key), UploadId=upload_id
                    )
                except ClientError as error:
                    if error_code(error) not in NO_UPLOAD:
                        raise

    def uri(self, key: str) -> str:
        """See `ObjectStore.uri`."""
        return f"{self._uri}/{key}"


@contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except KeyError:
        raise KeyError(key) from None
