"""Evaluation: a variant's answers and distributions beside those of its source checkpoint."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from slmops.infra.errors import BadInput
from slmops.infra.genai.calls import AnsweredRow, Evaluate, Evaluated
from slmops.infra.process.call import OnProgress
from slmops.infra.process.supervisor import ChildProcess, run_in_child
from slmops.infra.records import Json
from slmops.infra.reference.answers import Question, RowId, Share
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.version import Variant, Version
from slmops.infra.transformers.calls import AnswerAsSource
from slmops.tasks.exams.estimates import Estimate, mean_score, paired_loss, weighted_mean
from slmops.tasks.exams.exam import Bench
from slmops.tasks.exams.source import ComparedExam, has_source
from slmops.tasks.questions.evaluation_set import EvaluationRow, EvaluationSet, digest_of
from slmops.tasks.questions.output_format import OutputFormat, output_faults
from slmops.tasks.questions.patterns import MATCH_TIMEOUT_S
from slmops.tasks.workshop import Workshop

# Raised whenever a record of an evaluation says more, or something else: records of another number are not reused.
EVALUATION_SCHEMA = 2
MAX_WORST_EXAMPLES = 5


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


class EvaluatedRow(AnsweredRow):
    """A variant's answer to one row, with what follows from it.

    `exact_match` is None for rows of other scorers, the scores are None for rows without an expected answer, and the
    output faults, what is wrong with an answer's form, are None where nothing is or no format was asked for.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    reference_answer: str | None = None
    category: str | None = None
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


class Evaluation(Evaluated):
    """A variant's answers and its distance from the reference.

    `score` and `reference_score` are the means over the rows with expected answers, `quality_loss` is the reference's
    score minus the variant's over the same rows; all are None without such rows or without a reference. The output
    conformities are shares of all answers. The intervals of agreement and divergence come from resampling rows; they
    are None for fewer than two rows with positions, or where a figure is not finite. `worst_examples` are rows whose
    reference scores higher than the variant, the largest loss first.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    rows: tuple[EvaluatedRow, ...]
    score: Estimate | None = None
    reference_score: Estimate | None = None
    quality_loss: Estimate | None = None
    categories: tuple[CategoryScore, ...] = ()
    output_conformity: Estimate | None = None
    reference_output_conformity: Estimate | None = None
    top1_agreement_interval: Estimate | None = None
    kl_divergence_interval: Estimate | None = None
    worst_examples: tuple[RowId, ...] = ()
    notes: tuple[str, ...] = ()
    rows_sha256: str
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
    torch_child: ChildProcess | None = None,
) -> Reference:
    """Run the source checkpoint on the rows in a child process; `work_dir` keeps what `evaluate_variant` compares with.

    It is run within `torch_child`, if that is given; the peak memory then counts what earlier calls left there.

    Raises `BadInput` for a row that the model cannot take, `StageFailed` and its kinds as `run_in_child` does.
    """
    used = rows[: settings.evaluation.max_rows]
    child = run_in_child(
        AnswerAsSource(
            checkpoint_dir=checkpoint_dir,
            rows=_asked(used),
            max_new_tokens=settings.evaluation.max_new_tokens,
            max_positions=settings.evaluation.max_positions,
            batch_size=settings.evaluation.batch_size,
            threads=settings.threads,
            output_dir=work_dir,
        ),
        deadline_s=settings.timeout.reference_s,
        log_path=work_dir / "reference.log",
        work_dir=work_dir,
        on_progress=on_progress,
        within=torch_child,
    )
    return Reference(
        **child.value.model_dump(),
        rows_sha256=digest_of(used),
        wall_s=child.wall_s,
        peak_rss_bytes=child.peak_rss_bytes,
    )


def evaluate_variant(
    settings: Settings,
    model_dir: Path,
    rows: Sequence[EvaluationRow],
    *,
    reference_dir: Path | None,
    work_dir: Path,
    output_format: OutputFormat | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Run a genai model folder on the rows in a child process, and score its answers.

    `reference_dir` is the `work_dir` that `run_reference` was given for the same rows, or None for a model without a
    source checkpoint.

    Raises `StageFailed` and its kinds: a model that cannot be opened or run.
    """
    used = rows[: settings.evaluation.max_rows]
    child = run_in_child(
        Evaluate(
            model_dir=model_dir,
            rows=_asked(used),
            reference_dir=reference_dir,
            max_new_tokens=settings.evaluation.max_new_tokens,
            max_positions=settings.evaluation.max_positions,
            threads=settings.threads,
        ),
        deadline_s=settings.timeout.evaluate_s,
        log_path=work_dir / "evaluate.log",
        work_dir=work_dir,
        on_progress=on_progress,
    )
    found = Evaluation(
        **child.value.model_dump(),
        rows_sha256=digest_of(used),
        wall_s=child.wall_s,
        peak_rss_bytes=child.peak_rss_bytes,
    )
    return score_evaluation(found, used, output_format)


