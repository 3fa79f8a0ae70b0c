"""Evidence: records on a version that are appended and never changed, each of a kind.

A kind is a name on disk and the type of its records. The kinds that the store itself reads are declared here; the
others are declared with the records of their stages, and `slmops.tasks.evidence` lists all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from slmops.infra.errors import StageFailed
from slmops.infra.records import later_field

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class DamagedEvidence(StageFailed):
    """A record of evidence is not valid for its kind."""

    code = "evidence-damaged"


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of evidence: its name on disk, and the type of its records, which is one that pydantic validates.

    On disk, a record is a JSON object, or the `field` of an object that also holds the question that it answers.
    """

    name: str
    record: type[T]
    field: str | None = None

    @cached_property
    def _adapter(self) -> TypeAdapter[T]:
        return TypeAdapter(self.record)

    def to_content(self, value: T, beside: Mapping[str, object] | None = None) -> dict[str, object]:
        """Return the JSON object that stores a record, with the fields `beside` it."""
        # JSON values stay unchanged, so a figure that is NaN is refused when it is written.
        content = value if isinstance(value, dict) else self._adapter.dump_python(value, mode="json", by_alias=True)
        return {**(beside or {}), self.field: content} if self.field else content

    def from_content(self, content: Mapping[str, object]) -> T:
        """Return the record in a JSON object that is stored; raises pydantic's `ValidationError`."""
        return self._adapter.validate_python(content.get(self.field) if self.field else content)


@dataclass(frozen=True)
class Recorded(Generic[T_co]):
    """A record and when it was appended (UTC, ISO 8601); `content` is the JSON object that is stored."""

    at: str
    value: T_co
    content: Mapping[str, object]


class Envelope(BaseModel):
    """A file of evidence: the record is its `content`; `manifest` is the digest of its version's manifest.

    `copied_from` is set on a record that was copied with a version (`slmops.infra.storage.origin`).
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    manifest: str
    recorded_at: str
    content: dict[str, Any]
    copied_from: str | None = None


def first_fault(error: ValidationError) -> str:
    """Return where a record is not valid and why; only the first fault."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else fault["msg"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Tag(_Record):
    """A tag that was set on a version, or (`value` None) removed."""

    tag: str
    value: str | None


class Note(_Record):
    """A user's note on a version."""

    text: str


class Signature(_Record):
    """A signature of a version's manifest, as a Sigstore bundle."""

    bundle: dict[str, Any]


class Build(_Record):
    """A variant's build: its duration in s, peak memory in bytes, warnings, `passes`, calibration and machine.

    `mended` are the files that differ from the checkpoint's, each with both digests and its corrections.
    """

    precision: str
    wall_s: float
    peak_rss_bytes: int
    log: str
    warnings: tuple[str, ...] = ()
    passes: dict[str, dict[str, Any]] = {}
    calibration: str | None = later_field(None)
    mended: tuple[dict[str, Any], ...] = later_field(())
    host: dict[str, Any]


class Selection(_Record):
    """The precision of the variant that serves (None if none may), and why. `reasons` are those against the others."""

    selected: str | None
    reason: str = ""
    reasons: dict[str, str] = {}
    budget: tuple[str, ...] = ()


class DeployedVariant(_Record):
    """The part of a deploy's record on a variant that the store reads; `foundry_model_id` is None if not registered.

    `allowed` names the gate's checks that failed and were allowed to fail.
    """

    model_config = ConfigDict(extra="allow")

    precision: str
    status: str
    foundry_model_id: str | None = None
    metrics: dict[str, int | float | None] = {}
    allowed: tuple[str, ...] = later_field(())


class Deployed(_Record):
    """The part of a deploy's record that the store reads. The rest belongs to the report and is stored as it is."""

    model_config = ConfigDict(extra="allow")

    variants: tuple[DeployedVariant, ...] = ()
    description: str = ""
    evaluation: str = ""

    def variant(self, precision: str) -> DeployedVariant | None:
        """Return the record of the variant of a precision."""
        return next((variant for variant in self.variants if variant.precision == precision), None)


class License(_Record):
    """The license of a version's checkpoint, as its model card names it."""

    name: str


TAG = Kind("tag", Tag)
NOTE = Kind("note", Note)
SIGNATURE = Kind("signature", Signature)
LICENSE = Kind("license", License)
BUILD = Kind("build", Build)
SBOM = Kind("sbom", dict[str, Any])  # in CycloneDX's form
SELECTION = Kind("selection", Selection)
DEPLOY = Kind("deploy", Deployed)

# Kinds of evidence without a judgement: they count in every store, whatever their origin.
STATEMENTS = frozenset({"tag", "note", "signature", "sbom", "build", "license", "response-format"})
