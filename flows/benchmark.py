"""The flow `benchmark`: measure a stored version again, and report whether it became worse."""

from prefect import State, flow
from prefect.states import Completed

from slmops.infra.errors import StageFailed
from slmops.tasks.checkpoint.preparation import prepare_source
from slmops.tasks.exams.lm_eval import LmEvalTasks, check_lm_eval, run_lm_eval_on_checkpoint
from slmops.tasks.report.benchmark import BenchmarkReport, publish_benchmark
from slmops.tasks.request.declaration import takes
from slmops.tasks.request.upkeep_parameters import BenchmarkParameters
from slmops.tasks.runs.names import run_name
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.versions.lookup import find_version
from slmops.tasks.versions.remeasurement import measure_again
from slmops.tasks.workshop import in_workshop, workshop


@flow(name="benchmark", flow_run_name=run_name("benchmark-{reference}"))
@ends_by_its_errors
@in_workshop
@takes(BenchmarkParameters)
def benchmark(parameters: BenchmarkParameters) -> State[BenchmarkReport]:
    """Measure every variant of a stored version again and compare it with its earlier measurements on this machine.

    The figures are appended to the version's evidence. A change for the worse beyond noise is measured a second time.
    If it is confirmed, the event `slmops.benchmark.regression` is emitted.

    Returns:
        The report, in a completed state whether or not there is a regression: the report says which.
    """
    shop = workshop()
    version = find_version(parameters.reference)
    tasks = lm_eval_tasks(parameters)
    prepared = prepare_source(version.manifest, shop.settings) if parameters.lm_eval_on_checkpoint else None
    with version.in_use():
        variants = tuple(measure_again(variant, tasks) for variant in version.variants)
    on_checkpoint = run_lm_eval_on_checkpoint(version, prepared, tasks) if prepared else ()
    report = BenchmarkReport(
        name=version.name, version=version.number, variants=variants, checkpoint_lm_eval=on_checkpoint
    )
    publish_benchmark(report)
    if report.failed:
        raise StageFailed(
            f"{version.reference} could not be measured. {report.faults}",
            "Deploy it again.",
            code="variant-not-measured",
        )
    return Completed(message=report.summary, data=report)


def lm_eval_tasks(parameters: BenchmarkParameters) -> LmEvalTasks:
    """Return the requested tasks after checking them; raises `BadInput`."""
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
    return tasks
