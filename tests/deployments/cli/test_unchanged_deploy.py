"""A deploy since which nothing changed: the command answers by its receipt, or makes a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmops.deployments.cli import app as cli
from slmops.deployments.cli import deploy as command
from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.opening import open_registry
from slmops.tasks.report.records import DeployReport
from slmops.tasks.versions import receipts
from tests.support.reports import full_report, full_variant
from tests.support.versions import store_version, write_files

Change = Callable[[Path, Manifest], object]


class Deploys:
    """Deploys of a checkpoint whose run ends at once, with a report."""

    def __init__(self, home: Path) -> None:
        self.home, self.runs = home, 0
        self.report = full_report(
            full_variant("int4", reliable=True), version=1, report_file=None, html_file=str(home / "report.html")
        )
        self.while_it_runs: Callable[[], object] = lambda: None

    def run(self, *asked: object) -> DeployReport:
        """What `run_flow` does."""
        self.runs += 1
        self.while_it_runs()
        return self.report

    def __call__(self, *options: str) -> bool:
        """Deploy; returns whether a run was made for it."""
        runs = self.runs
        assert cli.run(["deploy", str(self.home / "checkpoint"), "--name", "home", *options]) == 0
        return self.runs > runs


@pytest.fixture
def deploys(home: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Deploys:
    monkeypatch.setenv("SLMOPS_HOME", str(home))
    write_files(home / "checkpoint", {"config.json": b"{}", "model.safetensors": b"weights"})
    write_files(settings.foundry_dir, {"foundry.local.modelinfo.json": b"{}", "models/custom/home-int4/v1/a": b"a"})
    write_files(home, {"report.html": b"<p>"})
    found = Deploys(home)
    monkeypatch.setattr(command, "run_flow", found.run)
    return found


@pytest.fixture
def version(settings: Settings, tmp_path: Path) -> Manifest:
    return store_version(open_registry(settings), tmp_path / "model")


def test_a_second_deploy_makes_no_run_and_prints_the_first_one_s_report(
    deploys: Deploys, version: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploys("--json")
    first = json.loads(capsys.readouterr().out)
    assert not deploys("--json")
    again = capsys.readouterr()
    assert json.loads(again.out) == {**first, "status": "unchanged"}
    assert "so no run was made" in again.err
    assert not deploys()
    shown = capsys.readouterr().out
    assert "home@1 unchanged: int4 registered." in shown and "slmops chat home@1" in shown
    assert "Please turn the kitchen light to 10 percent" in shown


def _promote(home: Path, version: Manifest) -> None:
    open_registry(Settings(home=home)).set_alias("home", "candidate", 1, "for a test")


def _lose_a_blob(home: Path, version: Manifest) -> None:
    (home / "store" / "blobs" / "sha256" / version.variants[0].files[0].sha256).unlink()


CHANGES: dict[str, Change] = {
    "weights": lambda home, _: (home / "checkpoint" / "model.safetensors").write_bytes(b"others"),
    "rows in the checkpoint": lambda home, _: (home / "checkpoint" / "eval.jsonl").write_text("{}"),
    "evidence": lambda home, _: open_registry(Settings(home=home)).find("home@1").add_note("odd"),
    "an alias": _promote,
    "a blob": _lose_a_blob,
    "Foundry's folder": lambda home, _: (home / "foundry" / "models" / "custom" / "home-int4" / "v1" / "a").unlink(),
    "Foundry's catalog": lambda home, _: (home / "foundry" / "foundry.local.modelinfo.json").write_text("[]"),
    "the report": lambda home, _: (home / "report.html").unlink(),
    "an interrupted promotion": lambda home, _: write_files(home, {"promotions/home.json": b"{}"}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_after_a_change_a_run_is_made(deploys: Deploys, version: Manifest, change: Change) -> None:
    assert deploys()
    assert not deploys()
    change(deploys.home, version)
    assert deploys()


@pytest.mark.parametrize("options", [("--promote",), ("--precision", "int4"), ("--output", "copy")])
def test_another_request_is_a_run(deploys: Deploys, version: Manifest, options: tuple[str, ...]) -> None:
    assert deploys()
    assert deploys(*options)


def test_other_settings_and_packages_are_a_run(
    deploys: Deploys, version: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert deploys()
    monkeypatch.setenv("SLMOPS_GATE__MAX_KL_DIVERGENCE", "0.05")
    assert deploys()
    assert not deploys()
    monkeypatch.setattr(receipts, "installed_version", lambda name: "0")
    assert deploys()


@pytest.mark.parametrize("changes", [{"reliable": False}, {"status": "rejected"}], ids=str)
def test_a_variant_that_is_judged_again_leaves_no_receipt(
    deploys: Deploys, version: Manifest, changes: dict[str, Any]
) -> None:
    variants = tuple(variant.model_copy(update=changes) for variant in deploys.report.variants)
    deploys.report = deploys.report.model_copy(update={"variants": variants})
    assert deploys()
    assert deploys()


def test_a_checkpoint_that_changes_during_the_run_leaves_no_receipt(deploys: Deploys, version: Manifest) -> None:
    deploys.while_it_runs = lambda: (deploys.home / "checkpoint" / "config.json").write_text("{}")
    assert deploys()
    deploys.while_it_runs = lambda: None
    assert deploys()


def test_a_damaged_receipt_is_a_run(deploys: Deploys, version: Manifest) -> None:
    assert deploys()
    (receipt,) = (deploys.home / "cache" / "receipts").iterdir()
    receipt.write_text("{")
    assert deploys()
