"""Checkpoints and files that were put into the store, so that any worker can read them: `store://<64 hex>`.

An input is content-addressed like a version's files: `inputs/<64 hex>.json` names its blobs, and its address is the
digest of their names and contents.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.foreign_files import check_files
from slmops.infra.process.call import OnProgress
from slmops.infra.process.slots import only_maker
from slmops.infra.records import Record
from slmops.infra.storage.folders import place
from slmops.infra.storage.leftovers import made_aside
from slmops.infra.storage.manifest import Sha256, StoredFile, digest_of
from slmops.infra.storage.registry import ModelRegistry

SCHEME = "store://"
FOLDER = "inputs"


class StoredInput(Record):
    """A folder (a checkpoint) or a single file (an evaluation file) in the store; `name` is its original name."""

    kind: Literal["folder", "file"]
    name: str
    files: tuple[StoredFile, ...]

    @property
    def digest(self) -> Sha256:
        """SHA-256 over the paths and digests of its files."""
        files = [file.model_dump() for file in sorted(self.files, key=lambda file: file.path)]
        return digest_of({"kind": self.kind, "files": files})

    @property
    def address(self) -> str:
        """`store://<64 hex>`."""
        return f"{SCHEME}{self.digest}"

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        return sum(file.size_bytes for file in self.files)


def is_input_address(text: str) -> bool:
    """Whether a text has the form of an input's address."""
    return text.startswith(SCHEME)


def ingest(registry: ModelRegistry, path: Path, on_progress: OnProgress | None = None) -> StoredInput:
    """Put a folder or a file into the store; the same content is the same input.

    Raises `BadInput` for a path that is neither, and for a folder without files or with a symbolic link out of it.
    """
    if path.is_file():
        files = registry.add_paths({path.name: path}, on_progress)
        found = StoredInput(kind="file", name=path.name, files=files)
    elif path.is_dir():
        root = path.resolve()
        paths = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
        check_files(sorted(path.rglob("*")))
        outside = next((name for name, file in paths.items() if not file.resolve().is_relative_to(root)), None)
        if outside or not paths:
            fault = f"has a link to a file outside of it: {outside}" if outside else "has no file"
            raise BadInput(f"{path} {fault}.", "Give a folder with the checkpoint's own files.", code="input-not-valid")
        found = StoredInput(kind="folder", name=path.resolve().name, files=registry.add_paths(paths, on_progress))
    else:
        raise BadInput(
            f"There is no file or folder {path}.",
            "Give a checkpoint's folder or an evaluation file.",
            code="input-missing",
        )
    registry.objects.put_bytes(_key(found.digest), (found.model_dump_json(indent=2) + "\n").encode())
    registry.release_files()
    return found


def read_input(registry: ModelRegistry, address: str) -> StoredInput:
    """Return the input at an address; raises `BadInput` for one that is malformed or not there."""
    digest = address.removeprefix(SCHEME)
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise BadInput(
            f"{address!r} is not the address of an input.",
            "Use the address that slmops ingest printed.",
            code="input-address-not-valid",
        )
    try:
        return _parse(registry, digest)
    except KeyError:
        raise BadInput(
            f"The store has no input {address}.",
            "Add it with slmops ingest, or name the store that has it.",
            code="input-missing",
        ) from None


def stored_inputs(registry: ModelRegistry) -> Iterator[StoredInput]:
    """Yield all inputs of a store."""
    for entry in list(registry.objects.entries(FOLDER)):
        yield _parse(registry, entry.key.removeprefix(f"{FOLDER}/").removesuffix(".json"))


def fetch_input(registry: ModelRegistry, address: str, directory: Path, on_progress: OnProgress | None = None) -> Path:
    """Return the local folder or file of an input, below `directory`. Existing content is not fetched again."""
    found = read_input(registry, address)
    target = directory / found.digest
    with only_maker(target, on_progress):
        if not target.is_dir():
            with made_aside(target) as aside:
                registry.materialize(found.files, aside, on_progress)
                place(aside, target)
    return target / found.files[0].path if found.kind == "file" else target


def delete_input(registry: ModelRegistry, address: str) -> StoredInput:
    """Remove an input; the next garbage collection removes its blobs."""
    found = read_input(registry, address)
    registry.objects.delete([_key(found.digest)])
    return found


def _parse(registry: ModelRegistry, digest: str) -> StoredInput:
    try:
        found = StoredInput.model_validate_json(registry.objects.read_bytes(_key(digest)))
        fault = "" if found.digest == digest else "it names other files"
    except ValidationError as error:
        fault = error.errors()[0]["msg"]
    if fault:
        raise StageFailed(
            f"The input {SCHEME}{digest} is not valid: {fault}.",
            f"It was altered after it was stored: remove {registry.objects.uri(_key(digest))} and ingest it again.",
            code="input-damaged",
        )
    return found


def _key(digest: str) -> str:
    return f"{FOLDER}/{digest}.json"
