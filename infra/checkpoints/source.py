"""The source of a checkpoint: a local folder, an S3 folder, the store or a Hugging Face Hub repository."""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from slmops.infra.errors import BadInput

# A name in a Hub id, and a revision (branch, tag or commit), without characters that could change a URL or a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


class SourceKind(StrEnum):
    """The systems that checkpoints come from."""

    LOCAL = "local"
    S3 = "s3"
    HUB = "hub"
    STORE = "store"


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint as the user named it.

    `location` is an absolute path (local), `s3://BUCKET/PREFIX` without a closing slash (S3), `store://<64 hex>` (added
    to the store by `slmops ingest`) or `OWNER/NAME` (Hub); `revision` is a branch, tag or commit and belongs to the Hub
    only (None: its default branch).
    """

    kind: SourceKind
    location: str
    revision: str | None = None


def parse_checkpoint(text: str, revision: str | None = None) -> CheckpointSource:
    """Return the source of the checkpoint `text`; the forms are tried in this order.

    1. `s3://BUCKET/PREFIX` or `store://<64 hex>`; 2. the path of a folder or of a GGUF file: it exists, or it looks
    like one (starts with `.`, `/`, `~` or a drive letter, or has more than one separator); 3. `OWNER/NAME` or
    `OWNER/NAME@REVISION` on the Hub.

    Raises `BadInput` if it is none of these, if the folder does not exist or is another file, or if a revision is given
    twice or for a source without revisions.
    """
    if text.startswith("store://"):
        _refuse_revision(text, revision)
        return CheckpointSource(SourceKind.STORE, text)
    if "://" in text:
        return _s3_source(text, revision)
    path = _existing(text)
    if path is not None:
        return _local_source(text, path, revision)
    if _looks_like_a_path(text):
        raise BadInput(
            f"There is no such folder: {text}",
            "Give the folder that holds the checkpoint's config.json.",
            code="folder-missing",
        )
    return _hub_source(text, revision)


def check_hub_id(repo_id: str, revision: str | None) -> None:
    """Raise `BadInput` unless `repo_id` is `OWNER/NAME` and `revision` a plain branch, tag or commit."""
    if not _HUB_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
        raise BadInput(
            f"{repo_id!r} is not a Hub id.",
            "Write OWNER/NAME, as in the model's page address.",
            code="hub-id-not-valid",
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise BadInput(
            f"{revision!r} is not a revision.",
            "Give a branch, a tag or a commit of the Hub repository.",
            code="revision-not-valid",
        )


def split_s3_uri(uri: str) -> tuple[str, str]:
    """Split `s3://BUCKET/PREFIX` into bucket and prefix (no slash at either end); raises `BadInput`."""
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.rstrip("/")
    if scheme != "s3" or not _BUCKET.fullmatch(bucket) or not prefix or ".." in prefix.split("/"):
        raise BadInput(
            f"{uri!r} is not the address of a checkpoint.",
            "Write s3://BUCKET/FOLDER.",
            code="checkpoint-address-not-valid",
        )
    return bucket, prefix


def _existing(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, RuntimeError):  # too long for a path, or `~` of an unknown user
        return None


def _looks_like_a_path(text: str) -> bool:
    name = text.partition("@")[0]  # a revision may contain separators
    return name.startswith((".", "/", "~", "\\")) or bool(_DRIVE.match(name)) or len(re.findall(r"[\\/]", name)) > 1


def _s3_source(text: str, revision: str | None) -> CheckpointSource:
    bucket, prefix = split_s3_uri(text)
    _refuse_revision(text, revision)
    return CheckpointSource(SourceKind.S3, f"s3://{bucket}/{prefix}")


def _local_source(text: str, path: Path, revision: str | None) -> CheckpointSource:
    if not path.is_dir() and path.suffix.lower() != ".gguf":
        raise BadInput(
            f"{text} is a file, not a folder.",
            "Give the folder that holds the checkpoint's config.json, or a GGUF file.",
            code="checkpoint-is-file",
        )
    _refuse_revision(text, revision)
    return CheckpointSource(SourceKind.LOCAL, str(path.resolve()))


def _hub_source(text: str, revision: str | None) -> CheckpointSource:
    repo_id, at, written = text.partition("@")
    if not _HUB_ID.fullmatch(repo_id):
        raise BadInput(
            f"There is no such folder: {text!r}",
            "Give a folder with a checkpoint, s3://BUCKET/FOLDER, or OWNER/NAME of a model on the Hugging Face Hub.",
            code="folder-missing",
        )
    if at and revision not in (None, written):
        raise BadInput(f"Two revisions are given: {written!r} and {revision!r}.", "Give one.", code="revision-twice")
    chosen = written if at else revision
    check_hub_id(repo_id, chosen)
    return CheckpointSource(SourceKind.HUB, repo_id, chosen)


def _refuse_revision(text: str, revision: str | None) -> None:
    if revision is not None:
        raise BadInput(
            f"{text} has no revisions, found {revision!r}.",
            "Only models of the Hugging Face Hub have revisions.",
            code="revision-without-hub",
        )
