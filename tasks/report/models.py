"""The artifact `slmops-models`: all models of the store, their champions and candidates, and how they were judged."""

from prefect.artifacts import create_table_artifact

from slmops.infra.storage.model_summary import ModelSummary, summarize_models
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.report.wording import decimal, megabytes, percent, shown
from slmops.tasks.runs.artifacts import shown_in_prefect, shown_rows

KEY = "slmops-models"


def post_models(registry: ModelRegistry) -> None:
    """Renew the artifact. Every stage that publishes a change of a version's standing does it."""
    with shown_in_prefect("The table of models"):
        create_table_artifact(table=model_rows(registry), key=KEY, description="All models of the store")


def model_rows(registry: ModelRegistry) -> list[dict[str, object]]:
    """Return one row a model. The figures are those of the champion, or of the newest version if there is none.

    A model that cannot be read has a row with the reason: it must not end the run of another one.
    """
    return shown_rows(map(_row, summarize_models(registry)))


def _row(model: ModelSummary) -> dict[str, str]:
    if model.fault:
        return {"model": model.name, "champion": model.fault}
    return {
        "model": model.name,
        "champion": f"{model.name}@{model.champion}" if model.champion else "-",
        "candidate": f"{model.name}@{model.candidate}" if model.candidate else "-",
        "newest": f"{model.name}@{model.newest}",
        "precision": model.precision or "-",
        "size": shown(model.size_bytes, megabytes),
        "TTFT (ms)": shown(model.ttft_ms, decimal),
        "score": shown(model.score, percent),
        "last deploy": model.deployed_at or "-",
    }