def _asked(rows: Sequence[EvaluationRow]) -> tuple[Question, ...]:
    """What the children are asked; they know no scorer but exact_match."""
    return tuple(
        Question(
            id=row.id,
            messages=[message.model_dump() for message in row.messages],
            expected=row.expected if row.scorer.name == "exact_match" else None,
        )
        for row in rows
    )


def score_evaluation(
    evaluation: Evaluation, rows: Sequence[EvaluationRow], output_format: OutputFormat | None
) -> Evaluation:
    """Fill in all that follows from the answers and the rows' own figures: scores, conformity, intervals, examples.

    `rows` are those that were evaluated, in the same order. A pattern that is not done with an answer in time has not
    matched it: that answer scores 0, and a note says so.
    """
    slow: list[str] = []
    answers = [row.answer for row in evaluation.rows]
    references = [row.reference_answer for row in evaluation.rows]
    scores, faults = _scores(rows, answers, "variant", slow), _faults(output_format, answers)
    reference_scores = _scores(rows, references, "reference", slow)
    reference_faults = _faults(output_format, references)
    scored = [
        found.model_copy(
            update={
                "category": row.category,
                "score": score,
                "reference_score": reference_score,
                "output_fault": fault,
                "reference_output_fault": reference_fault,
            }
        )
        for found, row, score, reference_score, fault, reference_fault in zip(
            evaluation.rows, rows, scores, reference_scores, faults, reference_faults, strict=True
        )
    ]
    notes = []
    if slow:
        places = ", ".join(slow[:5]) + (f" and {len(slow) - 5} more" if len(slow) > 5 else "")
        notes = [f"A pattern was not done after {MATCH_TIMEOUT_S:g} s and so scored 0: {places}."]
    agreements = [row.top1_agreement for row in scored if row.positions]
    divergences = [row.kl_divergence for row in scored if row.positions]
    weights = [row.positions for row in scored if row.positions]
    return evaluation.model_copy(
        update={
            "rows": tuple(scored),
            "score": _mean(scores),
            "reference_score": _mean(reference_scores),
            "quality_loss": _loss(scored),
            "categories": _categories(scored),
            "output_conformity": _conformity(output_format, answers, faults),
            "reference_output_conformity": _conformity(output_format, references, reference_faults),
            "top1_agreement_interval": _over_rows(agreements, weights),
            "kl_divergence_interval": _over_rows(divergences, weights),
            "worst_examples": _worst_examples(scored),
            "notes": (*evaluation.notes, *notes),
        }
    )


def _scores(
    rows: Sequence[EvaluationRow], answers: Sequence[str | None], side: str, slow: list[str]
) -> list[float | None]:
    scores: list[float | None] = []
    for row, answer in zip(rows, answers, strict=True):
        if row.expected is None or answer is None:
            scores.append(None)
            continue
        try:
            scores.append(row.scorer.score(answer, row.expected))
        except TimeoutError:
            scores.append(0.0)
            slow.append(f"row {row.id!r} with the {side}'s answer")
    return scores


def _faults(output_format: OutputFormat | None, answers: Sequence[str | None]) -> list[str | None]:
    if output_format is None:
        return [None] * len(answers)
    found = iter(output_faults(output_format, [answer for answer in answers if answer is not None]))
    return [None if answer is None else next(found) for answer in answers]


def _conformity(
    output_format: OutputFormat | None, answers: Sequence[str | None], faults: Sequence[str | None]
) -> Estimate | None:
    if output_format is None:
        return None
    return _mean(
        [None if answer is None else float(fault is None) for answer, fault in zip(answers, faults, strict=True)]
    )


def _mean(scores: Sequence[float | None]) -> Estimate | None:
    known = [score for score in scores if score is not None]
    return mean_score(known) if known else None


