"""The record of a deploy; the other modules of this package render it."""

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from slmops.infra.storage.version import Variant
from slmops.tasks.build.climbing import Attempt
from slmops.tasks.build.search import SearchOutcome
from slmops.tasks.exams.constraint import Constraint
from slmops.tasks.exams.endurance import Endurance
from slmops.tasks.exams.estimates import Estimate
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.exams.length_sweep import LengthSweep
from slmops.tasks.exams.measurement import Measurement
from slmops.tasks.exams.statements import Statement
from slmops.tasks.exams.template_parity import TemplateParity
from slmops.tasks.exams.text import TextComparison
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.verdict.advice import Advice
from slmops.tasks.verdict.gate import GateVerdict
from slmops.tasks.verdict.history import History

VariantStatus = Literal["registered", "rejected", "built", "failed"]  # built: not judged yet
DeployStatus = Literal["registered", "unchanged", "rejected", "built", "failed"]


class VariantDetails(BaseModel):
    """All measurements of a variant, for plots, tables of examples and intervals; None: not measured."""

    model_config = ConfigDict(frozen=True)

    measurement: Measurement | None = None
    evaluation: Evaluation | None = None
    length_sweep: LengthSweep | None = None
    parity: TemplateParity | None = None
    text: TextComparison | None = None
    endurance: tuple[Endurance, ...] = ()
    constraint: Constraint | None = None


class VariantReport(BaseModel):
    """One variant of a deploy. `intervals` are those of the metrics of the same name; `reason` says why it was chosen
    or not; `allowed` names the checks that failed and were allowed to fail; `reliable` says whether the machine was
    idle enough for its figures of speed (None: not measured). `attempts` are the recipes that were tried for it. For a
    rejected variant, `nearest` is the recipe closest to the checkpoint, `advice` says for each failed check what it
    means and which steps would help, and `what_to_do` is the first step.
    """

    model_config = ConfigDict(frozen=True)

    precision: str
    status: VariantStatus
    size_bytes: int | None = None
    uri: str | None = None
    digest: str | None = None
    foundry_model_id: str | None = None
    recipe: str | None = None
    attempts: tuple[Attempt, ...] = ()
    nearest: str | None = None
    what_to_do: str | None = None
    advice: tuple[Advice, ...] = ()
    metrics: dict[str, float] = {}
    intervals: dict[str, Estimate] = {}
    gate: GateVerdict | None = None
    reason: str = ""
    answer: str | None = None
    error: str | None = None
    allowed: tuple[str, ...] = ()
    reliable: bool | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    details: VariantDetails = Field(default=VariantDetails(), exclude=True)

    @classmethod
    def of(cls, variant: Variant, status: VariantStatus) -> "VariantReport":
        """Return the beginning of a stored variant's report: what the variant itself says."""
        return cls(
            precision=variant.precision,
            status=status,
            size_bytes=variant.size_bytes,
            uri=variant.uri,
            digest=variant.digest,
            recipe=variant.recipe,
        )


class Provenance(BaseModel):
    """The provenance of a version, according to its manifest."""

    model_config = ConfigDict(frozen=True)

    source_digest: str
    manifest_digest: str
    architecture: str
    builder: dict[str, str]
    created_at: str


class DeployReport(BaseModel):
    """The result of a deploy; `slmops deploy --json` prints it.

    `selected` is the precision that serves under the model's name, or None; `reason` says why.
    The report shows the `evaluation_rows` beside the worst answers; the JSON leaves them out.
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
    evaluation_rows: tuple[EvaluationRow, ...] = Field(default=(), exclude=True)
    reference_exact_match: float | None = None
    reference_score: Estimate | None = None
    foundry_model_id: str | None = None
    foundry_dir: str
    question: str = ""
    description: str = ""
    report_file: str | None = None
    html_file: str | None = None
    warnings: tuple[str, ...] = ()
    provenance: Provenance | None = None
    history: History | None = None
    search: SearchOutcome | None = None
    statements: tuple[Statement, ...] = ()

    @property
    def reference(self) -> str:
        """`NAME@VERSION`, or `NAME` if the deploy made no version."""
        return f"{self.name}@{self.version}" if self.version else self.name

    def to_contract(self) -> dict[str, object]:
        """Return the JSON document of `slmops deploy --json`."""
        return self.model_dump(mode="json")

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """The deploy's warnings, and each one of its variants once, after the precisions that it is about."""
        return (*self.warnings, *self._of_variants(lambda variant: variant.warnings))

    @property
    def all_notes(self) -> tuple[str, ...]:
        """Each note on the variants once, after the precisions that it is about."""
        return self._of_variants(lambda variant: variant.notes)

    def _of_variants(self, said: Callable[[VariantReport], Sequence[str]]) -> tuple[str, ...]:
        precisions: dict[str, list[str]] = {}
        for variant in self.variants:
            for text in dict.fromkeys(said(variant)):
                precisions.setdefault(text, []).append(variant.precision)
        return tuple(f"{', '.join(names)}: {text}" for text, names in precisions.items())

    @property
    def summary(self) -> str:
        """One sentence on how it ended."""
        by_status = {
            status: [variant.precision for variant in self.variants if variant.status == status]
            for status in ("registered", "rejected", "built", "failed")
        }
        parts = [f"{', '.join(names)} {status}" for status, names in by_status.items() if names]
        lead = "unchanged: " if self.status == "unchanged" else ""
        return f"{self.reference} {lead}{'; '.join(parts)}."
