"""Quantized checkpoints: each is turned into numbers once, which are its source, and keeps its packed weights."""

from pathlib import Path

from slmops.infra.checkpoints.dequantization import Dequantize
from slmops.infra.checkpoints.folder import read_json
from slmops.infra.checkpoints.quantized import quantization_of
from slmops.infra.process.call import OnProgress
from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import digest_of
from slmops.tasks.checkpoint.conversion import converted_once
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
    return converted_once(
        key,
        lambda made: Dequantize(checkpoint_dir=folder, output_dir=made),
        settings,
        on_progress,
        log_name="dequantize",
    )
