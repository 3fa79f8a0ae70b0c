"""Quantized checkpoints: each is turned into numbers once, which are its source, and keeps its packed weights."""

from pathlib import Path

from slmops.infra.checkpoints.dequantization import Dequantize
from slmops.infra.checkpoints.folder import read_json
from slmops.infra.checkpoints.quantized import quantization_of
from slmops.infra.process.call import OnProgress
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import made_once
from slmops.infra.storage.manifest import digest_of
from slmops.tasks.checkpoint.inspection import content_digest, inspect_checkpoint

VERSION = 1  # goes up when the same checkpoint leads to other numbers


def from_quantized(folder: Path, settings: Settings, on_progress: OnProgress | None = None) -> Path:
    """Return the folder of a quantized checkpoint in floating point; any other checkpoint as it is.

    Raises `BadInput` for one that cannot be built, before anything is written.
    """
    config = folder / "config.json"
    if not config.is_file() or quantization_of(read_json(config)) is None:
        return folder
    inspect_checkpoint(folder, chat_template_given=True)
    key = digest_of({"quantized": content_digest(folder), "version": VERSION})
    dequantized = settings.cache_dir / "checkpoints" / key
    with made_once(dequantized, settings, on_progress) as made:
        if made:
            run_in_child(
                Dequantize(checkpoint_dir=folder, output_dir=made),
                deadline_s=settings.timeout.merge_s,
                log_path=settings.cache_dir / "logs" / f"dequantize-{key[:12]}.log",
                work_dir=made.parent,
                on_progress=on_progress,
            )
    return dequantized
