"""Stage "promote": another version becomes the champion, in Foundry Local, on running servers and in the store.

The alias is changed last, so that it decides: whatever a process that was killed left behind, the next promotion puts
in step with it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from prefect.artifacts import create_markdown_artifact
from pydantic import BaseModel, ConfigDict, ValidationError

from slmops.infra.errors import BadInput, SlmopsError, StageFailed
from slmops.infra.foundry.model_folder import MODEL_CARD, model_folder
from slmops.infra.foundry.server_client import RunningServer, running_servers
from slmops.infra.settings import Settings
from slmops.infra.storage.champions import champion_before
from slmops.infra.storage.manifest import Manifest, StoredVariant, check_name
from slmops.infra.storage.registry import CANDIDATE, CHAMPION, ModelRegistry
from slmops.tasks.exams.answers import last_evaluation_set
from slmops.tasks.foundry.registration import (
    Proof,
    altered_in_foundry,
    champion_model_id,
    last_proof,
    registered_models,
    set_champion_ids,
)
from slmops.tasks.report.blocks import Code, Heading, Paragraph, Text, table
from slmops.tasks.report.markdown import blocks_to_markdown
from slmops.tasks.report.model_card import base_model_of, model_card
from slmops.tasks.report.records import VariantReport
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.versions.commit import SELECTION

PROMOTED = "promoted by hand"

PromotionStatus = Literal["promoted", "rolled back", "unchanged"]


@dataclass(frozen=True)
class Change:
    """The version that is to become the champion, its selected variant, the champion before it, and why."""

    manifest: Manifest
    variant: StoredVariant
    former: int | None
    reason: str
    rolled_back: bool

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.manifest.name

    @property
    def kind(self) -> PromotionStatus:
        """What it is called when it is done."""
        return "rolled back" if self.rolled_back else "promoted"


class Promotion(BaseModel):
    """What a promotion or a rollback did; `servers` counts those that took the version over.

    `former` is the champion before; it is the version itself where only this machine had to be brought in step.
    """

    model_config = ConfigDict(frozen=True)

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
            held = f"{self.name}@{self.former}" if self.former else "nobody"
            done = f"is the champion, after {held}"
        servers = f", and {self.servers} running server{'s' * (self.servers > 1)} took it over" if self.servers else ""
        return f"{self.reference} {done}{servers}."


def plan_promotion(reference: str, reason: str, registry: ModelRegistry) -> Change:
    """Return the change that `NAME@VERSION` or `NAME@ALIAS` asks for; raises `BadInput` for what cannot be promoted."""
    name, at, _ = reference.partition("@")
    check_name(name)
    if not at:
        raise BadInput(f"{reference!r} names no version.", f"Write, for example, {name}@{CANDIDATE} or {name}@2.")
    manifest = registry.find(reference)
    return _change(manifest, reason.strip() or PROMOTED, registry, rolled_back=False)


def plan_rollback(name: str, to: int | None, reason: str, registry: ModelRegistry) -> Change:
    """Return the change back to a version, or (None) to the one that was champion before the present one.

    Raises `BadInput` when there is none to go back to, or it cannot be promoted.
    """
    check_name(name)
    registry.version(name)  # the name has versions, or it is said what there is
    champion = registry.alias(name, CHAMPION)
    back_to = champion_before(registry.champion_history(name)) if to is None else to
    if back_to is None:
        present = f"{name}@{champion}" if champion else "any"
        raise BadInput(
            f"There is nothing to go back to: no champion of {name} before {present} is known.",
            f"See slmops history {name} and slmops list; name a version with --to.",
        )
    if back_to not in {one.version for one in registry.versions(name)}:
        known = ", ".join(str(one.version) for one in registry.versions(name))
        raise BadInput(
            f"{name}@{back_to} is not in the store any more, or never was.", f"Use --to with one of {known}."
        )
    held = f"{name}@{champion}" if champion else "no champion"
    return _change(
        registry.version(name, back_to), reason.strip() or f"rolled back from {held}", registry, rolled_back=True
    )


def _change(manifest: Manifest, reason: str, registry: ModelRegistry, *, rolled_back: bool) -> Change:
    variant = promotable_variant(manifest, registry)
    return Change(manifest, variant, registry.alias(manifest.name, CHAMPION), reason, rolled_back)


def promotable_variant(manifest: Manifest, registry: ModelRegistry) -> StoredVariant:
    """Return the variant that serves when a version is the champion: selected, passed and registered.

    Raises `BadInput` for a version without one.
    """
    selected = (registry.latest_evidence(manifest, SELECTION) or {}).get("selected")
    deployed = registry.latest_evidence(manifest, "deploy") or {}
    statuses = {one["precision"]: one["status"] for one in deployed.get("variants", ())}
    if selected is None or statuses.get(selected) != "registered":
        told = ", ".join(f"{precision} {status}" for precision, status in statuses.items()) or "never judged"
        raise BadInput(
            f"{manifest.reference} has no variant that passed and was selected ({told}).",
            f"Judge it with slmops regate {manifest.reference}; slmops show tells what is on record.",
        )
    return manifest.variant(selected)


def recorded_proof(change: Change, registry: ModelRegistry) -> tuple[Any, Proof]:
    """Return the evaluation row and the proof that are on record of a change's variant; raises `BadInput`."""
    evaluation = last_evaluation_set(change.manifest, registry)
    row = evaluation.rows[0] if evaluation else None
    proof = last_proof(change.manifest, change.variant, row, registry) if row else None
    if row is None or proof is None:
        raise BadInput(
            f"{change.manifest.reference} {change.variant.precision} has no proof on record that can be repeated.",
            f"Prove it with slmops regate {change.manifest.reference}.",
        )
    return row, proof


