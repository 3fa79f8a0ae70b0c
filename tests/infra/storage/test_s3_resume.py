"""Unfinished uploads of a killed process are continued, on every S3 server."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.storage.objects import Blob
from slmops.infra.storage.s3.bucket import PART_BYTES
from slmops.infra.storage.s3.store import S3ObjectStore
from tests.support.s3_proxy import FaultProxy
from tests.support.s3_servers import S3Server
from tests.support.stores import StoreCase, empty_store

pytestmark = pytest.mark.runtime

SIZE = 3 * PART_BYTES + 1000  # four parts


@pytest.fixture(params=["rclone", "moto", "seaweedfs"])
def s3(request: pytest.FixtureRequest, tmp_path: Path) -> StoreCase:
    return empty_store(tmp_path, request.getfixturevalue(request.param))


@pytest.fixture
def proxy(s3: StoreCase) -> Iterator[FaultProxy]:
    assert s3.server
    with FaultProxy(s3.server) as proxy:
        yield proxy


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(hashlib.shake_128(b"weights").digest(SIZE))
    return path


def blob_of(path: Path) -> Blob:
    content = path.read_bytes()
    return Blob(hashlib.sha256(content).hexdigest(), len(content))


def leave_half_done(s3: StoreCase, blob: Blob, content: bytes, parts: Callable[[int], bool]) -> None:
    """Leave the state of a process that was killed during an upload: some parts are sent, nothing is completed."""
    server: S3Server | None = s3.server
    assert server
    bucket, _, prefix = s3.uri.removeprefix("s3://").partition("/")
    client = server.client()
    target: dict[str, Any] = {"Bucket": bucket, "Key": f"{prefix}/{blob.key}"}
    checksum = {"ChecksumAlgorithm": "SHA256"} if server.kind == "seaweedfs" else {}
    upload = client.create_multipart_upload(**target, **checksum)["UploadId"]
    for number in filter(parts, range(1, 5)):
        body = content[(number - 1) * PART_BYTES : number * PART_BYTES]
        client.upload_part(**target, UploadId=upload, PartNumber=number, Body=body, **checksum)


def put(s3: StoreCase, proxy: FaultProxy, blob: Blob, path: Path, home: Path) -> S3ObjectStore:
    store = S3ObjectStore(s3.uri, s3.settings(home, proxy.endpoint_url).store)
    told: list[int] = []
    store.put_blobs([(blob, path)], told.append)
    assert sum(told) == blob.size_bytes
    assert [sha256 for _, sha256, _ in store.digests([blob])] == [blob.sha256]
    return store


def test_only_what_is_missing_is_sent(s3: StoreCase, proxy: FaultProxy, file: Path, tmp_path: Path) -> None:
    blob = blob_of(file)
    leave_half_done(s3, blob, file.read_bytes(), lambda number: number <= 2)
    put(s3, proxy, blob, file, tmp_path)
    assert proxy.bytes_up < SIZE - 2 * PART_BYTES + 100_000
    assert not [
        request for request in proxy.requests if request.method == "POST" and request.target.endswith("?uploads")
    ]


def test_parts_of_another_content_are_not_taken(s3: StoreCase, proxy: FaultProxy, file: Path, tmp_path: Path) -> None:
    blob = blob_of(file)
    leave_half_done(s3, blob, bytes(SIZE), lambda number: number <= 2)
    put(s3, proxy, blob, file, tmp_path)
    assert proxy.bytes_up > SIZE


def test_an_upload_without_parts_starts_again(s3: StoreCase, proxy: FaultProxy, file: Path, tmp_path: Path) -> None:
    blob = blob_of(file)
    leave_half_done(s3, blob, b"", lambda number: False)
    put(s3, proxy, blob, file, tmp_path)
    assert proxy.bytes_up > SIZE
