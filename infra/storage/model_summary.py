"""A model in a few facts: its champion, candidate and newest version, and what serves with which figures."""

from dataclasses import dataclass

from slmops.infra.errors import SlmopsError
from slmops.infra.storage.evidence import DEPLOY
from slmops.infra.storage.registry import CANDIDATE, CHAMPION, ModelRegistry


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
    serving, deploys = version.serving, version.records(DEPLOY)
    judged = deploys[-1].value.variant(serving.precision) if serving and deploys else None
    metrics = judged.metrics if judged else {}
    return ModelSummary(
        name,
        champion=aliases.get(CHAMPION),
        candidate=aliases.get(CANDIDATE),
        newest=versions[-1].number,
        precision=serving.precision if serving else None,
        size_bytes=serving.size_bytes if serving else None,
        ttft_ms=metrics.get("ttft_ms"),
        score=metrics.get("score", metrics.get("exact_match")),
        deployed_at=deploys[-1].at if deploys else None,
    )