def card_of(change: Change, registry: ModelRegistry, settings: Settings) -> tuple[str, str]:
    """Return a variant's description and model card as its deploy wrote them."""
    manifest, precision = change.manifest, change.variant.precision
    deployed = registry.latest_evidence(manifest, "deploy") or {}
    description = str(deployed.get("description", ""))
    written = model_folder(settings.foundry_dir, change.name, precision, manifest.version) / MODEL_CARD
    if written.is_file():
        return description, written.read_text("utf-8")
    try:
        report = next(
            VariantReport.model_validate(one) for one in deployed["variants"] if one["precision"] == precision
        )
    except ValidationError:  # another version of slmops has recorded it
        return description, f"# {manifest.reference} {precision}\n"
    evaluation = str(deployed.get("evaluation", ""))
    base_model = base_model_of(manifest.source.origin)
    card = model_card(manifest, report, evaluation=evaluation, description=description, base_model=base_model)
    return description, card


def outcome(change: Change, status: PromotionStatus, *, proof: Proof | None = None, servers: int = 0) -> Promotion:
    """Return the record of a change that was made, or (`unchanged`) had nothing to do."""
    return Promotion(
        name=change.name,
        version=change.manifest.version,
        former=change.former,
        status=status,
        reason=change.reason,
        precision=change.variant.precision,
        foundry_model_id=champion_model_id(change.name, change.manifest.version),
        servers=servers,
        proof=proof,
    )


# What a change touches on this machine


@dataclass(frozen=True)
class Present:
    """What serves under a name on this machine now: the versions that Foundry Local has as `NAME:VERSION`, each with
    its variant, and the running servers that serve the name, each with its version."""

    registered: tuple[tuple[Manifest, StoredVariant], ...]
    servers: tuple[tuple[RunningServer, int], ...]

    def is_in_step_with(self, change: Change) -> bool:
        """Whether a change has nothing to do."""
        return (
            change.former == change.manifest.version
            and [(one.version, variant.precision) for one, variant in self.registered]
            == [(change.manifest.version, change.variant.precision)]
            and all(version == change.manifest.version for _, version in self.servers)
        )


@stage("look at what serves", run_name="present-{name}")
def look_at_present(name: str, registry: ModelRegistry, settings: Settings) -> Present:
    """Find what serves under a name; raises `StageFailed` for a running server that does not answer."""
    found = {one["version"]: one["folder"] for one in registered_models(settings) if one["name"] == name}
    registered = [
        (manifest, variant)
        for manifest in registry.versions(name)
        for variant in manifest.variants
        if found.get(manifest.version)
        == str(model_folder(settings.foundry_dir, name, variant.precision, manifest.version))
    ]
    servers = running_servers(settings.home_dir, settings.timeout.foundry_s)
    serving = [(server, version) for server in servers if (version := server.serves(name)) is not None]
    return Present(tuple(registered), tuple(serving))


@stage("check files", run_name="check-files-{change.name}")
def check_files(change: Change, settings: Settings) -> None:
    """Raise `StageFailed` when a variant's folder in Foundry's cache is not what the version's manifest says."""
    with stage_progress(f"check {change.variant.precision}"):
        altered = altered_in_foundry(change.manifest, change.variant, settings)
    if altered:
        raise StageFailed(
            f"{', '.join(altered)} of {change.manifest.reference} {change.variant.precision} was altered.",
            f"See slmops verify {change.manifest.reference}, and --repair where another copy is whole.",
        )


