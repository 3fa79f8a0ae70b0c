"""The flow `benchmark`: measure a stored version anew, and tell when it became worse."""

from prefect import State, flow
from prefect.states import Completed

from slmops.infra.errors import StageFailed
from slmops.infra.storage.manifest import Manifest, StoredVariant
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.checkpoint.preparation import prepare_source
from slmops.tasks.exams.exam import examine
from slmops.tasks.exams.lm_eval import LmEvalExam, LmEvalTasks, check_lm_eval, run_lm_eval_on_checkpoint
from slmops.tasks.exams.measurement import MeasurementExam, measurements_of
from slmops.tasks.report.benchmark import BenchmarkReport, VariantBenchmark, publish_benchmark
from slmops.tasks.request.declaration import takes
from slmops.tasks.request.parameters import BenchmarkParameters
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.verdict.history import Figures, compare_versions
from slmops.tasks.workshop import open_workshop, workshop


@flow(name="benchmark", flow_run_name="benchmark-{reference}")
@ends_by_its_errors
@open_workshop()
@takes(BenchmarkParameters)
def benchmark(parameters: BenchmarkParameters) -> State[BenchmarkReport]:
    """Measure every variant of a stored version anew and compare it with its earlier measurements on this machine.

    The figures are appended to the version's evidence. A change for the worse beyond noise is measured twice before it
    is believed; then the event `slmops.benchmark.regression` is emitted.

    Returns:
        The report, in a completed state whether or not there is a regression: the report says so.
    """
    shop = workshop()
    settings, registry = shop.settings, shop.registry
    manifest = registry.find(parameters.reference).manifest
    tasks = LmEvalTasks(
        names=parameters.lm_eval_tasks,
        include_path=parameters.lm_eval_include,
        limit=parameters.lm_eval_limit,
        chat_template=parameters.lm_eval_chat_template,
        allow_network=parameters.lm_eval_allow_network,
        allow_code=parameters.lm_eval_allow_code,
    )
    if tasks.names or parameters.lm_eval_on_checkpoint:
        check_lm_eval(tasks)
    prepared = prepare_source(manifest, settings) if parameters.lm_eval_on_checkpoint else None
    with registry.in_use(manifest):
        variants = tuple(measure_anew(manifest, variant, registry) for variant in manifest.variants)
        if tasks.names:
            variants = tuple(with_lm_eval(manifest, variant, tasks) for variant in variants)
    on_checkpoint = run_lm_eval_on_checkpoint(manifest, prepared, tasks) if prepared else ()
    report = BenchmarkReport(
        name=manifest.name, version=manifest.version, variants=variants, checkpoint_lm_eval=on_checkpoint
    )
    publish_benchmark(report)
    if report.failed:
        faults = " ".join(f"{one.precision}: {one.error}" for one in variants if one.error)
        raise StageFailed(f"{manifest.reference} could not be measured. {faults}", "Deploy it again.")
    return Completed(message=report.summary, data=report)


def measure_anew(manifest: Manifest, variant: StoredVariant, registry: ModelRegistry) -> VariantBenchmark:
    """Measure one variant, and once more when it seems worse; one that fails is reported and the others go on."""
    earlier = Figures(measurements=tuple(measurements_of(manifest, variant, registry)))
    try:
        measured = [examine(MeasurementExam(), manifest, variant, fresh=True)]
        found = compare_versions(variant.precision, earlier, Figures(measurements=tuple(measured)))
        if any(change.trend == "worse" for change in found.changes):
            measured.append(examine(MeasurementExam(), manifest, variant, fresh=True))
            found = compare_versions(variant.precision, earlier, Figures(measurements=tuple(measured)))
    except StageFailed as error:
        return VariantBenchmark(precision=variant.precision, error=str(error))
    return VariantBenchmark(
        precision=variant.precision,
        metrics=measured[-1].metrics,
        earlier=found.earlier_measurements,
        changes=found.changes,
        notes=found.notes,
    )


def with_lm_eval(manifest: Manifest, measured: VariantBenchmark, tasks: LmEvalTasks) -> VariantBenchmark:
    """Run lm-eval's tasks on a variant that could be measured."""
    if measured.error:
        return measured
    variant = manifest.variant(measured.precision)
    try:
        results = examine(LmEvalExam(tasks), manifest, variant)
    except StageFailed as error:
        return measured.model_copy(update={"error": str(error)})
    return measured.model_copy(update={"lm_eval": results})