def _loss(rows: Sequence[EvaluatedRow]) -> Estimate | None:
    pairs = [
        (row.reference_score, row.score) for row in rows if row.reference_score is not None and row.score is not None
    ]
    return paired_loss(*zip(*pairs, strict=True)) if pairs else None


def _categories(rows: Sequence[EvaluatedRow]) -> tuple[CategoryScore, ...]:
    """Mean scores by category, in the order of their first rows; rows without a category or a score are left out."""
    members: dict[str, list[EvaluatedRow]] = {}
    for row in rows:
        if row.category is not None and row.score is not None:
            members.setdefault(row.category, []).append(row)
    return tuple(
        CategoryScore(
            category=category,
            rows=len(of_category),
            score=mean_score([row.score for row in of_category if row.score is not None]),
            reference_score=_mean([row.reference_score for row in of_category]),
        )
        for category, of_category in members.items()
    )


def _over_rows(values: Sequence[float | None], weights: Sequence[int]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return weighted_mean(known, weights) if len(known) == len(values) and len(known) > 1 else None


def _worst_examples(rows: Sequence[EvaluatedRow]) -> tuple[RowId, ...]:
    """Ids of the rows that lost most, of equal losses those whose distributions are farther from the reference's."""
    losses = [
        (row.reference_score - row.score, math.inf if row.kl_divergence is None else row.kl_divergence, row.id)
        for row in rows
        if row.reference_score is not None and row.score is not None and row.reference_score > row.score
    ]
    losses.sort(key=lambda loss: loss[:2], reverse=True)
    return tuple(row_id for _, _, row_id in losses[:MAX_WORST_EXAMPLES])


EVALUATION = Kind("evaluation", Evaluation, field="evaluation")


class AnswersExam(ComparedExam[Evaluation]):
    """What a variant answers to the rows of an evaluation, beside the answers of its source checkpoint.

    `compared` False asks for the answers alone: one with a comparison on record counts as well.
    """

    kind, name, done_before = EVALUATION, "evaluate", "evaluated before"
    source_name = "reference"

    def __init__(self, evaluation: EvaluationSet, *, compared: bool = True) -> None:
        self.evaluation = evaluation
        self.compared = compared

    def question(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.question`."""
        output_format = self.evaluation.output_format
        return {
            "schema": EVALUATION_SCHEMA,
            "variant": variant.digest,
            "source": variant.version.manifest.source.digest,
            "rows": digest_of(self.evaluation.rows),
            "output_format": output_format.model_dump(mode="json") if output_format else None,
            "settings": settings.evaluation.model_dump(mode="json"),
        }

    def record(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.record`."""
        return {"precision": variant.precision, **self.evaluation.model_dump(mode="json")}

    def source_question(self, source_digest: str, settings: Settings) -> Json:
        """See `ComparedExam.source_question`."""
        return {
            "source": source_digest,
            "rows": digest_of(self.evaluation.rows),
            "settings": settings.evaluation.model_dump(mode="json"),
        }

    def run_source(self, checkpoint: Path, folder: Path, on_progress: OnProgress, shop: Workshop) -> None:
        """See `ComparedExam.run_source`."""
        run_reference(shop.settings, checkpoint, self.evaluation.rows, folder, on_progress, shop.torch_child)

    def take(self, bench: Bench, variant: Variant, shop: Workshop) -> Evaluation:
        """See `Exam.take`."""
        source = variant.version.manifest.source.digest
        has_reference = self.compared and has_source(variant)
        return evaluate_variant(
            shop.settings,
            bench.model,
            self.evaluation.rows,
            reference_dir=self.source_folder(source, shop.settings) if has_reference else None,
            work_dir=bench.work,
            output_format=self.evaluation.output_format,
            on_progress=bench.on_progress,
        )


def last_evaluation_set(version: Version) -> EvaluationSet | None:
    """Return the rows and output format of a version's last evaluation, or None when it was never evaluated.

    Raises `BadInput` when they cannot be read: then another version of slmops has recorded them.
    """
    record = version.latest(Kind(EVALUATION.name, dict[str, Any]))
    if record is None:
        return None
    fields = {name: record[name] for name in EvaluationSet.model_fields if name in record}
    try:
        return EvaluationSet.model_validate(fields)
    except ValidationError as error:
        raise BadInput(
            f"The rows of {version.reference}'s last evaluation cannot be read: {error.errors()[0]['msg']}.",
            "Another version of slmops has recorded them: name the evaluation file (--eval).",
        ) from error