@stage("hand over", run_name="hand-over-{change.name}")
def hand_over(server: RunningServer, change: Change) -> None:
    """Let a running server serve the new version; raises `StageFailed` with the server's reason."""
    with stage_progress(f"hand over {server.url}"):
        server.hand_over(change.name, change.manifest.version, change.variant.precision)


@stage("hand servers over", run_name="hand-over-{manifest.name}")
def hand_servers_over(manifest: Manifest, variant: StoredVariant, settings: Settings) -> tuple[str, ...]:
    """Let the running servers of a name serve its champion; returns a sentence on each that does not."""
    told = []
    try:
        servers = running_servers(settings.home_dir, settings.timeout.foundry_s)
    except StageFailed as error:
        return (str(error),)
    for server in servers:
        try:
            if server.serves(manifest.name) is not None:
                server.hand_over(manifest.name, manifest.version, variant.precision)
        except StageFailed as error:
            told.append(f"{error.message} It goes on as before: slmops promote {manifest.reference} tries again.")
    return tuple(told)


@stage("set champion", run_name="champion-{change.name}")
def set_champion(change: Change, registry: ModelRegistry) -> None:
    """Point the alias to the new champion, which is in its history from then on; a candidate is none any more.

    Raises `StageFailed` when someone else has changed the champion since this change was planned.
    """
    name, version = change.name, change.manifest.version
    present = registry.alias(name, CHAMPION)
    if present != change.former:
        raise StageFailed(
            f"Meanwhile {f'{name}@{present}' if present else 'nobody'} became the champion.",
            f"See slmops history {name}, and try again.",
        )
    if present != version:
        registry.set_alias(name, CHAMPION, version, change.reason, rolled_back=change.rolled_back)
    if registry.alias(name, CANDIDATE) == version:
        registry.remove_alias(name, CANDIDATE)


# Undoing


@dataclass
class Undo:
    """What has to be done to put everything back, one step before each change that it undoes."""

    steps: list[tuple[str, Callable[[], Any]]] = field(default_factory=list)

    def add(self, what: str, step: Callable[[], Any]) -> None:
        """Add a step; it may run although its change was made in part or not at all."""
        self.steps.append((what, step))

    def run(self) -> list[str]:
        """Put everything back, the last change first, and return what could not be."""
        left = []
        while self.steps:
            what, step = self.steps.pop()
            try:
                step()
            except SlmopsError as error:
                left.append(f"{what} ({error.message.rstrip('.')})")
        return left


@contextmanager
def all_or_nothing(change: Change) -> Iterator[Undo]:
    """Undo what was changed when anything fails or the run is cancelled; the error then says who is champion."""
    undo = Undo()
    try:
        yield undo
    except SlmopsError as error:
        raise type(error)(*_refusal(change, error, undo.run())) from error
    except BaseException:  # Ctrl-C, a cancelled run
        undo.run()
        raise


def _refusal(change: Change, error: SlmopsError, left: Sequence[str]) -> tuple[str, str]:
    held = f"{change.name}@{change.former} still is the champion" if change.former else "There still is no champion"
    message = f"{change.manifest.reference} was not promoted: {error.message} {held}."
    if not left:
        return message, error.what_to_do
    again = f"slmops promote {change.name}@{change.former}" if change.former else "slmops unregister"
    return f"{message} Not put back: {'; '.join(left)}.", f"Put it in step with {again}. {error.what_to_do}".strip()


def restore_alias(change: Change, registry: ModelRegistry) -> None:
    """Let the former champion be it again, where this change had made another one."""
    name, version = change.name, change.manifest.version
    if change.former != version and registry.alias(name, CHAMPION) == version:
        reason = f"the promotion of {change.manifest.reference} did not end"
        if change.former is None:
            registry.remove_alias(name, CHAMPION, reason)
        else:
            registry.set_alias(name, CHAMPION, change.former, reason, rolled_back=True)


def restore_foundry(change: Change, present: Present, settings: Settings) -> None:
    """Register under the plain name what was registered before, and nothing else."""
    set_champion_ids(change.name, present.registered, settings)


def hand_back(server: RunningServer, change: Change, version: int, registry: ModelRegistry) -> None:
    """Let a server serve what it served before; raises `StageFailed` when it then serves something else."""
    try:
        former = registry.version(change.name, version)
        server.hand_over(change.name, version, promotable_variant(former, registry).precision)
    except SlmopsError:
        if server.serves(change.name) != version:  # one that refused the new version has nothing to give back
            raise


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


@stage("publish promotion", run_name="report-{promotion.name}")
def publish_promotion(promotion: Promotion) -> None:
    """Post what was promoted and why as a Markdown artifact."""
    key = f"slmops-promotion-{promotion.name}"
    create_markdown_artifact(markdown=promotion_markdown(promotion), key=key, description=promotion.summary)
