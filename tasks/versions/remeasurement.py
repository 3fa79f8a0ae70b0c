"""Measuring a variant of a version again, in addition to earlier results."""

from slmops.infra.errors import StageFailed
from slmops.infra.storage.version import Variant
from slmops.tasks.exams.exam import examine
from slmops.tasks.exams.lm_eval import LmEvalExam, LmEvalTasks
from slmops.tasks.exams.measurement import MeasurementExam, measurements_of
from slmops.tasks.report.benchmark import VariantBenchmark
from slmops.tasks.verdict.history import Figures, compare_versions


def measure_again(variant: Variant, tasks: LmEvalTasks) -> VariantBenchmark:
    """Measure a variant, a second time if it seems worse, and run the requested lm-eval tasks on it.

    The record has the error if it fails.
    """
    try:
        measured = _measured(variant)
    except StageFailed as error:
        return VariantBenchmark(precision=variant.precision, error=str(error))
    if not tasks.names:
        return measured
    try:
        return measured.model_copy(update={"lm_eval": examine(LmEvalExam(tasks), variant)})
    except StageFailed as error:
        return measured.model_copy(update={"error": str(error)})


def _measured(variant: Variant) -> VariantBenchmark:
    earlier = Figures(measurements=tuple(measurements_of(variant)))
    measured = [examine(MeasurementExam(), variant, fresh=True)]
    found = compare_versions(variant.precision, earlier, Figures(measurements=tuple(measured)))
    if any(change.trend == "worse" for change in found.changes):
        measured.append(examine(MeasurementExam(), variant, fresh=True))
        found = compare_versions(variant.precision, earlier, Figures(measurements=tuple(measured)))
    return VariantBenchmark(
        precision=variant.precision,
        metrics=measured[-1].metrics,
        reliable=measured[-1].reliable,
        earlier=found.earlier_measurements,
        changes=found.changes,
        notes=(*found.notes, *([measured[-1].warning] if measured[-1].warning else [])),
    )
