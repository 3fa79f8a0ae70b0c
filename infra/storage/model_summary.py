"""A model in a few facts: its champion, candidate and newest version, and what serves with which figures."""

from dataclasses import asdict, dataclass

from slmops.infra.errors import SlmopsError
from slmops.infra.storage.evidence import DEPLOY
from slmops.infra.storage.registry import CANDIDATE, CHAMPION, ModelRegistry
from slmops.infra.storage.version import Version


@dataclass(frozen=True)
class ModelSummary:
    """The facts on a model. Precision, size and figures are those of the champion, without one of the newest version.

    `fault` says why the model cannot be read; the other facts are missing then.
    """

    name: str
    champion: int | None = None
    candidate: int | None = None
    newest: int | None = None
    precision: str | None = None
    size_bytes: int | None = None
    ttft_ms: float | None = None
    score: float | None = None
    deployed_at: str | None = None
    fault: str = ""


@dataclass(frozen=True)
class Figures:
    """A version's serving variant and its figures, as its last deploy or regate recorded them."""

    precision: str | None = None
    size_bytes: int | None = None
    ttft_ms: float | None = None
    score: float | None = None
    deployed_at: str | None = None


def summarize_models(registry: ModelRegistry) -> list[ModelSummary]:
    """Return the facts on every model that has a version; one that cannot be read does not hide the others."""
    found = []
    for name in registry.names():
        try:
            found += [summarize(registry, name)] if registry.versions(name) else []
        except SlmopsError as error:
            found.append(ModelSummary(name, fault=error.message))
    return found


def summarize(registry: ModelRegistry, name: str) -> ModelSummary:
    """Return the facts on a model with at least one version; raises what reading the store does."""
    aliases, versions = registry.aliases(name), registry.versions(name)
    version = registry.version(name, aliases[CHAMPION]) if CHAMPION in aliases else versions[-1]
    return ModelSummary(
        name,
        champion=aliases.get(CHAMPION),
        candidate=aliases.get(CANDIDATE),
        newest=versions[-1].number,
        **asdict(figures_of(version)),
    )


def figures_of(version: Version) -> Figures:
    """Return a version's figures; raises what reading the store does."""
    serving, deploys = version.serving, version.records(DEPLOY)
    judged = deploys[-1].value.variant(serving.precision) if serving and deploys else None
    metrics = judged.metrics if judged else {}
    return Figures(
        precision=serving.precision if serving else None,
        size_bytes=serving.size_bytes if serving else None,
        ttft_ms=metrics.get("ttft_ms"),
        score=metrics.get("score", metrics.get("exact_match")),
        deployed_at=deploys[-1].at if deploys else None,
    )
