"""Exams on the serving device, by the workers of a pool, if the settings name one."""

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import Field

from slmops.infra.errors import StageFailed
from slmops.infra.records import Record
from slmops.infra.settings import GateSettings
from slmops.infra.storage.version import Variant, Version
from slmops.tasks.exams.endurance import EnduranceExam
from slmops.tasks.exams.exam import Exam, examine
from slmops.tasks.exams.measurement import MeasurementExam
from slmops.tasks.exams.together import examine_together
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.runs.orders import Order, order_on_pool
from slmops.tasks.workshop import working_by, workshop

R = TypeVar("R")

ON_WORKER = "measure-variant"  # the flow that takes exams on a pool's workers


def exams_of_a_device(rows: Sequence[EvaluationRow]) -> list[Exam[Any]]:
    """Return the exams whose answers depend on the device."""
    return [MeasurementExam(), EnduranceExam("genai", rows), EnduranceExam("foundry", rows)]


class ExamOrder(Record):
    """An order from one machine's deploy to another: the exams' ids, the evaluation rows, and the gate's limits."""

    exams: tuple[str, ...]
    rows: tuple[EvaluationRow, ...]
    gate: GateSettings


class Examined(Record):
    """A worker's results for a variant, by the exams' ids, or its error."""

    answers: dict[str, Any] = Field(default_factory=dict)
    error: str | None = None


def examine_on_workers(version: Version, rows: Sequence[EvaluationRow]) -> dict[str, Examined]:
    """Let workers of the measuring pool examine every variant; returns the results by precision.

    Without such a pool the result is empty.
    """
    shop = workshop()
    pool = shop.measure_pool
    if not pool:
        return {}
    exams = tuple(exam.id for exam in exams_of_a_device(rows))
    asked = ExamOrder(exams=exams, rows=tuple(rows), gate=shop.settings.gate)
    orders = {
        variant.precision: Order(
            f"measure-{version.name}-{variant.precision}",
            {"reference": version.reference, "precision": variant.precision},
            asked,
        )
        for variant in version.variants
    }
    handed_back = order_on_pool(ON_WORKER, pool, orders)
    return {
        **{precision: Examined.model_validate(result) for precision, result in handed_back.results.items()},
        **{precision: Examined(error=error) for precision, error in handed_back.errors.items()},
    }


def examine_ordered(asked: ExamOrder, variant: Variant) -> Examined:
    """Take the exams that a deploy on another machine ordered."""
    exams = {exam.id: exam for exam in exams_of_a_device(asked.rows)}
    with working_by(workshop().settings.model_copy(update={"gate": asked.gate})):
        answers = {name: exams[name].kind.to_content(examine(exams[name], variant)) for name in asked.exams}
    return Examined(answers=answers)


def answered(exam: Exam[R], variant: Variant, elsewhere: Examined | None) -> R:
    """Return a worker's result, or examine the variant here; raises `StageFailed` if the worker failed."""
    if elsewhere is None:
        return examine(exam, variant)
    if elsewhere.error is not None:
        raise StageFailed(elsewhere.error)
    return exam.kind.from_content(elsewhere.answers[exam.id])


def answered_together(exams: Sequence[Exam[R]], variant: Variant, elsewhere: Examined | None) -> tuple[R, ...]:
    """Return a worker's results, or examine the variant here, side by side; raises as `answered` does."""
    if elsewhere is None:
        return examine_together(exams, variant)
    return tuple(answered(exam, variant, elsewhere) for exam in exams)
