"""The table of all models: a model that cannot be read does not hide the others, and ends nobody's run."""

from pathlib import Path

from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.report.models import model_rows
from slmops.tasks.runs.artifacts import EMPTY_CELL
from tests.support.versions import store_version


def test_a_model_that_cannot_be_read_is_a_row_with_the_reason(tmp_path: Path) -> None:
    registry = ModelRegistry(LocalObjectStore(tmp_path / "store"))
    for name in ("damaged", "home"):
        store_version(registry, tmp_path / name, name=name)
    manifest = tmp_path / "store" / "models" / "damaged" / "1" / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text("{")

    damaged, whole = model_rows(ModelRegistry(LocalObjectStore(tmp_path / "store")))

    assert damaged["model"] == "damaged"
    assert "manifest" in str(damaged["champion"])
    assert (whole["model"], whole["champion"], whole["newest"]) == ("home", EMPTY_CELL, "home@1")
