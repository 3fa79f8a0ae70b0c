"""What a promotion or a rollback did, as a record and as a Prefect artifact."""

from typing import Literal

from prefect.artifacts import create_markdown_artifact

from slmops.infra.records import Record
from slmops.infra.storage.version import Version
from slmops.tasks.foundry.ids import champion_model_id
from slmops.tasks.foundry.proof import Proof
from slmops.tasks.report.blocks import Code, Heading, Paragraph, Text, table
from slmops.tasks.report.markdown import blocks_to_markdown
from slmops.tasks.report.models import post_models
from slmops.tasks.runs.artifacts import shown_in_prefect
from slmops.tasks.runs.assets import champion_asset, record_asset, version_asset
from slmops.tasks.runs.events import CHAMPION_PROMOTED, CHAMPION_ROLLED_BACK, tell
from slmops.tasks.runs.stage import stage
from slmops.tasks.runs.tags import CHAMPION, tag_run
from slmops.tasks.versions.change import Change
from slmops.tasks.workshop import workshop

PromotionStatus = Literal["promoted", "rolled back", "unchanged"]


class Promotion(Record):
    """What a promotion or a rollback did; `servers` counts those that now serve the version.

    `former` is the previous champion, or the version itself if only this machine had to be updated.
    """

    name: str
    version: int
    former: int | None
    status: PromotionStatus
    reason: str
    precision: str
    foundry_model_id: str
    servers: int = 0
    proof: Proof | None = None

    @property
    def reference(self) -> str:
        """`NAME@VERSION`."""
        return f"{self.name}@{self.version}"

    @property
    def summary(self) -> str:
        """One sentence on what happened."""
        if self.status == "unchanged":
            return f"{self.reference} is the champion already; nothing was changed."
        if self.former == self.version:
            done = "was the champion; Foundry Local and the servers are in step with it again"
        else:
            replaced = f"{self.name}@{self.former}" if self.former else "nobody"
            done = f"is the champion, after {replaced}"
        servers = f", and {self.servers} running server{'s' * (self.servers > 1)} took it over" if self.servers else ""
        return f"{self.reference} {done}{servers}."


def outcome(change: Change, status: PromotionStatus, *, proof: Proof | None = None, servers: int = 0) -> Promotion:
    """Return the record of a change that was made, or (`unchanged`) had nothing to do."""
    return Promotion(
        name=change.name,
        version=change.version.number,
        former=change.former,
        status=status,
        reason=change.reason,
        precision=change.variant.precision,
        foundry_model_id=champion_model_id(change.name, change.version.number),
        servers=servers,
        proof=proof,
    )


def promotion_markdown(promotion: Promotion) -> str:
    """Return the Markdown of a promotion's artifact."""
    rows: list[tuple[Text, Text]] = [
        ("champion", promotion.reference),
        ("before", f"{promotion.name}@{promotion.former}" if promotion.former else "-"),
        ("reason", Code(promotion.reason)),
        ("Foundry id", promotion.foundry_model_id),
        ("running servers", str(promotion.servers)),
    ]
    if promotion.proof:
        rows += [("asked", Code(promotion.proof.question)), ("answered", Code(promotion.proof.answer))]
    title = Heading(f"{promotion.reference}: {promotion.status}", 1)
    return blocks_to_markdown([title, Paragraph(promotion.summary), *table(("what", "value"), rows)])


def tell_champion(promotion: Promotion, version: Version) -> None:
    """Emit the event of a changed champion, record its asset, and tag the run, whichever flow changed it."""
    event = CHAMPION_ROLLED_BACK if promotion.status == "rolled back" else CHAMPION_PROMOTED
    reason, former = promotion.reason, promotion.former
    tag_run(CHAMPION)
    tell(event, promotion.name, promotion.reference, promotion.summary, reason=reason, former=former)
    record_asset(champion_asset(version), [version_asset(version)], version=promotion.version, reason=reason)


@stage("publish promotion", run_name="report-{promotion.name}")
def publish_promotion(promotion: Promotion) -> None:
    """Post the promoted version and the reason as a Markdown artifact, and what changed in the table of models."""
    key = f"slmops-promotion-{promotion.name}"
    with shown_in_prefect("The promotion"):
        create_markdown_artifact(markdown=promotion_markdown(promotion), key=key, description=promotion.summary)
    post_models(workshop().registry)
