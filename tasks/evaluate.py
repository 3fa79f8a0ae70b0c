"""Evaluation: a variant's answers and distributions beside those of its source checkpoint."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from prefect import task
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from infra.process.supervisor import OnProgress, run_in_child
from infra.settings import Settings
from infra.storage.folders import place, work_folder
from infra.storage.registry import Manifest, ModelRegistry, StoredVariant
from infra.storage.registry import digest_of as digest_of_json
from tasks.checkpoint import PreparedCheckpoint
from tasks.evaluation_set import EvaluationRow, EvaluationSet, RowId, digest_of
from tasks.progress import stage_progress
from tasks.retries import PASSING_FAULTS
from tasks.statistics import Estimate

Share = Annotated[float, Field(ge=0, le=1)]


class _Result(BaseModel):
    """A child's result: keys that are not evidence (token ids, rendered prompts) are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ReferenceRow(_Result):
    """The source checkpoint's answer to one row."""

    id: RowId
    answer: str
    exact_match: bool | None


class Reference(_Result):
    """What variants are held to: the source checkpoint's greedy answers and the digest of its logits."""

    rows: tuple[ReferenceRow, ...]
    exact_match: Share | None
    positions: int
    vocabulary_size: int
    logits_sha256: str
    answers_sha256: str
    rows_sha256: str
    dtype: str
    versions: dict[str, str]
    wall_s: FiniteFloat
    peak_rss_bytes: int


class EvaluatedRow(_Result):
    """A variant's answer to one row and how its distributions compare there (None: no reference, or not finite)."""

    id: RowId
    answer: str
    exact_match: bool | None
    identical_to_reference: bool | None
    prompt_tokens: int
    template_matches: bool | None
    positions: int
    finite_positions: int
    top1_agreement: Share | None
    kl_divergence: FiniteFloat | None
    category: str | None = None
    reference_answer: str | None = None
    score: Share | None = None
    reference_score: Share | None = None
    output_fault: str | None = None
    reference_output_fault: str | None = None


class CategoryScore(_Result):
    """Mean scores of the rows of one category."""

    category: str
    rows: int
    score: Estimate
    reference_score: Estimate | None


class TemplateMismatch(_Result):
    """A prompt that the serving runtime renders or tokenizes otherwise than transformers does."""

    id: RowId
    reference: str
    variant: str
    reference_ids: tuple[int, ...]
    variant_ids: tuple[int, ...]


class TemplateMismatches(_Result):
    """How many rows' prompts differ, and the first of them."""

    count: int
    example: TemplateMismatch | None


class Vocabulary(_Result):
    """Lengths of the logits, and of the part that was compared."""

    variant: int
    reference: int | None
    compared: int


class Evaluation(_Result):
    """A variant's answers and its distance from the reference; see `infra.genai.runtime.evaluate` for each figure."""

    rows: tuple[EvaluatedRow, ...]
    template_mismatches: TemplateMismatches
    positions: int
    finite_logits: Share
    top1_agreement: Share | None
    kl_divergence: FiniteFloat | None
    kl_divergence_p99: FiniteFloat | None
    perplexity: FiniteFloat | None
    reference_perplexity: FiniteFloat | None
    exact_match: Share | None
    reference_exact_match: Share | None
    identical_answers: Share | None
    empty_answers: int
    worst_rows: tuple[RowId, ...]
    vocabulary: Vocabulary
    score: Estimate | None = None
    reference_score: Estimate | None = None
    quality_loss: Estimate | None = None
    categories: tuple[CategoryScore, ...] = ()
    output_conformity: Estimate | None = None
    reference_output_conformity: Estimate | None = None
    top1_agreement_interval: Estimate | None = None
    kl_divergence_interval: Estimate | None = None
    worst_examples: tuple[RowId, ...] = ()
    rows_sha256: str
    threads: int
    versions: dict[str, str]
    wall_s: FiniteFloat
    peak_rss_bytes: int

    @property
    def has_reference(self) -> bool:
        """Whether the variant was compared with a source checkpoint."""
        return self.vocabulary.reference is not None


def run_reference(
    settings: Settings,
    checkpoint_dir: Path,
    rows: Sequence[EvaluationRow],
    work_dir: Path,
    on_progress: OnProgress | None = None,
) -> Reference:
    """Run the source checkpoint on the rows in a child process; `work_dir` keeps what `evaluate_variant` compares with.

    Raises `BadInput` for a row that the model cannot take, `StageFailed` and its kinds as `run_in_child` does.
    """
    used = rows[: settings.evaluation.max_rows]
    request = {
        "checkpoint_dir": str(checkpoint_dir.absolute()),
        "rows": _asked(used),
        "max_new_tokens": settings.evaluation.max_new_tokens,
        "max_positions": settings.evaluation.max_positions,
        "batch_size": settings.evaluation.batch_size,
        "threads": settings.threads,
        "dtype": "float32",
        "output_dir": str(work_dir.absolute()),
    }
    child = run_in_child(
        "infra.transformers.reference:reference",
        request,
        deadline_s=settings.timeout.reference_s,
        log_path=work_dir / "reference.log",
        work_dir=work_dir,
        on_progress=on_progress,
    )
    return Reference(
        **child.value, rows_sha256=digest_of(used), wall_s=child.wall_s, peak_rss_bytes=child.peak_rss_bytes
    )


