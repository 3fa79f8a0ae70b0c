"""GGUF files as checkpoints: each is converted once per content and version of the converter."""

from pathlib import Path

from slmops.infra.gguf.calls import ConvertGguf
from slmops.infra.gguf.conversion import CONVERTER_VERSION
from slmops.infra.gguf.file import gguf_of
from slmops.infra.process.call import OnProgress
from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import digest_of, digest_of_file
from slmops.tasks.checkpoint.conversion import converted_once
from slmops.tasks.checkpoint.inspection import EVALUATION_FILE, OUTPUT_SCHEMA_FILE, inspect_checkpoint

BESIDE = (EVALUATION_FILE, OUTPUT_SCHEMA_FILE)  # files for the deploy in a folder with a GGUF file


def from_gguf(path: Path, settings: Settings, on_progress: OnProgress | None = None) -> Path:
    """Return the folder of a converted GGUF file, or the path of any other checkpoint.

    Raises `BadInput` for a file that cannot be converted, before anything is written.
    """
    file = gguf_of(path)
    if file is None:
        return path
    inspect_checkpoint(file, chat_template_given=True)
    if on_progress:
        on_progress(0, 1, "reading the GGUF file for its digest")
    beside = [path / name for name in BESIDE if (path / name).is_file()]
    content = {"gguf": digest_of_file(file), **{each.name: digest_of_file(each) for each in beside}}
    key = digest_of({**content, "converter": CONVERTER_VERSION})
    return converted_once(
        key,
        lambda folder: ConvertGguf(file=file, output_dir=folder),
        settings,
        on_progress,
        log_name="gguf",
        beside=beside,
    )
