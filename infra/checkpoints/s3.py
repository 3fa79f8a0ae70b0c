"""Fetch a checkpoint from a folder of an S3 bucket."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from infra.checkpoints.source import split_s3_uri
from infra.errors import BadInput, PassingFault, StageFailed
from infra.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
ATTEMPTS = 3
COMPLETE = ".complete.json"
_REFUSED = frozenset({"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"})


@dataclass(frozen=True)
class _Object:
    path: str  # below the prefix, with slashes
    key: str
    etag: str
    size_bytes: int


def fetch_from_s3(uri: str, settings: Settings, directory: Path) -> Path:
    """Download the folder `s3://BUCKET/PREFIX` and return the local folder, one below `directory`.

    Endpoint and keys come from the store's settings (path-style addresses with an endpoint of one's own), else from the
    usual AWS chain. The local folder is named after the digest of all (key, ETag, size): unchanged objects are not
    downloaded twice, and a download that broke off leaves no folder of that name.

    Raises `BadInput` for a missing bucket or folder, refused credentials or a key that would lead out of the folder;
    `PassingFault` if the server cannot be reached or breaks off; `StageFailed` for a file of another size than listed.
    """
    bucket, prefix = split_s3_uri(uri)
    with _clear_errors(uri):
        client = _client(settings)
        objects = _list_objects(client, bucket, prefix)
        if not objects:
            raise BadInput(f"There is nothing in {uri}/", "Give the folder that holds the checkpoint's config.json.")
        listing = json.dumps([bucket, *(asdict(each) for each in objects)], sort_keys=True)
        target = directory / hashlib.sha256(listing.encode()).hexdigest()[:32]
        if (target / COMPLETE).exists():
            return target / "checkpoint"
        aside = directory / f".{target.name}-{uuid.uuid4().hex}"
        try:
            for each in objects:
                _download(client, bucket, each, aside / "checkpoint")
            (aside / COMPLETE).write_text(listing, "utf-8")
            _publish(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target / "checkpoint"


def _client(settings: Settings) -> "S3Client":
    import boto3
    from botocore.config import Config

    store = settings.store
    secret = store.secret_access_key
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        s3={"addressing_style": "path" if store.endpoint_url else "auto"},
    )
    session = boto3.session.Session()
    return session.client(
        "s3",
        endpoint_url=store.endpoint_url,
        aws_access_key_id=store.access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        # A server of one's own has no regions, but requests are signed with one.
        region_name=session.region_name or ("us-east-1" if store.endpoint_url else None),
        config=config,
    )


def _list_objects(client: "S3Client", bucket: str, prefix: str) -> list[_Object]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    found = [each for page in pages for each in page.get("Contents", [])]
    objects = []
    for each in found:
        path = each["Key"].removeprefix(f"{prefix}/")
        if not path or path.endswith("/"):  # the marker that some tools write for a folder
            continue
        _check_path(path, each["Key"])
        objects.append(_Object(path, each["Key"], each["ETag"], each["Size"]))
    return sorted(objects, key=lambda each: each.path)


def _check_path(path: str, key: str) -> None:
    parts = path.split("/")
    unsafe = any(part in ("", ".", "..") for part in parts) or any(mark in path for mark in ("\\", ":", "\0"))
    if unsafe or PurePosixPath(path).is_absolute():
        raise BadInput(f"The object key {key!r} is not a path inside its folder.", "Rename or remove the object.")


def _download(client: "S3Client", bucket: str, each: _Object, folder: Path) -> None:
    path = folder / each.path
    path.parent.mkdir(parents=True, exist_ok=True)
    client.download_file(bucket, each.key, str(path))
    size_bytes = path.stat().st_size
    if size_bytes != each.size_bytes:
        raise StageFailed(
            f"{each.key} was listed with {each.size_bytes} bytes, but {size_bytes} bytes came.",
            "Fetch the checkpoint again; it may have been written to meanwhile.",
        )


def _publish(aside: Path, target: Path) -> None:
    try:
        aside.rename(target)
    except OSError:
        if not (target / COMPLETE).exists():  # else another process has published the same bytes
            raise


@contextmanager
def _clear_errors(uri: str) -> Iterator[None]:
    """Translate boto's errors; their texts are not passed on whole, because some quote the request."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    keys = "Set SLMOPS_STORE__ACCESS_KEY_ID and SLMOPS_STORE__SECRET_ACCESS_KEY, or log in with AWS's tools."
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError):
        raise BadInput(f"There are no credentials for {uri}.", keys) from None
    except ClientError as error:
        code = _code(error)
        if code == "NoSuchBucket":
            raise BadInput(f"{uri}: there is no such bucket.", "Correct the bucket's name or the endpoint.") from None
        if code in _REFUSED:
            raise BadInput(f"{uri}: the server refuses the credentials ({code}).", keys) from None
        raise PassingFault(f"{uri}: the server answered with {code}.", "Try again.") from None
    except (ConnectionError, HTTPClientError) as error:
        raise PassingFault(
            f"{uri}: the server cannot be reached ({type(error).__name__}).",
            "Check SLMOPS_STORE__ENDPOINT_URL and the network.",
        ) from None
    except (BotoCoreError, Boto3Error, ValueError) as error:
        raise BadInput(
            f"{uri} cannot be read with these settings ({type(error).__name__}).",
            "Check SLMOPS_STORE__ENDPOINT_URL, keys and AWS's configuration.",
        ) from None


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "an unknown error"))
