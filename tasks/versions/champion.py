"""Stage "promote": another version becomes the champion, in Foundry Local, on running servers and in the store.

Every change (by promote, rollback, retrain, a deploy or a first version) uses this module. The alias is changed last
and is authoritative. After a killed process, running servers return to it, and every command names the promotion that
brings the rest in line with it (`slmops.infra.foundry.interruption`).
"""

from dataclasses import dataclass
from functools import partial

from pydantic import ValidationError

from slmops.infra.errors import BadInput, SlmopsError, StageFailed
from slmops.infra.foundry.interruption import clear_mark, mark_change
from slmops.infra.foundry.model_folder import INFERENCE_MODEL, MODEL_CARD, model_folder
from slmops.infra.foundry.server_client import RunningServer, running_servers
from slmops.infra.process.slots import slot
from slmops.infra.settings import Settings
from slmops.infra.storage.champion_lease import champion_lease
from slmops.infra.storage.registry import CANDIDATE, CHAMPION
from slmops.infra.storage.version import Variant, Version
from slmops.tasks.exams.answers import last_evaluation_set
from slmops.tasks.foundry.ids import folder_of
from slmops.tasks.foundry.proof import Proof, last_proof, repeat_proof
from slmops.tasks.foundry.registration import (
    register_champion,
    register_variant,
    registered_models,
    set_champion_ids,
    unregister_variant,
)
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.report.model_card import base_model_of, model_card
from slmops.tasks.report.records import VariantReport
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.versions.change import Change, plan_deployed
from slmops.tasks.versions.promotion import Promotion, outcome, tell_champion
from slmops.tasks.versions.refusal import Request, refusal_published
from slmops.tasks.versions.undo import Undo, all_or_nothing, hand_back, restore_alias


class ChampionChanged(StageFailed):
    """Another process has changed the champion since a change was planned."""


@dataclass(frozen=True)
class Standing:
    """The standing of a deployed version: the Foundry id of the champion, or None; and the error that prevented it."""

    foundry_model_id: str | None = None
    refusal: SlmopsError | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """The refusal, in the report's form."""
        return (str(self.refusal),) if self.refusal else ()


def settle_champion(variant: Variant, settings: Settings, *, promote: bool) -> Standing:
    """Make the version of a variant that was just proven the champion if requested, else the candidate.

    A refused change leaves the store, Foundry Local and the servers unchanged. The error is returned, so that the
    report is published before the run ends with it.
    """
    change = choose_champion(variant, promote=promote)
    if change is None:
        return Standing()
    try:
        return Standing(change_champion(change, settings).foundry_model_id)
    except ChampionChanged as error:
        if promote:
            return Standing(refusal=error)
        name_candidate(variant.version)  # of two concurrent first versions, only one becomes the champion
        return Standing()
    except SlmopsError as error:
        return Standing(refusal=error)


def change_champion(change: Change, settings: Settings) -> Promotion:
    """Prove a version, make it serve, and make it the champion; if a step fails, undo all of them.

    All machines of a store together make one change of a name at a time; another one waits. A change that is refused is
    published as an artifact. Raises `ChampionChanged` if another process was faster.
    """
    request = Request(change.name, change.version.reference, change.reason, change.former)
    with refusal_published(request), slot(settings.cache_dir / "promotions" / change.name, 1):
        return _change_alone(change, settings)


def _change_alone(change: Change, settings: Settings) -> Promotion:
    objects, what = change.version.registry.objects, f"promotion of {change.version.reference}"
    with stage_progress(what) as on_progress, champion_lease(objects, change.name, what, on_progress) as lease:
        present = look_at_present(change, settings)
        if present.is_in_step_with(change):
            clear_mark(settings.home_dir, change.name)
            return outcome(change, "unchanged")
        mark_change(settings.home_dir, change.name, change.version.number)
        with change.version.in_use(), all_or_nothing(change, partial(clear_mark, settings.home_dir)) as undo:
            proof = None if change.is_proven else prove_again(change, undo, settings)
            undo.add("Foundry Local", partial(set_champion_ids, change.name, present.registered, settings))
            register_champion(change.variant, settings)
            for server, version in present.servers:
                undo.add(server.url, partial(hand_back, server, change, version))
                hand_over(server, change)
            lease.check()
            undo.add("the alias", partial(restore_alias, change))
            set_champion(change)
    promotion = outcome(change, change.kind, proof=proof, servers=len(present.servers))
    tell_champion(promotion, change.version)
    return promotion


@dataclass(frozen=True)
class RecordedProof:
    """The stored facts on a variant: the evaluation row of its proof, the proof, its description and model card."""

    row: EvaluationRow
    proof: Proof
    description: str
    card: str


def prove_again(change: Change, undo: Undo, settings: Settings) -> Proof:
    """Register a variant if needed, compare its files with the manifest, and repeat its proof.

    Raises `BadInput` if no proof is stored, and `StageFailed` if it gives another answer.
    """
    variant = change.variant
    recorded = recall_proof(change, settings)
    if recorded is None:
        raise BadInput(
            f"{change.version.reference} {variant.precision} has no recorded proof that can be repeated.",
            f"Prove it with slmops regate {change.version.reference}.",
            code="version-not-proven",
        )
    registration = register_variant(variant, recorded.description, recorded.card, settings)
    if registration.changed:
        undo.add(registration.model_id, partial(unregister_variant, variant, settings))
    check_files(change, settings)
    return repeat_proof(variant, recorded.row, recorded.proof, settings)


