"""The flow `retrain`: from a dataset to a version that takes the champion's place if it is better."""

from typing import Any

from prefect import State, flow
from prefect.states import Completed, Failed

from slmops.flows.deploy import deploy
from slmops.flows.endings import RunEnded
from slmops.flows.promote import promote
from slmops.flows.qualify import DeployEnded
from slmops.infra.storage.names import check_name
from slmops.tasks.build.calibration import write_calibration_file
from slmops.tasks.questions.evaluation_set import read_evaluation
from slmops.tasks.request.declaration import takes
from slmops.tasks.request.gate_limits import named_limits
from slmops.tasks.request.inputs import local_file
from slmops.tasks.request.upkeep_parameters import RetrainParameters
from slmops.tasks.runs.names import run_name
from slmops.tasks.runs.stage import ends_by_its_errors, final_state
from slmops.tasks.training.comparison import (
    RetrainReport,
    champion_of,
    check_comparable,
    compare,
    last_retrain,
    publish_retrain,
    with_approval,
)
from slmops.tasks.training.dataset import read_dataset_once
from slmops.tasks.training.fine_tune import (
    Hyperparameters,
    fine_tune_once,
    key_of,
    only_retrain_of,
    prepare_base,
)
from slmops.tasks.versions.lookup import check_store
from slmops.tasks.workshop import in_workshop, workshop


class RetrainEnded(RunEnded):
    """A retrain whose candidate was rejected, not approved or could not be built; `report` has the details."""

    def __init__(self, report: RetrainReport) -> None:
        super().__init__(report.summary, "The candidate's own report names its figures and failures.")
        self.report = report
        self.exit_code = 1 if report.status == "failed" else 3


@flow(name="retrain", flow_run_name=run_name("retrain-{name}"))
@ends_by_its_errors
@in_workshop
@takes(RetrainParameters)
def retrain(parameters: RetrainParameters) -> State[RetrainReport]:
    """Fine-tune a base, deploy the result as a candidate, and promote it if it is better than the champion.

    Nothing is done when the newest retrain of this name had the same dataset, base and hyperparameters.

    Returns:
        The report, as a completed state (promoted, kept, skipped); a failed one named `Rejected` when the gate rejected
        every variant or nobody approved a better one, and a failed one when none could be built.
    """
    shop = workshop()
    settings, registry = shop.settings, shop.registry
    check_name(parameters.name)
    hyperparameters = Hyperparameters.checked(
        **{field: getattr(parameters, field) for field in Hyperparameters.model_fields}
    )
    check_store()
    with only_retrain_of(parameters.name, settings):
        chats = read_dataset_once(parameters.dataset, settings)
        prepared = prepare_base(parameters.base, parameters.revision, settings)
        rows_file = local_file(parameters.evaluation_file, settings) if parameters.evaluation_file else None
        evaluation = read_evaluation(rows_file, prepared.folder, settings)
        check_comparable(evaluation)
        earlier = last_retrain(parameters.name, key_of(chats, prepared, hyperparameters), registry)
        if earlier and not parameters.force:
            return _ended(publish_retrain(earlier.skipped(), registry))

        checkpoint, tuned = fine_tune_once(chats, prepared, hyperparameters, settings)
        candidate: dict[str, Any] = {
            "checkpoint": checkpoint,
            "name": parameters.name,
            "base": str(prepared.folder) if parameters.method == "lora" else None,
            "evaluation_file": rows_file or str(prepared.folder / "eval.jsonl"),
            "calibration_file": write_calibration_file(chats.rows, evaluation.rows, settings),
            **named_limits(vars(parameters)),
            "training_run": f"dataset sha256:{tuned.dataset_fingerprint[:16]}, fine-tuning {tuned.key[:16]}",
        }
        if parameters.precisions:
            candidate["precisions"] = parameters.precisions
        champion = champion_of(parameters.name, registry)
        result: Any = final_state(deploy, **candidate).result(raise_on_failure=False)
        if isinstance(result, BaseException) and not isinstance(result, DeployEnded):
            raise result
        deployed = result.report if isinstance(result, DeployEnded) else result
        report = compare(deployed, tuned, champion, evaluation, may_promote=parameters.promotion != "never")
        if parameters.approval:
            report = with_approval(report)
        if report.challenge and report.status == "promoted":
            final_state(promote, report.challenge.challenger, report.summary).result()
        return _ended(publish_retrain(report, registry))


def _ended(report: RetrainReport) -> State[RetrainReport]:
    if report.status in ("rejected", "unapproved", "failed"):
        name = "Failed" if report.status == "failed" else "Rejected"
        return Failed(name=name, message=report.summary, data=RetrainEnded(report))
    return Completed(message=report.summary, data=report)
