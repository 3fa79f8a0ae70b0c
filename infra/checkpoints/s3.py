"""Fetch a checkpoint from a folder of an S3 bucket, or a single file."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from slmops.infra.checkpoints.source import split_s3_uri
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.process.call import OnProgress
from slmops.infra.process.slots import only_maker
from slmops.infra.settings import Settings
from slmops.infra.storage.leftovers import made_aside
from slmops.infra.storage.objects import OnBytes
from slmops.infra.storage.progress import byte_progress
from slmops.infra.storage.s3.client import make_client, s3_errors

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

COMPLETE = ".complete.json"
FETCHED = "checkpoint"


@dataclass(frozen=True)
class _Object:
    path: str  # below the prefix, with slashes
    key: str
    etag: str
    size_bytes: int


def fetch_from_s3(uri: str, settings: Settings, directory: Path, on_progress: OnProgress | None = None) -> Path:
    """Download the folder `s3://BUCKET/PREFIX` and return the local folder, one below `directory`.

    Endpoint and keys come from the store's settings (path-style addresses with a custom endpoint), else from the usual
    AWS chain. The local folder is named after the digest of all (key, ETag, size): unchanged objects are not downloaded
    twice, and an interrupted download leaves no folder of that name.

    Raises `BadInput` for a missing bucket or folder, refused credentials or a key that leads out of the folder;
    `PassingFault` if the server cannot be reached or the connection breaks; `StageFailed` for a file whose size differs
    from the listing.
    """
    bucket, prefix = split_s3_uri(uri)
    return _fetch(uri, bucket, f"{prefix}/", settings, directory, on_progress) / FETCHED


def fetch_file_from_s3(uri: str, settings: Settings, directory: Path) -> Path:
    """Download the object `s3://BUCKET/KEY` to a file below `directory`, and return that; raises as `fetch_from_s3`."""
    bucket, key = split_s3_uri(uri)
    folder, _, name = key.rpartition("/")
    return _fetch(uri, bucket, f"{folder}/" if folder else "", settings, directory, only=name) / FETCHED / name


def _fetch(
    uri: str,
    bucket: str,
    folder: str,
    settings: Settings,
    directory: Path,
    on_progress: OnProgress | None = None,
    *,
    only: str | None = None,
) -> Path:
    try:
        with s3_errors(uri):
            client = make_client(settings.store)
            objects = _list_objects(client, bucket, folder, only)
            if not objects:
                raise BadInput(
                    f"There is nothing in {uri}/" if only is None else f"There is no {uri}",
                    "Give the folder that holds the checkpoint's config.json, or a file's whole address.",
                    code="s3-nothing-there",
                )
            listing = json.dumps([bucket, *(asdict(each) for each in objects)], sort_keys=True)
            target = directory / hashlib.sha256(listing.encode()).hexdigest()[:32]
            with only_maker(target, on_progress):
                if (target / COMPLETE).exists():
                    return target
                with made_aside(target) as aside:
                    on_bytes = byte_progress(on_progress, objects, "fetching")
                    for each in objects:
                        _download(client, bucket, each, aside / FETCHED, on_bytes)
                    (aside / COMPLETE).write_text(listing, "utf-8", newline="\n")
                    aside.rename(target)
    except KeyError:
        raise StageFailed(
            f"{uri} changed during the download.", "Fetch it again.", code="s3-changed-meanwhile"
        ) from None
    return target


def _list_objects(client: "S3Client", bucket: str, folder: str, only: str | None) -> list[_Object]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{folder}{only or ''}")
    found = [each for page in pages for each in page.get("Contents", [])]
    objects = []
    for each in found:
        path = each["Key"].removeprefix(folder)
        if only is not None and path != only:
            continue
        if not path or path.endswith("/"):  # a marker that some tools write for a folder
            continue
        _check_path(path, each["Key"])
        objects.append(_Object(path, each["Key"], each["ETag"], each["Size"]))
    return sorted(objects, key=lambda each: each.path)


def _check_path(path: str, key: str) -> None:
    parts = path.split("/")
    unsafe = any(part in ("", ".", "..") for part in parts) or any(mark in path for mark in ("\\", ":", "\0"))
    if unsafe or PurePosixPath(path).is_absolute():
        raise BadInput(
            f"The object key {key!r} is not a path inside its folder.",
            "Rename or remove the object.",
            code="s3-key-not-valid",
        )


def _download(client: "S3Client", bucket: str, each: _Object, folder: Path, on_bytes: OnBytes) -> None:
    path = folder / each.path
    path.parent.mkdir(parents=True, exist_ok=True)
    client.download_file(bucket, each.key, str(path), Callback=on_bytes)
    size_bytes = path.stat().st_size
    if size_bytes != each.size_bytes:
        raise StageFailed(
            f"{each.key} was listed with {each.size_bytes} bytes, but {size_bytes} bytes arrived.",
            "Fetch the checkpoint again; it may have been changed meanwhile.",
            code="s3-truncated",
        )
