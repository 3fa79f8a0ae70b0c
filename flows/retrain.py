"""The flow `retrain`: from a dataset to a version that takes the champion's place if it is better."""

from typing import Any

from prefect import State, flow
from prefect.states import Completed, Failed

from slmops.flows.deploy import deploy
from slmops.flows.endings import RunEnded
from slmops.flows.promote import promote
from slmops.flows.qualify import DeployEnded
from slmops.infra.errors import BadInput
from slmops.infra.storage.manifest import check_name
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.questions.evaluation_set import EvaluationSet, read_evaluation
from slmops.tasks.report.records import DeployReport
from slmops.tasks.request.declaration import takes
from slmops.tasks.request.inputs import local_file
from slmops.tasks.request.parameters import RetrainParameters
from slmops.tasks.runs.stage import ends_by_its_errors
from slmops.tasks.training.comparison import (
    RetrainReport,
    challenge_champion,
    champion_of,
    last_retrain,
    publish_retrain,
)
from slmops.tasks.training.dataset import read_dataset_once
from slmops.tasks.training.fine_tune import (
    FineTuning,
    Hyperparameters,
    fine_tune_once,
    key_of,
    only_retrain_of,
    prepare_base,
)
from slmops.tasks.workshop import open_workshop, workshop


class RetrainEnded(RunEnded):
    """A retrain whose candidate was rejected or could not be built; `report` says what there is."""

    def __init__(self, report: RetrainReport) -> None:
        super().__init__(report.summary, "The candidate's own report names its figures and failures.")
        self.report = report
        self.exit_code = 3 if report.status == "rejected" else 1


@flow(name="retrain", flow_run_name="retrain-{name}")
@ends_by_its_errors
@open_workshop()
@takes(RetrainParameters)
def retrain(parameters: RetrainParameters) -> State[RetrainReport]:
    """Fine-tune a base, deploy the result as a candidate, and promote it if it is better than the champion.

    Nothing is done when the newest retrain of this name had the same dataset, base and hyperparameters.

    Returns:
        The report, as a completed state (promoted, kept, skipped); a failed one named `Rejected` when the gate rejected
        every variant, and a failed one when none could be built.
    """
    shop = workshop()
    settings, registry = shop.settings, shop.registry
    check_name(parameters.name)
    hyperparameters = Hyperparameters.checked(
        method=parameters.method,
        epochs=parameters.epochs,
        learning_rate=parameters.learning_rate,
        batch_size=parameters.batch_size,
        lora_rank=parameters.lora_rank,
        early_stopping_patience=parameters.early_stopping_patience,
        max_length=parameters.max_length,
        seed=parameters.seed,
    )
    registry.objects.check()
    with only_retrain_of(parameters.name, settings):
        chats = read_dataset_once(parameters.dataset, settings)
        prepared = prepare_base(parameters.base, parameters.revision, settings)
        rows_file = local_file(parameters.evaluation_file, settings) if parameters.evaluation_file else None
        evaluation = read_evaluation(rows_file, prepared.folder, settings)
        if any(row.expected is None for row in evaluation.rows):
            raise BadInput(
                "There is no evaluation file to compare champion and candidate on.",
                "Name one with --eval, or put an eval.jsonl into the base's folder.",
            )
        earlier = (
            None
            if parameters.force
            else last_retrain(parameters.name, key_of(chats, prepared, hyperparameters), registry)
        )
        if earlier:
            summary = f"Nothing has changed since {parameters.name}@{earlier.version} ({earlier.status}): skipped."
            return Completed(message=summary, data=earlier.model_copy(update={"status": "skipped", "summary": summary}))

        checkpoint, tuned = fine_tune_once(chats, prepared, hyperparameters, settings)
        candidate: dict[str, Any] = {
            "checkpoint": checkpoint,
            "name": parameters.name,
            "base": prepared.uri if parameters.method == "lora" else None,
            "evaluation_file": rows_file or str(prepared.folder / "eval.jsonl"),
            "training_run": f"dataset sha256:{tuned.dataset_fingerprint[:16]}, fine-tuning {tuned.key[:16]}",
        }
        if parameters.precisions:
            candidate["precisions"] = parameters.precisions
        before = champion_of(parameters.name, registry)
        result: Any = deploy(**candidate, return_state=True).result(raise_on_failure=False)
        if isinstance(result, BaseException) and not isinstance(result, DeployEnded):
            raise result
        deployed = result.report if isinstance(result, DeployEnded) else result
        report = judged(
            deployed, tuned, before.reference if before else None, evaluation, parameters.promotion, registry
        )
        return _ended(publish_retrain(report, registry))


def judged(
    deployed: DeployReport,
    tuned: FineTuning,
    champion: str | None,
    evaluation: EvaluationSet,
    promotion: str,
    registry: ModelRegistry,
) -> RetrainReport:
    """Compare a candidate with the champion before it, and promote it if it is better."""
    report = RetrainReport(
        name=deployed.name, status="kept", summary=deployed.summary, version=deployed.version, fine_tuning=tuned
    )
    if deployed.selected is None:
        status = "rejected" if deployed.status == "rejected" else "failed"
        return report.model_copy(
            update={"status": status, "summary": f"The candidate was kept out: {deployed.summary}"}
        )
    challenger = registry.version(deployed.name, deployed.version)
    if champion is None:
        summary = f"{challenger.reference} is the first champion of {deployed.name}."
        return report.model_copy(update={"status": "promoted", "summary": summary})
    if champion == challenger.reference:
        return report.model_copy(update={"summary": f"The result is {champion}, which is the champion already."})
    challenge = challenge_champion(challenger, registry.find(champion).manifest, evaluation, registry)
    report = report.model_copy(update={"challenge": challenge, "summary": challenge.verdict})
    if not challenge.is_won or promotion == "never":
        kept = f"{challenge.verdict} {champion} stays the champion."
        return report.model_copy(update={"summary": kept})
    promote(challenger.reference, challenge.verdict)
    return report.model_copy(update={"status": "promoted"})


def _ended(report: RetrainReport) -> State[RetrainReport]:
    if report.status in ("rejected", "failed"):
        name = "Rejected" if report.status == "rejected" else "Failed"
        return Failed(name=name, message=report.summary, data=RetrainEnded(report))
    return Completed(message=report.summary, data=report)
