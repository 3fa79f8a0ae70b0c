"""A folder of a bucket, and the requests that the store sends for it."""

import base64
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from slmops.infra.settings import StoreSettings
from slmops.infra.storage.objects import Entry, OnBytes
from slmops.infra.storage.s3.client import NOT_FOUND, cut_off, error_code, make_client, parse_s3_uri

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig
    from mypy_boto3_s3 import S3Client
    from s3transfer.manager import TransferManager

MIB = 1 << 20
# Large enough that requests cost little, small enough that all parts in transfer take little memory.
PART_BYTES = 16 * MIB
TRANSFERS = 8
MOST_PARTS = 10_000  # S3's limit
ATTEMPTS_AT_AN_ANSWER = 3

T = TypeVar("T")


class Bucket:
    """The objects under `s3://BUCKET/PREFIX`; raises `BadInput` for an address that is not valid.

    Keys are those of the store: the prefix goes before them. Its methods raise botocore's errors.
    """

    def __init__(self, uri: str, settings: StoreSettings) -> None:
        self.name, self._prefix = parse_s3_uri(uri)
        self.uri = f"s3://{self.name}/{self._prefix}".rstrip("/")
        self._settings = settings
        # Key in the bucket -> SHA-256 (base 64) of each uploaded part: boto3's transfer manager sends none.
        self.part_digests: dict[str, list[str]] = {}

    @cached_property
    def client(self) -> "S3Client":
        """The connection, made at its first use."""
        client = make_client(self._settings)

        def add_checksum(params: dict[str, Any], **_: object) -> Any:
            digests = self.part_digests.get(params["Key"])
            return {**params, "ChecksumSHA256": digests[params.get("PartNumber", 1) - 1]} if digests else params

        for operation in ("PutObject", "UploadPart"):
            client.meta.events.register(f"provide-client-params.s3.{operation}", add_checksum)
        return client

    def key(self, key: str) -> str:
        """Return the bucket's key of one of the store's."""
        return f"{self._prefix}/{key}" if self._prefix else key

    def without_prefix(self, key: str) -> str:
        """Return the store's key of one of the bucket's."""
        return key.removeprefix(f"{self._prefix}/") if self._prefix else key

    def put(self, key: str, data: bytes, **conditions: Any) -> None:
        """Store bytes, under the conditions of boto3's `put_object`."""
        conditions.setdefault("ChecksumSHA256", base64_sha256(data))
        self.client.put_object(Bucket=self.name, Key=self.key(key), Body=data, **conditions)

    def size_bytes(self, key: str) -> int | None:
        """Return an object's size, or None if there is no object."""
        from botocore.exceptions import ClientError

        try:
            return self.client.head_object(Bucket=self.name, Key=self.key(key))["ContentLength"]
        except ClientError as error:
            if error_code(error) in NOT_FOUND:
                return None
            raise

    def listed(self, folder: str, most_pages: int | None = None) -> tuple[list[Entry], bool]:
        """List a folder, or only its first pages; returns the entries, and whether the listing is complete."""

        def ask() -> tuple[list[Entry], bool]:
            found: list[Entry] = []
            is_all = False
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.name, Prefix=self.key(f"{folder}/")
            )
            for page in islice(pages, most_pages):
                found += [
                    Entry(self.without_prefix(item["Key"]), item["Size"], item["LastModified"])
                    for item in page.get("Contents", [])
                ]
                is_all = not page.get("IsTruncated")
            return found, is_all

        return self.again(ask)

    def digest(self, key: str, on_bytes: OnBytes) -> tuple[str | None, int]:
        """Read an object; returns its SHA-256 (hex; None if there is no object) and its size."""
        from botocore.exceptions import ClientError

        def digest() -> tuple[str, int]:
            found, size_bytes = hashlib.sha256(), 0
            try:
                for chunk in self.chunks(key):
                    found.update(chunk)
                    size_bytes += len(chunk)
                    on_bytes(len(chunk))
            except cut_off():
                on_bytes(-size_bytes)
                raise
            return found.hexdigest(), size_bytes

        try:
            return self.again(digest)
        except ClientError as error:
            if error_code(error) in NOT_FOUND:
                return None, 0
            raise

    def chunks(self, key: str) -> Iterator[bytes]:
        """Yield an object's bytes."""
        from botocore.exceptions import ReadTimeoutError, ResponseStreamingError

        body = self.client.get_object(Bucket=self.name, Key=self.key(key))["Body"]
        try:
            yield from body.iter_chunks(MIB)
        except ReadTimeoutError as error:  # within the body, where botocore does not retry
            raise ResponseStreamingError(error=error) from None

    def again(self, ask: Callable[[], T]) -> T:
        """Repeat a request whose response was cut off, which botocore does not do."""
        for _ in range(ATTEMPTS_AT_AN_ANSWER - 1):
            with suppress(*cut_off()):
                return ask()
        return ask()

    @contextmanager
    def transfers(self, largest_bytes: int) -> Iterator[tuple["TransferManager", "TransferConfig"]]:
        """Yield boto3's transfer manager, and how it divides files into parts; the largest file has this size."""
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        part_bytes = max(PART_BYTES, -(-largest_bytes // MOST_PARTS))
        config = TransferConfig(
            multipart_threshold=part_bytes,
            multipart_chunksize=part_bytes,
            max_concurrency=TRANSFERS,
            io_chunksize=MIB,
            # boto3 uses AWS's native client if it is installed and faster; that client supports only AWS's endpoint.
            preferred_transfer_client="classic" if self._settings.endpoint_url else "auto",
        )
        with create_transfer_manager(self.client, config) as manager:
            yield manager, config


def base64_sha256(data: bytes) -> str:
    """Return the SHA-256 in the form of S3's headers."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


@contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool; after an error, work that has not begun is dropped."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
