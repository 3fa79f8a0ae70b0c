"""The artifact `slmops-models`: all models of the store, their champions and candidates, and how they were judged."""

from prefect.artifacts import create_table_artifact

from slmops.infra.storage.evidence import DEPLOY, DamagedEvidence
from slmops.infra.storage.registry import CANDIDATE, CHAMPION, ModelRegistry
from slmops.tasks.report.wording import decimal, megabytes, percent

KEY = "slmops-models"


def post_models(registry: ModelRegistry) -> None:
    """Renew the artifact. Every stage that publishes a change of a version's standing does it."""
    create_table_artifact(table=model_rows(registry), key=KEY, description="All models of the store")


def model_rows(registry: ModelRegistry) -> list[dict[str, object]]:
    """Return one row a model. The figures are those of the champion, or of the newest version if there is none."""
    return [dict(_row(registry, name)) for name in registry.names()]


def _row(registry: ModelRegistry, name: str) -> dict[str, str]:
    aliases = registry.aliases(name)
    newest = max(version.number for version in registry.versions(name))
    row = {
        "model": name,
        "champion": f"{name}@{aliases[CHAMPION]}" if CHAMPION in aliases else "-",
        "candidate": f"{name}@{aliases[CANDIDATE]}" if CANDIDATE in aliases else "-",
        "newest": f"{name}@{newest}",
    }
    version = registry.version(name, aliases.get(CHAMPION, newest))
    try:
        serving, deploys = version.serving, version.records(DEPLOY)
    except DamagedEvidence:
        return row | {"precision": f"slmops verify {version.reference}: its evidence is damaged"}
    judged = deploys[-1].value.variant(serving.precision) if serving and deploys else None
    metrics = judged.metrics if judged else {}
    ttft_ms, score = metrics.get("ttft_ms"), metrics.get("score", metrics.get("exact_match"))
    return row | {
        "precision": serving.precision if serving else "-",
        "size": megabytes(serving.size_bytes) if serving else "-",
        "TTFT (ms)": "-" if ttft_ms is None else decimal(ttft_ms),
        "score": "-" if score is None else percent(score),
        "last deploy": deploys[-1].at if deploys else "-",
    }
