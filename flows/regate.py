"""The flow `regate`: judge a stored version again, without building it."""

from prefect import State, flow

from slmops.flows.qualify import Gate, Qualification, ended, needs_source, qualify
from slmops.infra.errors import BadInput
from slmops.tasks.checkpoint.preparation import prepare_source
from slmops.tasks.exams.answers import last_evaluation_set
from slmops.tasks.exams.text import read_text
from slmops.tasks.questions.evaluation_set import read_evaluation
from slmops.tasks.report.records import DeployReport
from slmops.tasks.request.budget import parse_budget
from slmops.tasks.request.declaration import takes
from slmops.tasks.request.inputs import local_file
from slmops.tasks.request.parameters import RegateParameters
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.versions.commit import last_budget
from slmops.tasks.workshop import open_workshop, workshop


@flow(name="regate", flow_run_name="regate-{reference}")
@ends_by_its_errors
@open_workshop()
@takes(RegateParameters)
def regate(parameters: RegateParameters) -> State[DeployReport]:
    """Judge a stored version by other thresholds or rows, and register or unregister its variants accordingly.

    Returns:
        The report, in the states that `deploy` ends in.
    """
    shop = workshop()
    settings, registry = shop.settings, shop.registry
    evaluation_file, output_schema_file, text_file = (
        local_file(text, settings) if text else None
        for text in (parameters.evaluation_file, parameters.output_schema_file, parameters.text_file)
    )
    manifest = registry.find(parameters.reference).manifest
    limits = last_budget(registry.of(manifest)) if parameters.budget is None else parameters.budget
    parse_budget(limits)
    form = {
        "scorer": parameters.scorer,
        "output_schema_file": output_schema_file,
        "output_regex": parameters.output_regex,
    }
    if evaluation_file is None and any(form.values()):
        raise BadInput("A scorer or an output format is named without an evaluation file.", "Name its file too.")
    evaluation = last_evaluation_set(manifest, registry) if evaluation_file is None else None
    if evaluation is None:
        evaluation = read_evaluation(evaluation_file, None, settings, **form)
    text = read_text(text_file) if text_file else None
    version = Qualification(
        manifest=manifest,
        prepared=prepare_source(manifest, settings) if needs_source(manifest, evaluation, text) else None,
        evaluation=evaluation,
        text=text,
        gate=Gate(parameters.min_top1_agreement, parameters.max_kl_divergence, parameters.max_quality_loss),
        budget=limits,
        description=str((registry.latest_evidence(manifest, "deploy") or {}).get("description", "")),
        promote=False,
        registry=registry,
        settings=settings,
    )
    return ended(qualify(version, [], ()))
