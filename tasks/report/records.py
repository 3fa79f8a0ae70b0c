"""What a deploy did, as a record; the other modules of this package show it."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from infra.settings import Settings
from tasks.checkpoint import PreparedCheckpoint
from tasks.evaluate import Evaluation
from tasks.exercise import Exercise
from tasks.gate import GateVerdict
from tasks.history import History
from tasks.measure import Measurement
from tasks.parity import TemplateParity
from tasks.perplexity import TextComparison
from tasks.request import DeployRequest
from tasks.steadiness import Steadiness

VariantStatus = Literal["registered", "rejected", "failed"]
DeployStatus = Literal["registered", "unchanged", "rejected", "failed"]


class VariantDetails(BaseModel):
    """Everything that was measured of a variant, for plots, tables of examples and intervals; None: not done."""

    model_config = ConfigDict(frozen=True)

    measurement: Measurement | None = None
    evaluation: Evaluation | None = None
    steadiness: Steadiness | None = None
    parity: TemplateParity | None = None
    text: TextComparison | None = None
    exercises: tuple[Exercise, ...] = ()


class VariantReport(BaseModel):
    """One variant of a deploy; `reason` says why it was or was not chosen."""

    model_config = ConfigDict(frozen=True)

    precision: str
    status: VariantStatus
    size_bytes: int | None = None
    uri: str | None = None
    digest: str | None = None
    foundry_model_id: str | None = None
    recipe: str | None = None
    metrics: dict[str, float] = {}
    gate: GateVerdict | None = None
    reason: str = ""
    answer: str | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    details: VariantDetails = Field(default=VariantDetails(), exclude=True)


class Provenance(BaseModel):
    """Where a version comes from, as its manifest has it."""

    model_config = ConfigDict(frozen=True)

    source_digest: str
    manifest_digest: str
    architecture: str
    builder: dict[str, str]
    created_at: str


class DeployReport(BaseModel):
    """What a deploy did; `slmops deploy --json` prints it.

    `selected` is the precision that serves under the model's name, None when none may; `reason` says why that one.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    version: int | None
    status: DeployStatus
    aliases: tuple[str, ...] = ()
    selected: str | None = None
    reason: str = ""
    budget: tuple[str, ...] = ()
    variants: tuple[VariantReport, ...]
    checkpoint: str
    parameters: int
    evaluation: str
    reference_exact_match: float | None = None
    foundry_model_id: str | None = None
    foundry_dir: str
    question: str = ""
    description: str = ""
    report_file: str | None = None
    html_file: str | None = None
    warnings: tuple[str, ...] = ()
    provenance: Provenance | None = None
    history: History | None = None

    @property
    def reference(self) -> str:
        """`NAME@VERSION`, or `NAME` when no version came of it."""
        return f"{self.name}@{self.version}" if self.version else self.name

    def to_contract(self) -> dict[str, Any]:
        """Return the JSON document of `slmops deploy --json`."""
        return self.model_dump(mode="json")

    @property
    def summary(self) -> str:
        """One sentence on how it ended."""
        by_status = {
            status: [one.precision for one in self.variants if one.status == status]
            for status in ("registered", "rejected", "failed")
        }
        parts = [f"{', '.join(names)} {status}" for status, names in by_status.items() if names]
        lead = "unchanged: " if self.status == "unchanged" else ""
        return f"{self.reference} {lead}{'; '.join(parts)}."


def variant_metrics(measured: Measurement, evaluated: Evaluation) -> dict[str, float]:
    """Return a variant's figures as one flat record; what was not compared is left out."""
    quality = {
        "top1_agreement": evaluated.top1_agreement,
        "kl_divergence": evaluated.kl_divergence,
        "perplexity": evaluated.perplexity,
        "exact_match": evaluated.exact_match,
    }
    figures: dict[str, float] = {name: value for name, value in quality.items() if value is not None}
    for name, value in measured.metrics.items():
        figures[name] = value
    return figures


def in_order_of_size(variants: Sequence[VariantReport]) -> list[VariantReport]:
    """Return variants from the largest precision to the smallest."""
    return sorted(variants, key=lambda one: ("fp32", "fp16", "int8", "int4").index(one.precision))


def overall_status(variants: Sequence[VariantReport], *, unchanged: bool) -> DeployStatus:
    """Return a deploy's status from its variants': a failure weighs most, then what was registered."""
    statuses = {variant.status for variant in variants}
    if "failed" in statuses:
        return "failed"
    if "registered" in statuses:
        return "unchanged" if unchanged else "registered"
    return "rejected"


def failed_report(
    request: DeployRequest,
    prepared: PreparedCheckpoint,
    evaluation: str,
    failures: Sequence[VariantReport],
    settings: Settings,
) -> DeployReport:
    """Return the report of a deploy of which no variant could be built, so that no version came of it."""
    return DeployReport(
        name=request.name,
        version=None,
        status="failed",
        variants=tuple(failures),
        checkpoint=request.checkpoint,
        parameters=prepared.inspection.parameters,
        evaluation=evaluation,
        foundry_dir=str(settings.foundry_dir),
        description=request.description,
        warnings=prepared.inspection.warnings,
    )
