"""Small versions for tests of the store: files of a few bytes, as a build would have made them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.manifest import Manifest, Source, StoredVariant
from slmops.infra.storage.registry import ModelRegistry

SOURCE = Source(digest="a" * 64, origin="/checkpoints/home", architecture="Qwen2ForCausalLM", parameters=494_000_000)
BUILDER = {"olive-ai": "0.13.0", "onnxruntime-genai": "0.18.0"}
FILES = {"model.onnx": b"graph", "model.onnx.data": b"weights" * 1000, "sub/tokenizer.json": b"{}"}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def stored_variant(registry: ModelRegistry, folder: Path, precision: str = "int4") -> StoredVariant:
    """Store a folder's files as a variant of a version that is to be committed."""
    return StoredVariant(
        precision=precision,
        device="cpu",
        execution_provider="cpu",
        recipe=f"cpu-{precision}",
        recipe_digest="b" * 64,
        files=registry.add_files(folder),
    )


def store_version(
    registry: ModelRegistry, folder: Path, files: Mapping[str, bytes] = FILES, name: str = "home"
) -> Manifest:
    """Store files as the int4 variant of a version, with the evidence of a deploy that registered it."""
    write_files(folder, files)
    manifest, _ = registry.commit(name, SOURCE, BUILDER, [stored_variant(registry, folder)])
    add_evidence(registry, manifest, "deploy", {"variants": [{"precision": "int4", "status": "registered"}]})
    registry.of(manifest).put_report("report.md", f"# {manifest.reference}")
    registry.release_files()
    return manifest


def content_of(registry: ModelRegistry, manifest: Manifest, folder: Path) -> dict[str, bytes]:
    """Return the files of a version as they are read back from a store."""
    registry.materialize(manifest.variants[0].files, folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add_evidence(
    registry: ModelRegistry, manifest: Manifest, kind: str, content: Mapping[str, Any], key: str | None = None
) -> None:
    """Append a record of whatever content, as an earlier version of slmops or a forger may have."""
    registry.of(manifest).record(Kind(kind, dict[str, Any]), dict(content), key)


def evidence(registry: ModelRegistry, manifest: Manifest, kind: str, key: str | None = None) -> list[dict[str, Any]]:
    """Return what is on record of a kind, oldest first, each with its time."""
    records = registry.of(manifest).records(Kind(kind, dict[str, Any]), key)
    return [{**record.value, "recorded_at": record.at} for record in records]


def latest_evidence(
    registry: ModelRegistry, manifest: Manifest, kind: str, key: str | None = None
) -> dict[str, Any] | None:
    """Return the newest record of a kind, None where there is none."""
    return next(reversed(evidence(registry, manifest, kind, key)), None)
