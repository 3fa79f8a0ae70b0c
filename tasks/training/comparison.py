"""Stage "challenge": a paired test on the same evaluation rows shows whether a new version beats the champion."""

from typing import Literal

from prefect.artifacts import create_markdown_artifact

from slmops.infra.errors import BadInput
from slmops.infra.records import Record, later_field
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.registry import CHAMPION, ModelRegistry
from slmops.infra.storage.version import Version
from slmops.tasks.exams.answers import AnswersExam, decoding_of
from slmops.tasks.exams.estimates import Estimate, mean_score, paired_loss
from slmops.tasks.exams.exam import examine
from slmops.tasks.questions.evaluation_set import EvaluationSet
from slmops.tasks.report.blocks import Block, Heading, Paragraph, Strong, Text, table
from slmops.tasks.report.blocks import Figure as FigureBlock
from slmops.tasks.report.markdown import blocks_to_markdown
from slmops.tasks.report.plots import Plot, draw_losses
from slmops.tasks.report.publish import image_data, link_to_reports
from slmops.tasks.report.records import DeployReport
from slmops.tasks.report.wording import decimal, estimated, percent, signed_percent
from slmops.tasks.runs.artifacts import shown_in_prefect
from slmops.tasks.runs.assets import base_asset, checkpoint_asset, dataset_asset, record_asset
from slmops.tasks.runs.stage import stage
from slmops.tasks.training.fine_tune import FineTuning
from slmops.tasks.versions.approval import Approval, ask_approval
from slmops.tasks.workshop import workshop

RetrainStatus = Literal["promoted", "kept", "rejected", "unapproved", "failed", "skipped"]


class Challenge(Record):
    """The champion and its challenger on the same rows; `gain` is the challenger's score minus the champion's, paired.

    Its interval is one-sided at 95 % on either side (`slmops.tasks.exams.estimates.paired_loss`).
    """

    champion: str
    challenger: str
    rows: int
    champion_score: Estimate
    challenger_score: Estimate
    gain: Estimate

    @property
    def is_won(self) -> bool:
        """Whether the challenger is better beyond noise: the whole interval of its gain is above zero."""
        return self.gain.low > 0

    @property
    def verdict(self) -> str:
        """One sentence with the figures."""
        gain = estimated(self.gain, signed_percent)
        if self.is_won:
            return f"{self.challenger} is better than {self.champion}: {gain} on {self.rows} rows."
        if self.gain.high < 0:
            return f"{self.challenger} is worse than {self.champion}: {gain} on {self.rows} rows."
        return f"{self.challenger} is not shown to be better than {self.champion}: {gain} on {self.rows} rows."


class RetrainReport(Record):
    """The result of a retrain and the reason; `version` is None if none was made.

    `kept` is also the status of a better candidate that a person declined; it is `unapproved` if nobody answered.
    """

    name: str
    status: RetrainStatus
    summary: str
    version: int | None = None
    fine_tuning: FineTuning | None = None
    challenge: Challenge | None = None
    approval: Approval | None = later_field(None)

    def skipped(self) -> "RetrainReport":
        """Return the report of a repeated, skipped request."""
        summary = f"Nothing has changed since {self.name}@{self.version} ({self.status}): skipped."
        return self.model_copy(update={"status": "skipped", "summary": summary})


RETRAIN = Kind("retrain", RetrainReport)


@stage("recall retrain", run_name="recall-{name}")
def last_retrain(name: str, key: str, registry: ModelRegistry) -> RetrainReport | None:
    """Return the report of a name's newest retrain, if its question was the same and its candidate was compared.

    A retrain whose candidate was rejected or could not be built is repeated, because the cause may be gone. One that
    nobody approved asks again.
    """
    if name not in registry.names():
        return None
    for version in reversed(registry.versions(name)):
        own = [envelope for _, envelope in version.envelopes(RETRAIN.name) if envelope.copied_from is None]
        report = version.latest(RETRAIN) if own else None
        if report is not None:
            same = report.fine_tuning is not None and report.fine_tuning.key == key
            return report if same and report.status in ("promoted", "kept") else None
    return None


def check_comparable(evaluation: EvaluationSet) -> None:
    """Raise `BadInput` for rows without expected answers, which the comparison needs."""
    if any(row.expected is None for row in evaluation.rows):
        raise BadInput(
            "There is no evaluation file to compare champion and candidate on.",
            "Name one with --eval, or put an eval.jsonl into the base's folder.",
            code="evaluation-file-not-named",
        )


def compare(
    deployed: DeployReport,
    tuned: FineTuning,
    champion: Version | None,
    evaluation: EvaluationSet,
    *,
    may_promote: bool,
) -> RetrainReport:
    """Compare a candidate with the previous champion, None if there was none.

    With a challenge, the status `promoted` means that the promotion follows; without one, the candidate already is the
    champion.
    """
    report = RetrainReport(
        name=deployed.name, status="kept", summary=deployed.summary, version=deployed.version, fine_tuning=tuned
    )
    if deployed.selected is None:
        status = "rejected" if deployed.status == "rejected" else "failed"
        summary = f"The candidate was rejected: {deployed.summary}"
        return report.model_copy(update={"status": status, "summary": summary})
    challenger = workshop().registry.find(deployed.reference)
    if champion is None:
        summary = f"{challenger.reference} is the first champion of {deployed.name}."
        return report.model_copy(update={"status": "promoted", "summary": summary})
    if champion.reference == challenger.reference:
        summary = f"The result is {champion.reference}, which already is the champion."
        return report.model_copy(update={"summary": summary})
    challenge = challenge_champion(challenger, champion, evaluation)
    if challenge.is_won and may_promote:
        return report.model_copy(update={"challenge": challenge, "summary": challenge.verdict, "status": "promoted"})
    summary = f"{challenge.verdict} {champion.reference} stays the champion."
    return report.model_copy(update={"challenge": challenge, "summary": summary})


