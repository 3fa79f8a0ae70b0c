"""The flow `gc`, as the UI and a schedule start it."""

from pathlib import Path

import pytest
from prefect.client.schemas import State

from slmops.flows.gc import gc
from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.tasks.runs.stage import final_state
from tests.support.errors import coded
from tests.support.versions import store_version


def test_it_removes_old_versions_and_says_so(
    settings: Settings, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    registry = open_registry(settings)
    for number in range(4):
        store_version(registry, tmp_path / str(number), {"model.onnx": b"graph %d" % number})
    for number in (1, 2):  # a rollback needs home@1, the former champion
        registry.set_alias("home", "champion", number, "better")
    with temporary_settings({PREFECT_API_URL: server}):
        planned: State = final_state(gc, keep=1, dry_run=True)
        assert planned.result().versions == ("home@3",)
        assert len(registry.versions("home")) == 4
        done: State = final_state(gc, keep=1)
        refused: State = final_state(gc, keep=0)
    assert (done.name, done.message) == ("Completed", done.result().summary)
    assert "Removed home@3, 0 files" in done.result().summary
    assert [version.number for version in registry.versions("home")] == [1, 2, 4]
    with pytest.raises(BadInput, check=coded("keep-not-valid", "0")):
        refused.result()
