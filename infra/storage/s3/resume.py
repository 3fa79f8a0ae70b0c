"""Continue a multipart upload of a killed process; boto3's transfer manager would start from the beginning."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.infra.storage.objects import OnBytes

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True)
class Parts:
    """How a file is divided: bytes per part, and (for servers that verify it) the SHA-256 of each part in base 64."""

    path: Path
    size_bytes: int
    part_bytes: int
    sha256: Sequence[str] | None

    @property
    def count(self) -> int:
        """Number of parts."""
        return -(-self.size_bytes // self.part_bytes)

    def read(self, number: int) -> bytes:
        """Return the bytes of a part; numbers start at 1."""
        with self.path.open("rb") as stream:
            stream.seek((number - 1) * self.part_bytes)
            return stream.read(self.part_bytes)

    def checksum(self, number: int) -> dict[str, str]:
        """Return the checksum of a part in boto3's form."""
        return {"ChecksumSHA256": self.sha256[number - 1]} if self.sha256 else {}


def resume_upload(client: "S3Client", bucket: str, key: str, parts: Parts, at_once: int, on_bytes: OnBytes) -> bool:
    """Complete the newest unfinished upload of a key if its parts are this file's; otherwise return False.

    An uploaded part counts only if its size and MD5 (its ETag) match the file's. Another process may continue the same
    upload. Both then send the same bytes, one completes the upload, and the other finds the object. Raises botocore's
    errors.
    """
    pending = client.list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads", [])
    own = sorted((upload for upload in pending if upload["Key"] == key), key=lambda upload: upload["Initiated"])
    if not own:
        return False
    upload = {"Bucket": bucket, "Key": key, "UploadId": own[-1]["UploadId"]}
    done = _parts_there(client, upload, parts)
    if not done:
        return False
    for number in done:
        on_bytes(len(parts.read(number)) if number == parts.count else parts.part_bytes)

    def send(number: int) -> None:
        body = parts.read(number)
        sent: Any = {**upload, "PartNumber": number, "Body": body, **parts.checksum(number)}
        done[number] = client.upload_part(**sent)["ETag"]
        on_bytes(len(body))

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(send, [number for number in range(1, parts.count + 1) if number not in done]))
    completed: Any = [{"PartNumber": number, "ETag": done[number], **parts.checksum(number)} for number in sorted(done)]
    finished: Any = {**upload, "MultipartUpload": {"Parts": completed}}
    client.complete_multipart_upload(**finished)
    return True


def _parts_there(client: "S3Client", upload: dict[str, str], parts: Parts) -> dict[int, str]:
    """Return number -> ETag of the uploaded parts; none if one of them is not this file's."""
    there: dict[int, str] = {}
    target: Any = upload
    for page in client.get_paginator("list_parts").paginate(**target):
        for part in page.get("Parts", []):
            number = part["PartNumber"]
            body = parts.read(number) if number <= parts.count else b""
            md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
            if part["Size"] != len(body) or part["ETag"].strip('"') != md5:
                return {}
            there[number] = part["ETag"]
    return there
