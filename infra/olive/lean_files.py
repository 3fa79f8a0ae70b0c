"""Keep Olive's engine from reading checkpoints and writing models only for its cache, which lasts for one build here.

Olive 0.13 names a model in its cache by the SHA-256 of all its bytes, and copies its result out of the cache.
tests/infra/olive/test_build_resources.py fails when this changes.
"""

import importlib
import os
from pathlib import Path
from typing import Any


def spare_reads_and_writes() -> None:
    """Patch Olive in this process: files are identified by path, size and time, and results are hard links."""
    model_config: Any = importlib.import_module("olive.model.config.model_config")
    resource_path: Any = importlib.import_module("olive.resource_path")
    utils: Any = importlib.import_module("olive.common.utils")

    def hash_of_status(path: str | os.PathLike[str], **_: object) -> str:
        status = Path(path).stat()
        digest: str = utils.hash_string(f"{path} {status.st_size} {status.st_mtime_ns}")
        return digest

    def link_files(source: str, target: str, **_: object) -> None:
        utils.hardlink_copy_dir(source, target)  # this copies if links cannot be made

    model_config.hash_file = hash_of_status
    resource_path.copy_dir = link_files
