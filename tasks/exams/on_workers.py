"""Exams that are taken on the device that will serve: by the workers of a pool, where the settings name one."""

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import Field

from slmops.infra.errors import StageFailed
from slmops.infra.records import Record
from slmops.infra.storage.version import Variant, Version
from slmops.tasks.exams.endurance import EnduranceExam
from slmops.tasks.exams.exam import Exam, examine
from slmops.tasks.exams.measurement import MeasurementExam
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.runs.orders import Order, order_on_pool
from slmops.tasks.workshop import workshop

R = TypeVar("R")

ON_WORKER = "measure-variant"  # the flow that takes exams on a pool's workers


def exams_of_a_device(rows: Sequence[EvaluationRow]) -> list[Exam[Any]]:
    """Return the exams whose answers depend on the device."""
    return [MeasurementExam(), EnduranceExam("genai", rows), EnduranceExam("foundry", rows)]


class ExamOrder(Record):
    """What one machine's deploy asks of another: exams by their ids, and the rows that they are about."""

    exams: tuple[str, ...]
    rows: tuple[EvaluationRow, ...]


class Examined(Record):
    """What a worker found in a variant, by the ids of exams, or why it could not."""

    answers: dict[str, Any] = Field(default_factory=dict)
    error: str | None = None


def examine_on_workers(version: Version, rows: Sequence[EvaluationRow]) -> dict[str, Examined]:
    """Have every variant examined on a worker of the measuring pool; returns what was found, by precision.

    Without such a pool nothing was found.
    """
    pool = workshop().measure_pool
    if not pool:
        return {}
    asked = ExamOrder(exams=tuple(exam.id for exam in exams_of_a_device(rows)), rows=tuple(rows))
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
    """Take the exams that another machine's deploy asks of this one."""
    exams = {exam.id: exam for exam in exams_of_a_device(asked.rows)}
    answers = {name: exams[name].kind.to_content(examine(exams[name], variant)) for name in asked.exams}
    return Examined(answers=answers)


def answered(exam: Exam[R], variant: Variant, elsewhere: Examined | None) -> R:
    """Return what a worker found, or examine the variant here; raises `StageFailed` where the worker failed."""
    if elsewhere is None:
        return examine(exam, variant)
    if elsewhere.error is not None:
        raise StageFailed(elsewhere.error)
    return exam.kind.from_content(elsewhere.answers[exam.id])
