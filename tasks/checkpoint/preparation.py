"""Preparation: a checkpoint from any source is fetched, merged, and gets its chat template."""

import contextlib
from pathlib import Path

from slmops.infra.checkpoints.folder import read_json, read_tensor_headers
from slmops.infra.checkpoints.hub import fetch_from_hub
from slmops.infra.checkpoints.s3 import FETCHED, fetch_from_s3
from slmops.infra.checkpoints.source import SourceKind, parse_checkpoint
from slmops.infra.checkpoints.text_part import take_text_part, text_config_of
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.files import write_whole
from slmops.infra.process.call import OnProgress
from slmops.infra.records import Record
from slmops.infra.settings import Settings
from slmops.infra.storage.file_uris import path_of
from slmops.infra.storage.folders import made_once
from slmops.infra.storage.inputs import fetch_input, ingest, is_input_address
from slmops.infra.storage.manifest import Manifest, digest_of
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.transformers.calls import MergeAdapter
from slmops.tasks.checkpoint.adapter_base import base_of, usable_base
from slmops.tasks.checkpoint.conversion import converted_once
from slmops.tasks.checkpoint.from_gguf import from_gguf
from slmops.tasks.checkpoint.from_quantized import from_quantized
from slmops.tasks.checkpoint.inspection import (
    Inspection,
    content_digest,
    digest_with_rows,
    inspect_checkpoint,
)
from slmops.tasks.checkpoint.rewriting import with_chat_template, with_own_lm_head, without_marks
from slmops.tasks.request.deploy_request import DeployRequest, read_chat_template_file
from slmops.tasks.request.inputs import inputs_dir
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage


class PreparedCheckpoint(Record):
    """A checkpoint that is ready for a build: its folder, its inspection, and the digest of its content."""

    uri: str
    origin: str
    digest: str
    inspection: Inspection

    @property
    def folder(self) -> Path:
        """The checkpoint's folder on this machine."""
        return folder_of(self.uri)


def folder_of(uri: str) -> Path:
    """Return the local folder that a `file://` URI names."""
    folder = path_of(uri)
    assert folder, uri
    return folder


@stage("prepare checkpoint", run_name="prepare-{request.name}")
def prepare_checkpoint(request: DeployRequest, settings: Settings) -> PreparedCheckpoint:
    """Fetch a remote checkpoint, merge an adapter, add the chat template, and compute the digest.

    Raises `BadInput` for a checkpoint that cannot be deployed.
    """
    with stage_progress("inspect") as on_progress:
        template = read_chat_template_file(Path(request.chat_template_file)) if request.chat_template_file else None
        folder = fetch_checkpoint(request.checkpoint, request.revision, settings, on_progress)
        inspection = inspect_checkpoint(folder, chat_template_given=template is not None)
        if inspection.kind == "adapter":
            folder = merge_into_base(folder, request.base, settings, on_progress)
            inspection = inspect_checkpoint(folder, chat_template_given=template is not None)
        folder = as_loaded(folder, inspection, settings)
        if template is not None:
            folder = with_chat_template(folder, template, settings)
        on_progress(0.5, 1, "reading the weights for their digest")
        digest = content_digest(folder)
        if not Path(request.checkpoint).is_absolute() and inspection.kind == "checkpoint":
            write_whole(_place_of(digest, settings), str(folder.absolute()))
    return PreparedCheckpoint(
        uri=folder.absolute().as_uri(), origin=request.checkpoint, digest=digest, inspection=inspection
    )


def _place_of(digest: str, settings: Settings) -> Path:
    """Return the file with the absolute path of a checkpoint that a deploy named by a relative one.

    It stays on this machine: a manifest, which others may read, has the path as it was given.
    """
    return settings.cache_dir / "places" / digest


@stage("share checkpoint", run_name="share-checkpoint")
def put_into_store(prepared: PreparedCheckpoint, registry: ModelRegistry) -> str:
    """Put a prepared checkpoint into the store, where every worker can read it, and return its address."""
    with stage_progress("share") as on_progress:
        return ingest(registry, prepared.folder, on_progress).address


@stage("fetch checkpoint", run_name="fetch-checkpoint")
def fetched_from_store(address: str, digest: str, settings: Settings) -> PreparedCheckpoint:
    """Return a checkpoint that another machine prepared and shared; its content must have the digest.

    Raises `StageFailed` if it has another one.
    """
    with stage_progress("fetch") as on_progress:
        folder = fetch_input(open_registry(settings), address, inputs_dir(settings), on_progress)
        found = content_digest(folder)
    if found != digest:
        raise StageFailed(
            f"{address} has the digest {found}, not {digest}.",
            "Deploy its checkpoint again.",
            code="checkpoint-changed",
        )
    inspection = inspect_checkpoint(folder, chat_template_given=True)
    return PreparedCheckpoint(uri=folder.absolute().as_uri(), origin=address, digest=digest, inspection=inspection)


