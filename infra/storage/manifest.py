"""A version's manifest, and the names, numbers and digests in it."""

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import FailFast, Field, StringConstraints, field_validator
from pydantic_core import from_json

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import open_regular
from slmops.infra.records import Record
from slmops.infra.storage.names import LONGEST_TRAINING_RUN, NAME_PATTERN, as_compared, fault_of_paths

MOST_KEYS = 200  # limit for one object in a foreign manifest

# Such a text becomes a part of a folder's name and of a model's id.
PlainName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class StoredFile(Record):
    """One file of a variant: its path inside the variant's folder, its content's SHA-256 and its size."""

    path: str
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0)]

    @field_validator("path")
    @classmethod
    def _is_inside_the_folder(cls, path: str) -> str:
        parts = path.split("/")
        if set(parts) & {"", ".", ".."} or "\\" in path or ":" in path or not path.isprintable():
            raise ValueError(f"{path!r} is not a path inside a variant")
        return path


class StoredVariant(Record):
    """One precision of a version: its recipe, its device and its files."""

    precision: PlainName
    device: PlainName
    execution_provider: str
    recipe: str
    recipe_digest: Sha256
    files: Annotated[tuple[StoredFile, ...], FailFast()]

    @field_validator("files")
    @classmethod
    def _are_different_files(cls, files: tuple[StoredFile, ...]) -> tuple[StoredFile, ...]:
        if len({file.path for file in files}) != len(files):
            raise ValueError("a file is named twice")
        # As Windows and macOS compare names: one file would replace the other there.
        paths = {as_compared(file.path) for file in files}
        if len(paths) != len(files):
            raise ValueError("the names of two files differ by case or by the form of an accent only")
        # By their parts: a file comes right before what lies in a folder of its name.
        for path, following in pairwise(sorted(path.split("/") for path in paths)):
            if following[: len(path)] == path:
                raise ValueError(f"{'/'.join(path)} is a file and a folder")
        return files

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 over the paths and digests of its files."""
        return digest_of([file.model_dump() for file in sorted(self.files, key=lambda file: file.path)])


class Source(Record):
    """The checkpoint that a version came from, and the training run that made it, if known."""

    digest: Sha256
    origin: str
    architecture: str
    parameters: Annotated[int, Field(ge=0)]
    training_run: Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_TRAINING_RUN)] | None = None


class Manifest(Record):
    """The content of a version. It never changes; figures, verdicts and proofs are stored separately as evidence."""

    schema_version: Literal[1] = 1
    name: Annotated[str, StringConstraints(pattern=rf"^{NAME_PATTERN}$")]
    version: Annotated[int, Field(ge=1)]
    source: Source
    builder: dict[str, str]
    variants: Annotated[tuple[StoredVariant, ...], FailFast()]
    created_at: str

    @field_validator("variants")
    @classmethod
    def _are_different_variants(cls, variants: tuple[StoredVariant, ...]) -> tuple[StoredVariant, ...]:
        if len({variant.precision for variant in variants}) != len(variants):
            raise ValueError("a precision is named twice")
        return variants

    @property
    def identity(self) -> str:
        """SHA-256 of what identifies a version: source, builder's versions, recipes and files, but no times."""
        return digest_of(
            {
                "source": self.source.digest,
                "builder": self.builder,
                "variants": [
                    variant.model_dump() for variant in sorted(self.variants, key=lambda variant: variant.precision)
                ],
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest as stored; evidence points to it."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def reference(self) -> str:
        """`NAME@VERSION`."""
        return f"{self.name}@{self.version}"

    @property
    def folder(self) -> str:
        """The store's prefix of everything stored under the version, except the contents of its files."""
        return f"models/{self.name}/{self.version}"

    @property
    def key(self) -> str:
        """The store's key of the manifest."""
        return f"{self.folder}/manifest.json"

    def to_bytes(self) -> bytes:
        """Return the manifest's stored form."""
        # Unknown fields are left out, so a field that is added later does not change the digests of older manifests.
        return (json.dumps(self.model_dump(exclude_none=True), indent=2, sort_keys=True) + "\n").encode()

    def variant(self, precision: str) -> StoredVariant:
        """Return the variant of a precision.

        Raises `BadInput` when the version has none.
        """
        for variant in self.variants:
            if variant.precision == precision:
                return variant
        known = ", ".join(variant.precision for variant in self.variants)
        raise BadInput(f"{self.reference} has no variant {precision!r}.", f"It has: {known}.", code="variant-missing")


def digest_of(value: object) -> str:
    """Return the SHA-256 (hex) of a JSON value in canonical form: sorted keys, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_paths(paths: Iterable[str]) -> None:
    """Raise `BadInput` for files that cannot be stored under these relative paths on every operating system."""
    if fault := fault_of_paths(paths):
        raise BadInput(f"A file cannot be stored: {fault}.", "Rename it, or leave it out.", code="file-name-not-valid")


def now() -> str:
    """Return the time in UTC, ISO 8601, to the microsecond, so that the records of one process sort by it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def parse_foreign_manifest(data: bytes) -> Manifest:
    """Return a manifest from a foreign origin; raises `ValueError` for one that is not valid.

    It is validated part by part, because pydantic collects all errors before it reports any, and a hostile manifest can
    contain millions.
    """
    value = from_json(data, allow_inf_nan=False)
    if _has_large_object(value):
        raise ValueError(f"an object in it has more than {MOST_KEYS} keys")
    variants = value.get("variants") if isinstance(value, dict) else None
    for variant in variants if isinstance(variants, list) else ():
        files = variant.get("files") if isinstance(variant, dict) else None
        paths = [StoredFile.model_validate(file).path for file in files] if isinstance(files, list) else []
        StoredVariant.model_validate(variant)
        if fault := fault_of_paths(paths):
            raise ValueError(fault)
    return Manifest.model_validate_json(data)


def _has_large_object(value: object) -> bool:
    if isinstance(value, dict):
        return len(value) > MOST_KEYS or any(map(_has_large_object, value.values()))
    return isinstance(value, list) and any(map(_has_large_object, value))