def evaluate_variant(
    settings: Settings,
    model_dir: Path,
    rows: Sequence[EvaluationRow],
    *,
    reference_dir: Path | None,
    work_dir: Path,
    on_progress: OnProgress | None = None,
    execution_provider: str | None = None,
) -> Evaluation:
    """Run a genai model folder on the rows in a child process.

    `reference_dir` is the `work_dir` that `run_reference` was given for the same rows, or None for a model without a
    source checkpoint. `execution_provider` None runs on what the folder's own configuration says.

    Raises `StageFailed` and its kinds: a model that cannot be opened or run, a vocabulary of another model.
    """
    used = rows[: settings.evaluation.max_rows]
    request = {
        "model_dir": str(model_dir.absolute()),
        "rows": _asked(used),
        "reference_dir": None if reference_dir is None else str(reference_dir.absolute()),
        "max_new_tokens": settings.evaluation.max_new_tokens,
        "max_positions": settings.evaluation.max_positions,
        "threads": settings.threads,
        "execution_provider": execution_provider,
    }
    child = run_in_child(
        "infra.genai.runtime:evaluate",
        request,
        deadline_s=settings.timeout.evaluate_s,
        log_path=work_dir / "evaluate.log",
        work_dir=work_dir,
        on_progress=on_progress,
    )
    return Evaluation(
        **child.value, rows_sha256=digest_of(used), wall_s=child.wall_s, peak_rss_bytes=child.peak_rss_bytes
    )


def _asked(rows: Sequence[EvaluationRow]) -> list[dict[str, Any]]:
    return [row.model_dump(mode="json", include={"id", "messages", "expected"}) for row in rows]


def evaluation_key(variant: StoredVariant, source_digest: str, evaluation: EvaluationSet, settings: Settings) -> str:
    """Return the key of a variant's evaluation: the same question has the same key."""
    question = {
        "variant": variant.digest,
        "source": source_digest,
        "rows": digest_of(evaluation.rows),
        "settings": settings.evaluation.model_dump(mode="json"),
    }
    return digest_of_json(question)[:16]


def known_evaluation(
    manifest: Manifest, variant: StoredVariant, evaluation: EvaluationSet, registry: ModelRegistry, settings: Settings
) -> Evaluation | None:
    """Return a variant's evaluation on these rows if it is on record."""
    key = evaluation_key(variant, manifest.source.digest, evaluation, settings)
    known = registry.latest_evidence(manifest, "evaluation", key)
    return Evaluation.model_validate(known["evaluation"]) if known else None


def reference_folder(source_digest: str, evaluation: EvaluationSet, settings: Settings) -> Path:
    """Return where the reference's answers and logits wait for the variants."""
    question = {
        "source": source_digest,
        "rows": digest_of(evaluation.rows),
        "settings": settings.evaluation.model_dump(mode="json"),
    }
    return settings.cache_dir / "references" / digest_of_json(question)


def forget_reference(source_digest: str, evaluation: EvaluationSet, settings: Settings) -> None:
    """Remove the reference's logits once every variant was compared with them: they are large."""
    shutil.rmtree(reference_folder(source_digest, evaluation, settings), ignore_errors=True)


def last_evaluation_set(manifest: Manifest, registry: ModelRegistry) -> EvaluationSet | None:
    """Return the rows of a version's last evaluation, or None when it was never evaluated."""
    record = registry.latest_evidence(manifest, "evaluation")
    return EvaluationSet(rows=record["rows"], origin=record["origin"]) if record else None


def needs_reference(manifest: Manifest, evaluation: EvaluationSet, registry: ModelRegistry, settings: Settings) -> bool:
    """Whether some variant has yet to be compared with its source checkpoint on these rows."""
    if manifest.source.parameters == 0:
        return False
    known = (known_evaluation(manifest, one, evaluation, registry, settings) for one in manifest.variants)
    return any(one is None for one in known)


@task(name="run reference", task_run_name="reference", tags=["slmops", "evaluate"], **PASSING_FAULTS)
def run_reference_once(prepared: PreparedCheckpoint, evaluation: EvaluationSet, settings: Settings) -> None:
    """Run the source checkpoint in transformers on the rows, unless its answers wait already."""
    folder = reference_folder(prepared.digest, evaluation, settings)
    with stage_progress("reference") as on_progress:
        if folder.is_dir():
            return
        with work_folder(settings) as work:
            run_reference(settings, prepared.folder, evaluation.rows, work / "reference", on_progress)
            place(work / "reference", folder)


@task(
    name="evaluate variant", task_run_name="evaluate-{variant.precision}", tags=["slmops", "evaluate"], **PASSING_FAULTS
)
def evaluate_stored_variant(
    manifest: Manifest,
    variant: StoredVariant,
    evaluation: EvaluationSet,
    registry: ModelRegistry,
    settings: Settings,
    *,
    has_reference: bool,
) -> Evaluation:
    """Evaluate a variant of the store and keep the figures as evidence; an evaluation on record is reused."""
    with stage_progress(f"evaluate {variant.precision}") as on_progress:
        known = known_evaluation(manifest, variant, evaluation, registry, settings)
        if known:
            on_progress(1, 1, "evaluated before")
            return known
        reference = reference_folder(manifest.source.digest, evaluation, settings) if has_reference else None
        with work_folder(settings) as work:
            registry.materialize(variant.files, work / "model")
            evaluated = evaluate_variant(
                settings,
                work / "model",
                evaluation.rows,
                reference_dir=reference,
                work_dir=work,
                on_progress=on_progress,
            )
        record = {
            "precision": variant.precision,
            "rows": [row.model_dump(mode="json") for row in evaluation.rows],
            "origin": evaluation.origin,
            "evaluation": evaluated.model_dump(mode="json"),
        }
        key = evaluation_key(variant, manifest.source.digest, evaluation, settings)
        registry.add_evidence(manifest, "evaluation", record, key)
    return evaluated