def prepare_source(manifest: Manifest, settings: Settings) -> PreparedCheckpoint:
    """Return the checkpoint that a version was built from, from any place that this machine can read.

    Raises `BadInput` if it is missing or was changed.
    """
    if is_input_address(manifest.source.origin):
        with contextlib.suppress(BadInput):  # it was removed from the store; this machine may still have it
            fetch_input(open_registry(settings), manifest.source.origin, inputs_dir(settings))
    origin = Path(manifest.source.origin).expanduser()
    with contextlib.suppress(BadInput):  # the file has changed, or files of its conversion are missing
        origin = from_quantized(from_gguf(origin, settings), settings)
    folders = [settings.cache_dir / "checkpoints", inputs_dir(settings)]
    prepared = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    prepared += (settings.cache_dir / "s3").glob(f"*/{FETCHED}")
    with contextlib.suppress(FileNotFoundError):  # it was named by an absolute path, or deployed elsewhere
        prepared.append(Path(_place_of(manifest.source.digest, settings).read_text("utf-8")))
    for folder in (origin, *prepared):
        if folder.is_dir() and content_digest(folder) == manifest.source.digest:
            inspection = inspect_checkpoint(folder, chat_template_given=True)
            uri = folder.absolute().as_uri()
            return PreparedCheckpoint(
                uri=uri, origin=manifest.source.origin, digest=manifest.source.digest, inspection=inspection
            )
    raise BadInput(
        f"The checkpoint of {manifest.reference} ({manifest.source.origin}) is missing or was changed.",
        "Deploy the checkpoint again; or, where its last verdict is enough, judge it on the rows of that (without "
        f"--eval), or trust its origin: slmops promote {manifest.reference}.",
        code="checkpoint-gone",
    )


def fetch_checkpoint(text: str, revision: str | None, settings: Settings, on_progress: OnProgress) -> Path:
    """Return the local folder of a checkpoint; fetched, converted from GGUF, or turned into numbers."""
    folder = without_marks(_fetched(text, revision, settings, on_progress), settings)
    folder = from_gguf(folder, settings, on_progress)
    return from_quantized(folder, settings, on_progress)


def _fetched(text: str, revision: str | None, settings: Settings, on_progress: OnProgress) -> Path:
    source = parse_checkpoint(text, revision)
    if source.kind is SourceKind.HUB:
        return fetch_from_hub(source.location, source.revision, settings, on_progress=on_progress)
    if source.kind is SourceKind.S3:
        on_progress(0, 1, f"fetching {source.location}")
        return fetch_from_s3(source.location, settings, settings.cache_dir / "s3", on_progress)
    if source.kind is SourceKind.STORE:
        on_progress(0, 1, f"fetching {source.location}")
        return fetch_input(open_registry(settings), source.location, inputs_dir(settings), on_progress)
    return Path(source.location)


def merge_into_base(adapter: Path, base: str | None, settings: Settings, on_progress: OnProgress) -> Path:
    """Return the folder of an adapter merged into its base; equal contents are merged only once."""
    declared = base_of(adapter, base)
    with usable_base(declared):
        base_folder = fetch_checkpoint(declared, None, settings, on_progress)
        if inspect_checkpoint(base_folder, chat_template_given=True).kind != "checkpoint":
            raise BadInput("It is not a whole checkpoint.", code="adapter-base-not-whole")
    key = digest_of({"adapter": digest_with_rows(adapter), "base": content_digest(base_folder)})
    return converted_once(
        key,
        lambda folder: MergeAdapter(adapter_dir=adapter, base_dir=base_folder, output_dir=folder),
        settings,
        on_progress,
        log_name="merge",
    )


def as_loaded(folder: Path, inspection: Inspection, settings: Settings) -> Path:
    """Return the model that transformers loads of a checkpoint: its text part, and its own lm_head where it has one."""
    if inspection.multimodal:
        folder = with_text_part(folder, settings)
    return with_own_lm_head(folder, settings) if inspection.own_lm_head else folder


def with_text_part(folder: Path, settings: Settings) -> Path:
    """Return a folder with the text part of a multi-modal checkpoint, as a checkpoint of its own."""
    config = text_config_of(read_json(folder / "config.json"), read_tensor_headers(folder))
    key = digest_of({"checkpoint": digest_with_rows(folder), "text part": config})
    target = settings.cache_dir / "checkpoints" / key
    with made_once(target, settings) as made:
        if made:
            take_text_part(folder, made, config)
    return target
