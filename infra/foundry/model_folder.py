"""A variant's folder in Foundry Local's model cache."""

import contextlib
import filecmp
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from slmops.infra.errors import StageFailed
from slmops.infra.storage.folders import link_or_copy
from slmops.infra.storage.holders import move_to, name_prefix
from slmops.infra.storage.leftovers import leftovers_in, remove
from slmops.infra.storage.names import NOT_ON_WINDOWS

GENAI_CONFIG = "genai_config.json"
INFERENCE_MODEL = "inference_model.json"
MODEL_CARD = "README.md"

# Foundry Local treats a folder of its cache as a model once it contains genai_config.json. The file has this name until
# all others are in place.
_UNPUBLISHED_CONFIG = "genai_config.json.part"
_STAGING = ".slmops-staging"


def model_folder(foundry_dir: Path, name: str, precision: str, version: int) -> Path:
    """Return where Foundry's cache `foundry_dir` keeps a variant: `models/custom/NAME-PRECISION/vVERSION`."""
    return foundry_dir / "models" / "custom" / f"{name}-{precision}" / f"v{version}"


def registered_ids(foundry_dir: Path) -> list[str]:
    """Return the Foundry ids of the variants in the cache that slmops put there, as their folders name them."""
    found = []
    for path in sorted((foundry_dir / "models" / "custom").glob(f"*/v*/{INFERENCE_MODEL}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a folder that another command changes
            found.append(str(json.loads(path.read_bytes())["Name"]))
    return found


def write_model_folder(
    foundry_dir: Path,
    name: str,
    precision: str,
    version: int,
    *,
    sources: Mapping[str, Path],
    inference_model: Mapping[str, object],
    model_card: str,
) -> Path:
    """Write a variant's folder and return it: `sources` (relative name to file), `inference_model.json`, `README.md`.

    Files are hard links where the file system allows it, else copies, never symbolic links: Foundry's scanner skips
    those. `inference_model` and `model_card` replace sources with the names of the last two. In a folder with the same
    content only the model card is rewritten; a folder with other content is replaced. Foundry sees a folder only when
    it is complete.

    Raises `StageFailed` when a source is missing, has a name that is not a plain relative path, or the folder is in
    use.
    """
    derived = (INFERENCE_MODEL, MODEL_CARD)
    files = {_checked(file): source for file, source in sources.items() if file not in derived}
    if GENAI_CONFIG not in files:
        raise StageFailed(
            f"A model without {GENAI_CONFIG} cannot be registered.",
            "Build the variant again.",
            code="genai-config-missing",
        )
    description = (json.dumps(dict(inference_model), ensure_ascii=False, indent=2) + "\n").encode()
    folder = model_folder(foundry_dir, name, precision, version)
    staging = foundry_dir / _STAGING
    remove(leftovers_in(staging))  # of registrations that were killed
    staged = staging / f"{name_prefix()}{uuid.uuid4().hex}"
    try:
        staged.mkdir(parents=True)
        (staged / MODEL_CARD).write_bytes(model_card.encode())
        if _holds(folder, files, description):
            if not (folder / MODEL_CARD).is_file() or (folder / MODEL_CARD).read_bytes() != model_card.encode():
                move_to(staged / MODEL_CARD, folder / MODEL_CARD)
            return folder
        for file, source in files.items():
            target = staged / (_UNPUBLISHED_CONFIG if file == GENAI_CONFIG else file)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(source, target, symbolic=False)
        (staged / INFERENCE_MODEL).write_bytes(description)
        _remove(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        move_to(staged, folder)
        move_to(folder / _UNPUBLISHED_CONFIG, folder / GENAI_CONFIG)
    except OSError as error:
        raise StageFailed(
            f"The model folder {folder} cannot be written: {error}.",
            "Close programs that have the model loaded, and check the disk's space and permissions.",
            code="model-folder-not-written",
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        _remove_empty(staging)
    return folder


def remove_model_folder(foundry_dir: Path, name: str, precision: str, version: int) -> bool:
    """Remove a variant's folder and, if it was the last version, its parent; return whether there was one.

    Raises `StageFailed` when the folder is in use.
    """
    folder = model_folder(foundry_dir, name, precision, version)
    if not folder.exists():
        return False
    try:
        _remove(folder)
    except OSError as error:
        raise StageFailed(
            f"The model folder {folder} cannot be removed: {error}.", "Close programs that have the model loaded."
        ) from error
    _remove_empty(folder.parent)
    return True


def _checked(file: str) -> str:
    path = PurePosixPath(file)
    if not path.parts or path.is_absolute() or ".." in path.parts or set(file) & NOT_ON_WINDOWS:
        raise StageFailed(
            f"{file!r} cannot be a file of a model folder.",
            "Use plain relative names.",
            code="model-file-name-not-valid",
        )
    return file


def _holds(folder: Path, files: Mapping[str, Path], description: bytes) -> bool:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {MODEL_CARD}
    if found != {*files, INFERENCE_MODEL} or (folder / INFERENCE_MODEL).read_bytes() != description:
        return False
    return all(_same(folder / file, source) for file, source in files.items())


def _same(path: Path, source: Path) -> bool:
    if path.is_symlink() or not source.is_file():
        return False
    return path.samefile(source) or filecmp.cmp(path, source, shallow=False)


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
        return
    if not folder.exists():
        return
    with contextlib.suppress(FileNotFoundError):
        (folder / GENAI_CONFIG).unlink()  # first, so that Foundry does not see a partly deleted folder
    shutil.rmtree(folder)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not empty, or another process removed it
        folder.rmdir()
