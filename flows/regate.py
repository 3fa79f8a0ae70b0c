"""The flow `regate`: judge a stored version again, without building it."""

from prefect import State, flow

from slmops.flows.qualify import ended, qualify
from slmops.tasks.checkpoint.preparation import prepare_source
from slmops.tasks.choices import CHOICES
from slmops.tasks.environment.checks import check_runs_here
from slmops.tasks.report.records import DeployReport
from slmops.tasks.request.declaration import takes
from slmops.tasks.request.gate_limits import with_limits
from slmops.tasks.request.parameters import RegateParameters
from slmops.tasks.runs.names import run_name
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.versions.lookup import find_version
from slmops.tasks.versions.qualification import needs_source
from slmops.tasks.versions.regate_request import request_again
from slmops.tasks.workshop import in_workshop, working_by, workshop


@flow(name="regate", flow_run_name=run_name("regate-{reference}"))
@ends_by_its_errors
@in_workshop
@takes(RegateParameters, CHOICES)
def regate(parameters: RegateParameters) -> State[DeployReport]:
    """Judge a stored version by other thresholds or rows, and register or unregister its variants accordingly.

    Returns:
        The report, in the states that `deploy` ends in.
    """
    version = find_version(parameters.reference)
    check_runs_here(version)
    with working_by(with_limits(workshop().settings, vars(parameters))) as shop:
        asked = request_again(parameters, version)
        prepared = prepare_source(version.manifest, shop.settings) if needs_source(asked, version) else None
        return ended(qualify(asked, version, prepared))
