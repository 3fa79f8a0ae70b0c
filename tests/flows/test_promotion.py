"""Promotions of synthetic versions: refusals, plans, and the undoing of changes after failures."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.client.schemas import State
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.deployments.cli import app as cli
from slmops.flows.promote import promote
from slmops.flows.rollback import rollback
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.foundry.calls import CatalogModel, ListModels, OnCatalog, Register, Unregister
from slmops.infra.foundry.following import Following
from slmops.infra.foundry.interruption import has_marks
from slmops.infra.foundry.served_model import ServedVersion
from slmops.infra.foundry.server_client import running_servers
from slmops.infra.settings import Settings
from slmops.infra.storage.champion_lease import champion_is_changing, champion_lease
from slmops.infra.storage.garbage import delete_version
from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import CANDIDATE, CHAMPION, ModelRegistry
from slmops.infra.storage.version import Variant
from slmops.tasks.foundry import registration
from slmops.tasks.runs.stage import final_state
from slmops.tasks.versions import refusal
from slmops.tasks.versions.champion import ChampionChanged, Standing, change_champion, set_champion, settle_champion
from slmops.tasks.versions.change import FIRST, Change, plan_promotion, plan_rollback
from slmops.tasks.versions.promotion import Promotion, promotion_markdown
from slmops.tasks.versions.serving import StoredModels
from slmops.tasks.versions.undo import all_or_nothing, hand_back, restore_alias
from tests.support.errors import coded
from tests.support.model_server import ModelServer
from tests.support.prefect_api import query, wait_for_lineage
from tests.support.threads import in_thread
from tests.support.versions import FILES, add_evidence, store_version

DEADLINE_S = 240


@pytest.fixture
def registry(settings: Settings) -> ModelRegistry:
    return open_registry(settings)


@pytest.fixture
def versions(registry: ModelRegistry, tmp_path: Path) -> list[Manifest]:
    """home@1, the champion, and home@2 and home@3."""
    made = [passed(registry, tmp_path, number) for number in (1, 2, 3)]
    registry.set_alias("home", CHAMPION, 1, "the first")
    return made


@pytest.fixture
def api(server: str) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: server}):
        yield


def passed(registry: ModelRegistry, folder: Path, number: int) -> Manifest:
    manifest = store_version(registry, folder / str(number), {**FILES, "model.onnx": b"graph %d" % number})
    add_evidence(registry, manifest, "selection", {"selected": "int4", "reason": "", "budget": []})
    return manifest


class TestPlans:
    def test_a_version_is_named_by_its_number_or_an_alias(
        self, registry: ModelRegistry, versions: list[Manifest]
    ) -> None:
        registry.set_alias("home", CANDIDATE, 3, "later")
        planned = plan_promotion("home@candidate", " it is better ", registry)
        assert (planned.version.manifest, planned.former, planned.reason) == (versions[2], 1, "it is better")
        assert plan_promotion("home@2", "", registry).reason == "promoted by hand"

    @pytest.mark.parametrize(
        ("reference", "refused"),
        [
            ("home", coded("reference-not-valid", "'home'")),
            ("home@", coded("reference-not-valid", "'home@'")),
            ("home@9", coded("version-missing", "home@9")),
            ("home@staging", coded("reference-not-valid", "'home@staging'")),
            ("away@1", coded("version-missing", "away@1")),
            ("../home@1", coded("name-not-valid", "'../home'")),
        ],
    )
    def test_what_is_not_there_is_refused(
        self, registry: ModelRegistry, versions: list[Manifest], reference: str, refused: coded
    ) -> None:
        with pytest.raises(BadInput, check=refused):
            plan_promotion(reference, "", registry)

    @pytest.mark.parametrize(
        ("selected", "status"), [(None, "registered"), ("int4", "rejected"), ("int4", "failed"), ("int8", "registered")]
    )
    def test_a_version_without_a_selected_variant_that_passed_is_refused(
        self, registry: ModelRegistry, versions: list[Manifest], selected: str | None, status: str
    ) -> None:
        add_evidence(registry, versions[1], "selection", {"selected": selected})
        add_evidence(registry, versions[1], "deploy", {"variants": [{"precision": "int4", "status": status}]})
        with pytest.raises(BadInput, check=coded("version-not-proven", "home@2", f"(int4 {status})")):
            plan_promotion("home@2", "", registry)

    def test_a_version_that_was_never_judged_is_refused(self, registry: ModelRegistry, tmp_path: Path) -> None:
        store_version(registry, tmp_path / "1")
        with pytest.raises(BadInput, check=coded("version-not-proven", "home@1")) as caught:
            plan_promotion("home@1", "", registry)
        assert "slmops regate home@1" in caught.value.what_to_do

    def test_a_rollback_goes_to_the_champion_before(self, registry: ModelRegistry, versions: list[Manifest]) -> None:
        with pytest.raises(BadInput, check=coded("no-former-champion", "home before home@1")):
            plan_rollback("home", None, "", registry)
        for number in (2, 3):
            registry.set_alias("home", CHAMPION, number, "better")
        planned = plan_rollback("home", None, "", registry)
        assert (planned.version.manifest, planned.former, planned.reason) == (versions[1], 3, "rolled back from home@3")
        assert plan_rollback("home", 1, "", registry).version.manifest == versions[0]

    def test_a_rollback_to_a_missing_version_is_refused(
        self, registry: ModelRegistry, versions: list[Manifest]
    ) -> None:
        registry.set_alias("home", CHAMPION, 2, "better")
        delete_version(registry.of(versions[0]))
        with pytest.raises(BadInput, check=coded("version-missing", "home@1")) as caught:
            plan_rollback("home", None, "", registry)
        assert caught.value.what_to_do == "Use --to with one of 2, 3."
        for number in (0, -1, 9):
            with pytest.raises(BadInput, check=coded("version-missing")):
                plan_rollback("home", number, "", registry)
        with pytest.raises(BadInput, check=coded("version-missing", "away")):
            plan_rollback("away", None, "", registry)


class TestUndoing:
    def test_the_last_change_is_undone_first_and_the_reason_is_reported(
        self, registry: ModelRegistry, versions: list[Manifest]
    ) -> None:
        change = plan_promotion("home@2", "", registry)
        undone: list[str] = []

        def fail() -> None:
            raise StageFailed("It is gone.", "Look for it.")

        def fail_unforeseen() -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(StageFailed) as caught, all_or_nothing(change) as undo:
            undo.add("Foundry Local", lambda: undone.append("Foundry"))
            undo.add("the disk", fail_unforeseen)
            undo.add("the server", fail)
            undo.add("the alias", lambda: undone.append("alias"))
            raise StageFailed("No room.", "Make room.", "no-room")
        assert caught.value.code == "no-room"
        assert undone == ["alias", "Foundry"]
        assert caught.value.message == (
            "home@2 was not promoted: No room. home@1 still is the champion. Not restored: the server (It is gone); "
            "the disk (OSError: [Errno 28] No space left on device)."
        )
        assert caught.value.what_to_do == "Restore it with slmops promote home@1. Make room."

    def test_an_interrupted_one_is_undone_too(self, registry: ModelRegistry, versions: list[Manifest]) -> None:
        undone: list[str] = []
        with (
            pytest.raises(KeyboardInterrupt),
            all_or_nothing(plan_promotion("home@2", "", registry)) as undo,
        ):
            undo.add("all", lambda: undone.append("all"))
            raise KeyboardInterrupt
        assert undone == ["all"]

    def test_the_alias_goes_back_and_that_is_in_the_history(
        self, api: None, registry: ModelRegistry, versions: list[Manifest]
    ) -> None:
        change = plan_promotion("home@2", "better", registry)
        restore_alias(change)  # nothing was changed yet
        set_champion.fn(change)
        assert registry.alias("home", CHAMPION) == 2
        restore_alias(change)
        assert registry.alias("home", CHAMPION) == 1
        newest, promoted, _ = registry.champion_history("home")
        assert (promoted.version, promoted.reason) == (2, "better")
        assert (newest.version, newest.reason) == (1, "the promotion of home@2 did not complete")

    def test_a_champion_that_someone_else_changed_meanwhile_stays(
        self, api: None, registry: ModelRegistry, versions: list[Manifest]
    ) -> None:
        change = plan_promotion("home@2", "", registry)
        registry.set_alias("home", CHAMPION, 3, "theirs")
        with pytest.raises(StageFailed, check=coded("champion-changed-meanwhile", "home@3")):
            set_champion.fn(change)
        restore_alias(change)
        assert registry.alias("home", CHAMPION) == 3

    def test_a_server_gets_back_what_it_served(
        self, settings: Settings, registry: ModelRegistry, versions: list[Manifest]
    ) -> None:
        change = plan_promotion("home@2", "", registry)
        with ModelServer({"home": 2}).running(settings.home_dir) as model_server:
            (running,) = running_servers(settings.home_dir)
            hand_back(running, change, 1)
            assert model_server.models == {"home": 1}
            model_server.refuses |= {1, 3}
            hand_back(running, change, 1)  # it serves it: that it refuses to load it again is no failure
            with pytest.raises(StageFailed, check=coded("server-refused", "does not fit")):
                hand_back(running, change, 3)


class Foundry:
    """Foundry Local's catalog as a promotion sees it: by id, each model's folder; some ids it refuses to register."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}
        self.refuses: dict[str, Exception] = {}

    def ask(self, call: OnCatalog[Any], settings: Settings) -> object:
        """Answer as `ask_foundry` does."""
        match call:
            case ListModels():
                return tuple(self._model(model_id, folder) for model_id, folder in self.folders.items())
            case Unregister():
                return self.folders.pop(call.model_id)
            case Register():
                if call.model_id in self.refuses:
                    raise self.refuses[call.model_id]
                self.folders[call.model_id] = str(call.folder)
                return None
        raise AssertionError(call)

    def _model(self, model_id: str, folder: str) -> CatalogModel:
        name, _, version = model_id.rpartition(":")
        return CatalogModel(
            model_id=model_id,
            name=name,
            version=int(version),
            alias=name,
            folder=folder,
            folder_exists=True,
            context_length=None,
        )


