"""What `slmops status`, `runs`, `open`, `list NAME` and `show` say of a home."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from slmops.deployments.cli import status
from slmops.deployments.cli.app import run
from slmops.infra.foundry.model_folder import write_model_folder
from slmops.infra.settings import Settings
from slmops.infra.storage.garbage import delete_version
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import CHAMPION
from tests.support.versions import add_evidence, store_version


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: None) -> Path:
    for variable in [name for name in os.environ if name.startswith("PREFECT_API")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "none.toml"))
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path / "home"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    addresses: list[str] = []
    monkeypatch.setattr(status.webbrowser, "open", addresses.append)
    return addresses


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, ends: int = 0) -> str:
    assert run(arguments) == ends
    captured = capsys.readouterr()
    return captured.out + captured.err


def fill(home: Path, tmp_path: Path) -> None:
    """Store home@1 as its champion, judged and registered, and the rejected home@2."""
    registry = open_registry(Settings(home=home))
    first = store_version(registry, tmp_path / "first")
    judged: dict[str, Any] = {
        "precision": "int4",
        "status": "registered",
        "metrics": {"ttft_ms": 98.2, "score": 0.9, "kl_divergence": 0.04},
    }
    add_evidence(registry, first, "deploy", {"variants": [judged]})
    add_evidence(registry, first, "selection", {"selected": "int4", "reason": "the smallest"})
    registry.set_alias("home", CHAMPION, 1, "test")
    second = store_version(registry, tmp_path / "second", {"model.onnx": b"other"})
    said = {"reason": "rejected by the gate: kl divergence", "what_to_do": "Build it: slmops deploy ./home"}
    rejected = {"precision": "int4", "status": "rejected", **said}
    add_evidence(registry, second, "deploy", {"variants": [rejected]})
    (tmp_path / "genai_config.json").write_text("{}")
    write_model_folder(
        home / "foundry",
        "home",
        "int4",
        1,
        sources={"genai_config.json": tmp_path / "genai_config.json"},
        inference_model={"Name": "home-int4-generic-cpu:1"},
        model_card="",
    )


def test_an_empty_home_is_told_how_to_begin(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "status")
    assert "slmops up starts one" in text
    assert "Begin with: slmops demo" in text
    assert printed(capsys, "runs").startswith("There are no runs yet.")
    assert not home.exists()


def test_it_shows_models_registrations_and_disk_at_80_columns(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(home, tmp_path)
    text = printed(capsys, "status")
    (row,) = [line.split() for line in text.splitlines() if line.startswith("home  ")]
    assert row[:9] == ["home", "@1", "-", "@2", "int4", "7.0", "kB", "98", "90.0%"]
    assert "home-int4-generic-cpu:1" in text
    assert [line for line in text.splitlines() if len(line) > 80 and str(home) not in line] == []

    document = json.loads(printed(capsys, "status", "--json"))
    (model,) = document["models"]
    assert (model["champion"], model["newest"], model["score"]) == (1, 2, 0.9)
    assert document["registered"] == ["home-int4-generic-cpu:1"]
    assert document["disk"]["home_bytes"] > 0
    assert document["prefect"] == {"api_url": None, "ui_url": None, "runs": [], "due": []}


def test_nothing_is_deleted_where_nobody_answers(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(home, tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    text = printed(capsys, "delete", "home@2", ends=2)
    assert "Nothing was deleted: the question was not answered." in text
    assert "--yes" in text
    assert len(json.loads(printed(capsys, "list", "home", "--json"))["models"]) == 2
    assert "home@2; 5 B freed" in printed(capsys, "delete", "home@2", "--yes")


def test_a_run_elsewhere_needs_a_server(home: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remotely = ("deploy", str(tiny_checkpoint), "--name", "home", "--remote")
    assert "No Prefect server is set" in printed(capsys, *remotely, ends=2)
    assert "--dry-run does not" in printed(capsys, *remotely, "--dry-run", ends=2)
    assert "There are no runs yet." in printed(capsys, "logs", "--follow", ends=2)
    assert not home.exists()


def test_a_server_that_does_not_answer_hides_nothing_else(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(home, tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    text = printed(capsys, "status")
    assert "http://127.0.0.1:9/api cannot be used" in text
    assert "home-int4-generic-cpu:1" in text
    assert "cannot be used" in json.loads(printed(capsys, "runs", "--json", ends=1))["error"]["message"]


def test_a_model_is_listed_and_shown_with_figures_and_reasons(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(home, tmp_path)
    shown = printed(capsys, "show", "home@1")
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("int4     registered")]
    assert row == ["int4", "registered", "0.0", "98", "-", "-", "0.04", "90.0%"]
    shown = printed(capsys, "show", "home@2")
    assert "int4: rejected by the gate: kl divergence\n  Build it: slmops deploy ./home" in shown
    assert len(json.loads(printed(capsys, "list", "home", "--json"))["models"]) == 2
    assert "Did you mean home?" in printed(capsys, "list", "hoem", ends=2)


def test_a_report_opens_and_one_of_the_store_can_run_nothing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], opened: list[str]
) -> None:
    fill(home, tmp_path)
    assert "slmops regate home@1" in printed(capsys, "open", "home", ends=2)
    assert opened == []
    version = open_registry(Settings(home=home)).find("home@1")
    version.put_report("report.html", "<!DOCTYPE html><script>alert(1)</script>")
    path = home / "reports" / "home@1.html"
    assert printed(capsys, "open", "home").strip() == str(path)
    assert opened == [path.as_uri()]
    page = path.read_text("utf-8")
    assert page.index("default-src 'none'") < page.index("<script>")
    assert "report: slmops open home@1" in printed(capsys, "show", "home")
    delete_version(version.registry.find("home@2"))
    opened.clear()
    for gone in ("home@2", "home@9"):
        assert gone in printed(capsys, "open", gone, ends=2)
    assert opened == []