def with_approval(report: RetrainReport) -> RetrainReport:
    """Return the report after a person was asked whether its better candidate becomes the champion; see `compare`."""
    if report.challenge is None or report.status != "promoted":
        return report
    approval = ask_approval(workshop().registry.find(report.challenge.challenger), report.summary)
    decided = f"{report.summary} {'It was' if approval.answered else 'But'} {approval.sentence}."
    if approval.given:
        return report.model_copy(update={"approval": approval, "summary": decided})
    status = "kept" if approval.answered else "unapproved"
    summary = f"{decided} {report.challenge.champion} stays the champion."
    return report.model_copy(update={"approval": approval, "summary": summary, "status": status})


@stage("challenge champion", run_name="challenge-{challenger.name}")
def challenge_champion(challenger: Version, champion: Version, evaluation: EvaluationSet) -> Challenge:
    """Let the selected variants of both answer the same rows, and compare their scores row by row.

    Stored answers are reused. Raises `BadInput` for a version without a variant that can serve.
    """
    scores = []
    for version in (champion, challenger):
        exam = AnswersExam(evaluation.decoded_by(decoding_of(version)), compared=False)
        answered = examine.fn(exam, version.require_serving())
        scores.append([row.score or 0.0 for row in answered.rows])
    loss = paired_loss(scores[0], scores[1])
    return Challenge(
        champion=champion.reference,
        challenger=challenger.reference,
        rows=len(evaluation.rows),
        champion_score=mean_score(scores[0]),
        challenger_score=mean_score(scores[1]),
        gain=Estimate(value=-loss.value, low=-loss.high, high=-loss.low),
    )


@stage("find champion", run_name="champion-of-{name}")
def champion_of(name: str, registry: ModelRegistry) -> Version | None:
    """Return the champion of a name, or None."""
    number = registry.alias(name, CHAMPION) if name in registry.names() else None
    return None if number is None else registry.version(name, number)


@stage("publish retrain", run_name="report-{report.name}")
def publish_retrain(report: RetrainReport, registry: ModelRegistry) -> RetrainReport:
    """Keep the report as evidence of its version, and post it as a Markdown artifact with the losses' plot.

    The report of a skipped retrain says why in the artifact; its version has the one of the retrain that was done.
    """
    if report.version is not None and report.status != "skipped":
        version = registry.version(report.name, report.version)
        version.record(RETRAIN, report)
        if report.fine_tuning:
            _record_assets(version, report.fine_tuning)
    plot = draw_losses(report.fine_tuning.losses) if report.fine_tuning else None
    markdown = retrain_markdown(report, plot)
    with shown_in_prefect("The report"):
        create_markdown_artifact(markdown=markdown, key=f"slmops-retrain-{report.name}", description=report.summary)
    return report


def _record_assets(version: Version, tuned: FineTuning) -> None:
    """Record the checkpoint that a version came from as an asset that was made from a dataset and a base."""
    made_from = [dataset_asset(tuned.dataset, tuned.dataset_fingerprint), base_asset(tuned.base, tuned.base_digest)]
    record_asset(checkpoint_asset(version.manifest.source), made_from, rows=tuned.rows, steps=tuned.steps)


def retrain_markdown(report: RetrainReport, plot: Plot | None = None) -> str:
    """Return the report as Markdown."""
    blocks: list[Block] = [Heading(f"{report.name}: retrain {report.status}", 1), Paragraph(Strong(report.summary))]
    if report.version is not None:
        blocks.append(Paragraph(link_to_reports(report.name)))
    if report.challenge:
        found = report.challenge
        rows: list[tuple[Text, ...]] = [
            (found.champion, estimated(found.champion_score, percent)),
            (found.challenger, estimated(found.challenger_score, percent)),
            ("gain, paired", estimated(found.gain, signed_percent)),
        ]
        blocks += [Heading("Champion and challenger"), *table(("version", "score (interval)"), rows)]
    if report.fine_tuning:
        tuned = report.fine_tuning
        figures = [
            ("dataset", f"{tuned.rows} rows of {tuned.dataset}"),
            ("fingerprint", tuned.dataset_fingerprint),
            ("base", tuned.base),
            *((name.replace("_", " "), str(value)) for name, value in tuned.hyperparameters.model_dump().items()),
            ("steps", f"{tuned.steps} (best: {tuned.best_step})"),
            ("held-out loss, nats per token", "-" if tuned.held_out_loss is None else decimal(tuned.held_out_loss)),
            ("time", f"{tuned.seconds:,.0f} s on {tuned.device}"),
        ]
        blocks += [Heading("Fine-tuning"), *table(("what", "value"), figures)]
        if plot:
            blocks.append(FigureBlock(plot.name, plot.alt))
    return blocks_to_markdown(blocks, {plot.name: image_data(plot)} if plot else None)