@pytest.fixture
def foundry(monkeypatch: pytest.MonkeyPatch) -> Foundry:
    foundry = Foundry()
    monkeypatch.setattr(registration, "ask_foundry", foundry.ask)
    return foundry


class TestDeploys:
    """A deploy's treatment of the version that it has just registered and proven."""

    @pytest.fixture
    def first(self, api: None, settings: Settings, registry: ModelRegistry, tmp_path: Path, foundry: Foundry) -> None:
        """home@1 is the champion in the store and in Foundry Local."""
        assert self.settle(passed(registry, tmp_path, 1), registry, settings) == Standing("home:1")
        assert list(foundry.folders) == ["home:1"]

    def settle(
        self, manifest: Manifest, registry: ModelRegistry, settings: Settings, promote: bool = False
    ) -> Standing:
        return settle_champion(registry.of(manifest).variant("int4"), settings, promote=promote)

    def test_the_first_version_becomes_the_champion_and_the_next_a_candidate(
        self, first: None, server: str, settings: Settings, registry: ModelRegistry, tmp_path: Path, foundry: Foundry
    ) -> None:
        assert registry.champion_history("home")[0].reason == FIRST
        second = passed(registry, tmp_path, 2)
        assert self.settle(second, registry, settings) == Standing()
        assert registry.aliases("home") == {CHAMPION: 1, CANDIDATE: 2}
        with ModelServer({"home": 1}).running(settings.home_dir) as model_server:
            assert self.settle(second, registry, settings, promote=True) == Standing("home:2")
        assert (registry.aliases("home"), list(foundry.folders)) == ({CHAMPION: 2}, ["home:2"])
        assert model_server.models == {"home": 2}
        home = f"{settings.store_uri}/models/home"
        wait_for_lineage(server, {f"{home}/aliases/champion": [f"{home}/1", f"{home}/2"]})

    @pytest.mark.parametrize("fault", [StageFailed("The catalog is full."), OSError(28, "No space left on device")])
    def test_a_version_that_foundry_refuses_changes_nothing(
        self,
        first: None,
        settings: Settings,
        registry: ModelRegistry,
        tmp_path: Path,
        foundry: Foundry,
        fault: Exception,
    ) -> None:
        foundry.refuses["home:2"] = fault
        before = dict(foundry.folders)
        with ModelServer({"home": 1}).running(settings.home_dir) as model_server:
            standing = self.settle(passed(registry, tmp_path, 2), registry, settings, promote=True)
        assert standing.refusal and standing.refusal.exit_code == 1
        assert "home@2 was not promoted: " in standing.refusal.message
        assert standing.refusal.message.endswith("home@1 still is the champion.")
        assert (registry.aliases("home"), foundry.folders) == ({CHAMPION: 1}, before)
        assert (model_server.models, model_server.asked) == ({"home": 1}, [])

    def test_a_first_version_that_foundry_refuses_is_no_champion(
        self, api: None, settings: Settings, registry: ModelRegistry, tmp_path: Path, foundry: Foundry
    ) -> None:
        foundry.refuses["home:1"] = StageFailed("The catalog is full.", "Empty it.")
        standing = self.settle(passed(registry, tmp_path, 1), registry, settings)
        assert standing.refusal
        assert str(standing.refusal) == (
            "home@1 was not promoted: The catalog is full. There still is no champion. Empty it."
        )
        assert (registry.aliases("home"), foundry.folders) == ({}, {})
        assert registry.champion_history("home") == []

    def test_a_version_that_a_server_refuses_changes_nothing(
        self, first: None, settings: Settings, registry: ModelRegistry, tmp_path: Path, foundry: Foundry
    ) -> None:
        before = dict(foundry.folders)
        with ModelServer({"home": 1}).running(settings.home_dir) as model_server:
            model_server.refuses.add(2)
            standing = self.settle(passed(registry, tmp_path, 2), registry, settings, promote=True)
        assert standing.refusal and "does not fit into memory" in standing.refusal.message
        assert (registry.aliases("home"), foundry.folders) == ({CHAMPION: 1}, before)
        assert model_server.models == {"home": 1}

    def test_of_two_first_versions_at_once_the_later_is_the_candidate(
        self,
        api: None,
        settings: Settings,
        registry: ModelRegistry,
        tmp_path: Path,
        foundry: Foundry,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        first, second = (passed(registry, tmp_path, number) for number in (1, 2))

        def overtaken_once(variant: Variant, **_: Any) -> Change:
            registry.set_alias("home", CHAMPION, first.version, FIRST)  # another machine's, since this was planned
            return Change(variant, None, FIRST, is_proven=True)

        monkeypatch.setattr("slmops.tasks.versions.champion.plan_deployed", overtaken_once)
        assert self.settle(second, registry, settings) == Standing()
        assert (registry.aliases("home"), foundry.folders) == ({CHAMPION: 1, CANDIDATE: 2}, {})

    def test_of_two_promotions_at_once_one_is_refused(
        self, first: None, settings: Settings, registry: ModelRegistry, tmp_path: Path, foundry: Foundry
    ) -> None:
        versions = [passed(registry, tmp_path, number) for number in (2, 3)]
        changes = [Change(registry.of(version).variant("int4"), 1, "better", is_proven=True) for version in versions]

        def promote_one(change: Change) -> object:
            try:
                return change_champion(change, settings)
            except ChampionChanged as error:
                return error

        with ModelServer({"home": 1}).running(settings.home_dir) as model_server:
            under_way = [in_thread(partial(promote_one, change)) for change in changes]
            done = [promoting.result(DEADLINE_S) for promoting in under_way]
        (promotion,) = [outcome for outcome in done if isinstance(outcome, Promotion)]
        (refusal,) = [outcome for outcome in done if isinstance(outcome, ChampionChanged)]
        assert refusal.message == f"Meanwhile {promotion.reference} became the champion."
        assert registry.aliases("home") == {CHAMPION: promotion.version}
        assert (list(foundry.folders), model_server.models) == (
            [f"home:{promotion.version}"],
            {"home": promotion.version},
        )

    def test_two_machines_change_a_champion_one_after_the_other(
        self, first: None, settings: Settings, registry: ModelRegistry, tmp_path: Path, foundry: Foundry
    ) -> None:
        """The second machine waits in the store, and then changes nothing: neither Foundry Local nor its servers."""
        changes = [
            Change(registry.of(passed(registry, tmp_path, number)).variant("int4"), 1, "better", is_proven=True)
            for number in (2, 3)
        ]
        elsewhere = settings.model_copy(update={"home": tmp_path / "elsewhere"})

        def promote_elsewhere() -> None:
            with pytest.raises(ChampionChanged, check=coded("champion-changed-meanwhile", "home@2")):
                change_champion(changes[1], elsewhere)

        here, there = ModelServer({"home": 1}), ModelServer({"home": 1})
        with here.running(settings.home_dir), there.running(elsewhere.home_dir):
            here.waits.clear()
            under_way = in_thread(partial(change_champion, changes[0], settings))
            assert here.reached.wait(240)
            refused = coded("champion-is-changing", "Another promotion of home@2")
            later = champion_lease(registry.objects, "home", "promotion of home@3", wait_s=0)
            with pytest.raises(StageFailed, check=refused), later:
                pass
            waiting = in_thread(promote_elsewhere)
            here.waits.set()
            under_way.result(DEADLINE_S)
            waiting.result(DEADLINE_S)
        assert (here.models, there.models, there.asked) == ({"home": 2}, {"home": 1}, [])
        assert registry.aliases("home") == {CHAMPION: 2}
        assert not champion_is_changing(registry.objects, "home")
        assert "# home@3: refused" in last_artifact()


def last_artifact() -> str:
    """The newest artifact on home's champion."""
    asked = {"artifacts": {"key": {"any_": ["slmops-promotion-home"]}}, "sort": "CREATED_DESC", "limit": 1}
    (artifact,) = query(str(PREFECT_API_URL.value()), "artifacts", **asked)
    return str(artifact["data"])


class TestInterrupted:
    """A promotion whose process is killed between Foundry Local and the alias."""

    @pytest.fixture
    def interrupted(self, settings: Settings, registry: ModelRegistry, versions: list[Manifest]) -> None:
        """A process that was killed after it had handed over home@2."""
        left = """
import os, signal, sys
from slmops.infra.foundry.interruption import mark_change
from slmops.infra.settings import load_settings
from slmops.infra.storage.champion_lease import ChampionLease
from slmops.infra.storage.opening import open_registry
settings = load_settings()
assert ChampionLease(open_registry(settings).objects, "home", "promotion of home@2").take() is None
mark_change(settings.home_dir, "home", 2)
sys.stdout.flush()
os._exit(9)
"""
        environment = {**os.environ, "SLMOPS_HOME": str(settings.home_dir)}
        done = subprocess.run(
            [sys.executable, "-c", left], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 9, done.stderr

    def test_every_command_names_the_one_that_puts_it_right(
        self,
        interrupted: None,
        settings: Settings,
        registry: ModelRegistry,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("SLMOPS_HOME", str(settings.home_dir))
        assert cli.run(["list", "--json"]) == 0
        told = capsys.readouterr()
        assert "The promotion of home@2 was interrupted: home@1 is the champion" in told.err
        assert "slmops promote home@1" in told.err
        json.loads(told.out)
        registry.set_alias("home", CHAMPION, 2, "the killed process had come that far")
        assert cli.run(["list"]) == 0
        assert "interrupted" not in capsys.readouterr().err
        assert not has_marks(settings.home_dir)

    def test_its_lease_holds_nobody_up(self, interrupted: None, registry: ModelRegistry) -> None:
        with champion_lease(registry.objects, "home", "promotion of home@3", wait_s=0) as lease:
            lease.check()
        assert list(registry.objects.entries("promotions")) == []

    def test_a_running_server_returns_to_the_champion(
        self, interrupted: None, settings: Settings, registry: ModelRegistry
    ) -> None:
        host = HandedOver()
        following = Following(host, StoredModels(registry, settings), 0, takes_new_names=False)  # type: ignore[arg-type]
        host.champions["home"] = ServedVersion("home", 2, "int4")
        with champion_lease(registry.objects, "home", "promotion of home@2", wait_s=0):
            asyncio.run(following.look())
            assert host.champions["home"].version == 2  # a promotion that is running decides itself
        asyncio.run(following.look())
        assert (host.champions["home"].version, following.behind) == (1, [])


class HandedOver:
    """A host that serves home@1 until it is told otherwise."""

    def __init__(self) -> None:
        self.champions = {"home": ServedVersion("home", 1, "int4")}

    async def go_over(self, served: ServedVersion) -> None:
        self.champions[served.name] = served


class TestFlows:
    def test_a_version_that_cannot_be_registered_leaves_the_champion(
        self, api: None, settings: Settings, registry: ModelRegistry, versions: list[Manifest]
    ) -> None:
        rows = [{"id": 1, "messages": [{"role": "user", "content": "hello"}]}]
        add_evidence(registry, versions[1], "evaluation", {"rows": rows, "origin": "a test"})
        proof = {"model_id": "home-int4-generic-cpu:2", "question": "hello", "answer": "hi", "load_ms": 1.0}
        counts = {"e2e_latency_ms": 1.0, "prompt_tokens": 1, "completion_tokens": 1}
        add_evidence(registry, versions[1], "proof-int4", {**proof, **counts})
        before = registry.champion_history("home")
        with ModelServer({"home": 1}).running(settings.home_dir) as model_server:
            state: State[Any] = final_state(promote, "home@2", "better")
        assert state.is_failed()
        with pytest.raises(StageFailed, check=lambda error: "home@2 was not promoted" in str(error)) as caught:
            state.result()
        assert "home@1 still is the champion" in caught.value.message
        assert registry.champion_history("home") == before
        assert (model_server.models, model_server.asked) == ({"home": 1}, [])

    def test_what_was_never_proven_is_refused(
        self, api: None, registry: ModelRegistry, versions: list[Manifest]
    ) -> None:
        with pytest.raises(BadInput, check=coded("version-not-proven", "home@2 int4")):
            promote("home@2")
        registry.set_alias("home", CHAMPION, 3, "better")
        with pytest.raises(BadInput, check=coded("version-not-proven", "home@1 int4")):
            rollback("home")
        assert registry.alias("home", CHAMPION) == 3

    def test_a_refusal_of_the_plan_leaves_an_artifact_too(
        self, api: None, registry: ModelRegistry, versions: list[Manifest]
    ) -> None:
        with pytest.raises(BadInput, check=coded("version-missing", "home@9")):
            promote("home@9", "the best")
        told = last_artifact()
        assert "# home@9: refused" in told and "the best" in told and "| champion | home@1 |" in told
        with pytest.raises(BadInput, check=coded("no-former-champion")):
            rollback("home")
        assert "# rollback of home: refused" in last_artifact()
        with pytest.raises(BadInput, check=coded("name-not-valid")):
            promote("Home@1")  # no artifact can have this name

    def test_a_refusal_that_cannot_be_posted_is_still_the_refusal(
        self, api: None, versions: list[Manifest], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def unreachable(**_: object) -> None:
            raise httpx.ConnectError("All connection attempts failed")

        monkeypatch.setattr(refusal, "create_markdown_artifact", unreachable)
        for reference, code in (("home@9", "version-missing"), ("home@2", "version-not-proven")):
            with pytest.raises(BadInput, check=coded(code)):
                promote(reference)
            assert "could not be posted as an artifact: All connection attempts failed" in caplog.text
            caplog.clear()


class TestCommands:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["promote", "home@1"], "no home@1"),
            (["promote", "home"], "names no version"),
            (["promote", "Home@1"], "is not valid"),
            (["promote"], "Missing argument"),
            (["rollback", "home"], "no home"),
            (["rollback", "home@1"], "is not valid"),
            (["rollback", "home", "--to", "x"], "--to"),
            (["history", "home"], "no home"),
            (["history", "home@1"], "is not valid"),
        ],
    )
    def test_bad_input_ends_with_2_and_writes_nothing(
        self, environment: None, home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
    ) -> None:
        assert cli.run([*arguments, "--json"]) == 2
        assert said in json.loads(capsys.readouterr().out)["error"]["message"]
        assert not home.exists()

    def test_a_prefect_server_that_ends_in_mid_run_is_told(
        self,
        environment: None,
        server: str,
        versions: list[Manifest],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def without_server(**_: object) -> None:
            raise httpx.ConnectError("[Errno 111] Connection refused")

        monkeypatch.setenv("PREFECT_API_URL", server)
        monkeypatch.setattr("slmops.flows.promote.promote", without_server)
        assert cli.run(["promote", "home@2", "--json"]) == 1
        told = json.loads(capsys.readouterr().out)["error"]
        assert told["message"].startswith("Prefect's API stopped to answer: [Errno 111] Connection refused.")
        assert "the same command goes on" in told["what_to_do"]

    def test_the_history_is_printed(
        self, environment: None, registry: ModelRegistry, versions: list[Manifest], capsys: pytest.CaptureFixture[str]
    ) -> None:
        registry.set_alias("home", CHAMPION, 2, "knows the garage")
        registry.set_alias("home", CHAMPION, 1, "forgot the kitchen", rolled_back=True)
        assert cli.run(["history", "home", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["name"], document["champion"]) == ("home", 1)
        assert [(change["version"], change["former"], change["reason"]) for change in document["history"]] == [
            (1, 2, "forgot the kitchen"),
            (2, 1, "knows the garage"),
            (1, None, "the first"),
        ]
        assert {"since", "by", "rolled_back"} <= set(document["history"][0])
        assert cli.run(["history", "home"]) == 0
        shown = capsys.readouterr().out
        assert "rolled back" in shown and "knows the garage" in shown


def test_the_artifact_names_the_change_and_shows_foreign_text_unchanged(
    registry: ModelRegistry, versions: list[Manifest]
) -> None:
    change: Change = plan_promotion("home@2", "<b>bold</b> | claim", registry)
    promotion = Promotion(
        name="home",
        version=2,
        former=1,
        status=change.kind,
        reason=change.reason,
        precision="int4",
        foundry_model_id="home:2",
        servers=2,
    )
    text = promotion_markdown(promotion)
    assert text.startswith("# home@2: promoted")
    assert "home@2 is the champion, after home@1, and 2 running servers took it over." in text
    assert "&#60;b&#62;bold&#60;&#47;b&#62; &#124; claim" in text