@dataclass(frozen=True)
class Present:
    """The present state of a name on this machine.

    These are the versions that Foundry Local has as `NAME:VERSION`, each with its variant, and the running servers that
    serve the name, each with its version.
    """

    registered: tuple[Variant, ...]
    servers: tuple[tuple[RunningServer, int], ...]

    def is_in_step_with(self, change: Change) -> bool:
        """Whether the present state already is the result of a change."""
        return (
            change.former == change.version.number
            and [(variant.version.number, variant.precision) for variant in self.registered]
            == [(change.version.number, change.variant.precision)]
            and all(version == change.version.number for _, version in self.servers)
        )


@stage("choose champion", run_name="choose-champion-{variant.version.name}")
def choose_champion(variant: Variant, *, promote: bool) -> Change | None:
    """Return the change that makes a version the champion; a version that does not become it is the candidate."""
    change = plan_deployed(variant, promote=promote)
    if change is None:
        name_candidate.fn(variant.version)
    return change


@stage("name candidate", run_name="candidate-{version.name}")
def name_candidate(version: Version) -> None:
    """Point the alias of candidates to this version."""
    champion = version.registry.alias(version.name, CHAMPION)
    version.registry.set_alias(version.name, CANDIDATE, version.number, f"deployed while {champion} was the champion")


@stage("look at what serves", run_name="present-{change.name}")
def look_at_present(change: Change, settings: Settings) -> Present:
    """Return the present state of a name.

    Raises `StageFailed` for a running server that does not answer, and `ChampionChanged`.
    """
    name, registry = change.name, change.version.registry
    if registry.alias(name, CHAMPION) != change.former:
        raise _overtaken(change)
    found = {model.version: model.folder for model in registered_models(settings) if model.name == name}
    registered = [
        variant
        for version in registry.versions(name)
        for variant in version.variants
        if found.get(version.number) == str(folder_of(variant, settings))
    ]
    servers = running_servers(settings.home_dir, settings.timeout.foundry_s)
    serving = [(server, version) for server in servers if (version := server.serves(name)) is not None]
    return Present(tuple(registered), tuple(serving))


@stage("recall proof", run_name="recall-proof-{change.name}")
def recall_proof(change: Change, settings: Settings) -> RecordedProof | None:
    """Return the stored facts on a variant; None if there is no proof that can be repeated."""
    version = change.version
    evaluation = last_evaluation_set(version)
    row = evaluation.proof_row if evaluation else None
    proof = last_proof(change.variant, row) if row else None
    return RecordedProof(row, proof, *_card_of(change, settings)) if row and proof else None


def _card_of(change: Change, settings: Settings) -> tuple[str, str]:
    """Return a variant's description and model card as its deploy wrote them."""
    version, precision = change.version, change.variant.precision
    deployed = version.deployed
    written = model_folder(settings.foundry_dir, change.name, precision, version.number) / MODEL_CARD
    if written.is_file():
        return deployed.description, written.read_text("utf-8")
    recorded = deployed.variant(precision)
    try:
        report = VariantReport.model_validate(recorded and recorded.model_dump(exclude_unset=True))
    except ValidationError:  # another version of slmops recorded it
        return deployed.description, f"# {version.reference} {precision}\n"
    card = model_card(
        version.manifest,
        report,
        evaluation=deployed.evaluation,
        description=deployed.description,
        base_model=base_model_of(version.manifest.source.origin),
    )
    return deployed.description, card


@stage("check files", run_name="check-files-{change.name}")
def check_files(change: Change, settings: Settings) -> None:
    """Raise `StageFailed` if a variant's folder in Foundry's cache differs from the version's manifest."""
    with stage_progress(f"check {change.variant.precision}"):
        folder = folder_of(change.variant, settings)
        altered = change.variant.altered_in(folder, without=(INFERENCE_MODEL, MODEL_CARD))
    if altered:
        raise StageFailed(
            f"{', '.join(altered)} of {change.version.reference} {change.variant.precision} was altered.",
            f"Run slmops verify {change.version.reference}; --repair restores files from an intact copy.",
        )


@stage("hand over", run_name="hand-over-{change.name}")
def hand_over(server: RunningServer, change: Change) -> None:
    """Make a running server serve the new version; raises `StageFailed` with the server's reason."""
    with stage_progress(f"hand over {server.url}"):
        server.hand_over(change.name, change.version.number, change.variant.precision)


@stage("set champion", run_name="champion-{change.name}")
def set_champion(change: Change) -> None:
    """Point the alias to the new champion, and add it to the history; it is no longer a candidate.

    Raises `ChampionChanged`.
    """
    name, version, registry = change.name, change.version.number, change.version.registry
    is_champion = registry.alias(name, CHAMPION) == version or registry.replace_champion(
        name, version, change.former, change.reason, rolled_back=change.rolled_back
    )
    if not is_champion:
        raise _overtaken(change)
    if registry.alias(name, CANDIDATE) == version:
        registry.remove_alias(name, CANDIDATE)


def _overtaken(change: Change) -> ChampionChanged:
    present = change.version.registry.alias(change.name, CHAMPION)
    return ChampionChanged(
        f"Meanwhile {f'{change.name}@{present}' if present else 'nobody'} became the champion.",
        f"See slmops history {change.name}, and try again.",
        code="champion-changed-meanwhile",
    )
