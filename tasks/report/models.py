"""The artifact `slmops-models`: all models of the store, their champions and candidates, and how they were judged."""

from prefect.artifacts import create_table_artifact

from slmops.infra.errors import SlmopsError
from slmops.infra.storage.evidence import DEPLOY
from slmops.infra.storage.registry import CANDIDATE, CHAMPION, ModelRegistry
from slmops.infra.storage.version import Version
from slmops.tasks.report.wording import decimal, megabytes, percent

KEY = "slmops-models"


def post_models(registry: ModelRegistry) -> None:
    """Renew the artifact. Every stage that publishes a change of a version's standing does it."""
    create_table_artifact(table=model_rows(registry), key=KEY, description="All models of the store")


def model_rows(registry: ModelRegistry) -> list[dict[str, object]]:
    """Return one row a model. The figures are those of the champion, or of the newest version if there is none.

    A model that cannot be read has a row with the reason: it must not end the run of another one.
    """
    rows: list[dict[str, object]] = []
    for name in registry.names():
        try:
            rows += [dict(_row(registry, name, version)) for version in registry.versions(name)[-1:]]
        except SlmopsError as error:
            rows.append({"model": name, "champion": error.message})
    return rows


def _row(registry: ModelRegistry, name: str, newest: Version) -> dict[str, str]:
    aliases = registry.aliases(name)
    version = registry.version(name, aliases[CHAMPION]) if CHAMPION in aliases else newest
    serving, deploys = version.serving, version.records(DEPLOY)
    judged = deploys[-1].value.variant(serving.precision) if serving and deploys else None
    metrics = judged.metrics if judged else {}
    ttft_ms, score = metrics.get("ttft_ms"), metrics.get("score", metrics.get("exact_match"))
    return {
        "model": name,
        "champion": f"{name}@{aliases[CHAMPION]}" if CHAMPION in aliases else "-",
        "candidate": f"{name}@{aliases[CANDIDATE]}" if CANDIDATE in aliases else "-",
        "newest": newest.reference,
        "precision": serving.precision if serving else "-",
        "size": megabytes(serving.size_bytes) if serving else "-",
        "TTFT (ms)": "-" if ttft_ms is None else decimal(ttft_ms),
        "score": "-" if score is None else percent(score),
        "last deploy": deploys[-1].at if deploys else "-",
    }
