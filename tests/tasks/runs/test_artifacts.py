"""A run whose artifacts Prefect's server does not take ends as it would otherwise, and its log says so."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.tasks.report.publish import publish_report
from slmops.tasks.runs import progress
from slmops.tasks.runs.stage import stage
from tests.support.api_faults import busy, faults_of_the_api
from tests.support.reports import full_report
from tests.support.versions import store_version


@pytest.fixture(autouse=True)
def server_without_artifacts(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "ARTIFACT_INTERVAL_S", 0.0)
    with temporary_settings({PREFECT_API_URL: server}), faults_of_the_api(busy("POST", "/artifacts/$", times=99)):
        yield


def test_a_report_is_in_the_store_and_at_home(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = open_registry(settings)
    version = registry.of(store_version(registry, tmp_path / "files", {"model.onnx": b"graph"}))

    @flow
    def reporting() -> str | None:
        return publish_report(full_report(), version, settings).report_file

    written = reporting()
    assert written and Path(written).is_file()
    assert "The report is not shown in Prefect: Server error '503 Service Unavailable'" in caplog.text
    assert "The table of models is not shown in Prefect" in caplog.text


def test_a_stage_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    @stage("build")
    def build() -> str:
        with progress.stage_progress("build") as on_progress:
            on_progress(1, 2, "half of it")
        return "built"

    assert flow(build)() == "built"
    assert "The progress is not shown in Prefect" in caplog.text
