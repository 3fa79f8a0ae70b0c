"""A requested change of a champion: the new version, the former one, and the reason."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from slmops.infra.errors import BadInput, SlmopsError
from slmops.infra.storage.champions import champion_before
from slmops.infra.storage.names import check_name
from slmops.infra.storage.registry import CANDIDATE, CHAMPION, ModelRegistry
from slmops.infra.storage.version import Variant, Version
from slmops.tasks.runs.stage import stage
from slmops.tasks.versions.refusal import Request, refusal_published
from slmops.tasks.workshop import workshop

PROMOTED = "promoted by hand"
DEPLOYED = "promoted by its deploy"
FIRST = "the first version of its name that can be served"

ChangeKind = Literal["promoted", "rolled back"]


@dataclass(frozen=True)
class Change:
    """A change of the champion: the variant that will serve, the previous champion, and why.

    `is_proven` is true if the run that requests the change has just registered and proven the variant itself.
    """

    variant: Variant
    former: int | None
    reason: str
    rolled_back: bool = False
    is_proven: bool = False

    @property
    def version(self) -> Version:
        """The version that is to become the champion."""
        return self.variant.version

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.version.name

    @property
    def kind(self) -> ChangeKind:
        """The change's kind, as records name it."""
        return "rolled back" if self.rolled_back else "promoted"


def plan_promotion(reference: str, reason: str, registry: ModelRegistry) -> Change:
    """Return the change to `NAME@VERSION` or `NAME@ALIAS`; raises `BadInput` for a version that cannot be promoted."""
    name, at, _ = reference.partition("@")
    check_name(name)
    if not at:
        raise BadInput(
            f"{reference!r} names no version.",
            f"Write, for example, {name}@{CANDIDATE} or {name}@2.",
            code="reference-not-valid",
        )
    variant = registry.find(reference).require_serving()
    return Change(variant, registry.alias(name, CHAMPION), reason.strip() or PROMOTED)


def plan_rollback(name: str, to: int | None, reason: str, registry: ModelRegistry) -> Change:
    """Return the change back to a version, or (None) to the previous champion.

    Raises `BadInput` when there is none to go back to, or it cannot be promoted.
    """
    check_name(name)
    registry.version(name)  # raises if the name has no versions
    champion = registry.alias(name, CHAMPION)
    back_to = champion_before(registry.champion_history(name)) if to is None else to
    if back_to is None:
        present = f"{name}@{champion}" if champion else "any"
        raise BadInput(
            f"No champion of {name} before {present} is known.",
            f"See slmops history {name} and slmops list; name a version with --to.",
            code="no-former-champion",
        )
    versions = {version.number: version for version in registry.versions(name)}
    if back_to not in versions:
        raise BadInput(
            f"{name}@{back_to} is not in the store.",
            f"Use --to with one of {', '.join(map(str, versions))}.",
            code="version-missing",
        )
    replaced = f"{name}@{champion}" if champion else "no champion"
    return Change(
        versions[back_to].require_serving(),
        champion,
        reason.strip() or f"rolled back from {replaced}",
        rolled_back=True,
    )


def promotion_to(reference: str, reason: str) -> Change:
    """See `plan_promotion`; a refusal is published as an artifact."""
    with refusal_published(_request(reference.partition("@")[0], reference, reason)):
        return _promotion_to(reference, reason)


def rollback_of(name: str, to: int | None, reason: str) -> Change:
    """See `plan_rollback`; a refusal is published as an artifact."""
    what = f"rollback of {name}" if to is None else f"{name}@{to}"
    with refusal_published(_request(name, what, reason)):
        return _rollback_of(name, to, reason)


def _request(name: str, what: str, reason: str) -> Request:
    """Return a request of a run; raises `BadInput` for a name that is not valid, of which no artifact can be posted."""
    former = None
    with suppress(SlmopsError):  # the plan reports a store that cannot be read
        former = workshop().registry.alias(check_name(name), CHAMPION)
    return Request(check_name(name), what, reason, former)


@stage("plan promotion", run_name="plan-{reference}")
def _promotion_to(reference: str, reason: str) -> Change:
    return plan_promotion(reference, reason, workshop().registry)


@stage("plan rollback", run_name="plan-rollback-{name}")
def _rollback_of(name: str, to: int | None, reason: str) -> Change:
    return plan_rollback(name, to, reason, workshop().registry)


def plan_deployed(variant: Variant, *, promote: bool) -> Change | None:
    """Return the change that a deploy requests after it has proven a variant; None: its version is only a candidate.

    A name's first version that can be served becomes its champion; a later one only with `promote`. If the version is
    the champion, its serving variant is changed to the chosen one.
    """
    version = variant.version
    former = version.registry.alias(version.name, CHAMPION)
    if former is not None and former != version.number and not promote:
        return None
    return Change(variant, former, FIRST if former is None else DEPLOYED, is_proven=True)
