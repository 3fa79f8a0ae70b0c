"""Small versions for tests of the store: files of a few bytes, as a build would have made them."""

from collections.abc import Mapping
from pathlib import Path

from slmops.infra.storage.manifest import Manifest, Source, StoredVariant
from slmops.infra.storage.registry import ModelRegistry

SOURCE = Source(digest="a" * 64, origin="/checkpoints/home", architecture="Qwen2ForCausalLM", parameters=494_000_000)
BUILDER = {"olive-ai": "0.13.0", "onnxruntime-genai": "0.18.0"}
FILES = {"model.onnx": b"graph", "model.onnx.data": b"weights" * 1000, "sub/tokenizer.json": b"{}"}


def store_version(
    registry: ModelRegistry, folder: Path, files: Mapping[str, bytes] = FILES, name: str = "home"
) -> Manifest:
    """Store files as the int4 variant of a version, with the evidence of a deploy that registered it."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    variant = StoredVariant(
        precision="int4",
        device="cpu",
        execution_provider="cpu",
        recipe="cpu-int4",
        recipe_digest="b" * 64,
        files=registry.add_files(folder),
    )
    manifest, _ = registry.commit(name, SOURCE, BUILDER, [variant])
    registry.add_evidence(manifest, "deploy", {"variants": [{"precision": "int4", "status": "registered"}]})
    registry.put_report(manifest, "report.md", f"# {manifest.reference}")
    registry.release_files()
    return manifest


def content_of(registry: ModelRegistry, manifest: Manifest, folder: Path) -> dict[str, bytes]:
    """Return the files of a version as they are read back from a store."""
    registry.materialize(manifest.variants[0].files, folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
