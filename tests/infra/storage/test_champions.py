"""The history of champions: complete, in order, and without changes that had no effect."""

import getpass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.settings import StoreSettings
from slmops.infra.storage.champions import champion_before, record_change
from slmops.infra.storage.copying import copy_version
from slmops.infra.storage.evidence import SELECTION, Selection
from slmops.infra.storage.garbage import collect_garbage, delete_version
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import CANDIDATE, CHAMPION, ModelRegistry
from slmops.infra.storage.signatures import sign_version
from tests.support.errors import coded
from tests.support.stores import StoreCase
from tests.support.versions import FILES, store_version


@pytest.fixture
def registry(store: StoreCase, tmp_path: Path) -> ModelRegistry:
    return store.registry(tmp_path / "home")


@pytest.fixture
def local(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(LocalObjectStore(tmp_path / "local"))


def held(registry: ModelRegistry, name: str = "home") -> list[int | None]:
    return [change.version for change in registry.champion_history(name)]


def test_every_change_is_kept_with_who_when_and_why(registry: ModelRegistry) -> None:
    assert registry.champion_history("home") == []
    assert registry.set_alias("home", CHAMPION, 1, "the first", only_if_free=True)
    assert not registry.set_alias("home", CHAMPION, 2, "too late", only_if_free=True)
    registry.set_alias("home", CANDIDATE, 2, "later")
    registry.set_alias("home", CHAMPION, 2, "answers faster")
    registry.set_alias("home", CHAMPION, 1, "it forgot the garage", rolled_back=True)
    newest, promoted, first = registry.champion_history("home")
    assert (first.version, first.former, first.reason) == (1, None, "the first")
    assert (promoted.version, promoted.former, promoted.reason, promoted.rolled_back) == (2, 1, "answers faster", False)
    assert (newest.version, newest.former, newest.reason, newest.rolled_back) == (1, 2, "it forgot the garage", True)
    assert newest.by == getpass.getuser()
    assert first.since < promoted.since < newest.since
    assert registry.champion_history("away") == []


def test_of_two_processes_that_replace_a_champion_at_once_one_does(
    registry: ModelRegistry, store: StoreCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry.replace_champion("home", 1, None, "the first")
    assert not registry.replace_champion("home", 2, None, "a first version too")
    assert not registry.replace_champion("home", 2, 3, "planned when home@3 was the champion")
    other = store.registry(tmp_path / "other")
    alias = registry.alias

    def overtaken(name: str, of: str) -> int | None:
        found = alias(name, of)
        assert other.replace_champion("home", 3, 1, "theirs")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(registry, "alias", overtaken)
        assert not registry.replace_champion("home", 2, 1, "ours")
    assert (registry.alias("home", CHAMPION), held(registry)) == (3, [3, 1])


def test_a_change_that_was_interrupted_before_the_alias_is_in_no_history(local: ModelRegistry) -> None:
    local.set_alias("home", CHAMPION, 1, "the first")
    record_change(local.objects, "home", 2, 1, "broke off", rolled_back=False)
    assert held(local) == [1]
    local.set_alias("home", CHAMPION, 3, "better")
    record_change(local.objects, "home", 1, 3, "broke off", rolled_back=True)
    assert held(local) == [3, 1]
    assert champion_before(local.champion_history("home")) == 1


def test_a_removed_champion_is_a_change_too(local: ModelRegistry, tmp_path: Path) -> None:
    first = store_version(local, tmp_path / "1")
    local.set_alias("home", CHAMPION, 1, "the first")
    delete_version(local.of(first))
    removal, _ = local.champion_history("home")
    assert (removal.version, removal.former, removal.reason) == (None, 1, "home@1 was deleted")
    store_version(local, tmp_path / "2", {**FILES, "model.onnx": b"another"})
    local.set_alias("home", CHAMPION, 2, "the next")
    assert held(local) == [2, None, 1]


def test_neither_versions_nor_garbage_are_confused_by_it(local: ModelRegistry, tmp_path: Path) -> None:
    store_version(local, tmp_path / "1")
    local.set_alias("home", CHAMPION, 1, "the first")
    found = collect_garbage(local)
    assert (found.blobs, found.evidence, found.leftovers) == ((), (), ())
    assert held(local) == [1]
    assert local.names() == ["home"]
    assert local.aliases("home") == {CHAMPION: 1}
    second = store_version(local, tmp_path / "2", {**FILES, "model.onnx": b"another"})
    assert [version.number for version in local.versions("home")] == [1, second.version] == [1, 2]


def test_a_copied_version_with_a_trusted_signature_begins_the_history_of_its_new_store(
    local: ModelRegistry, registry: ModelRegistry, tmp_path: Path
) -> None:
    version = local.of(store_version(local, tmp_path / "1"))
    version.record(SELECTION, Selection(selected="int4"))
    copy_version(version, registry)
    assert registry.champion_history("home") == []
    settings = key_pair(tmp_path)
    sign_version(version, settings)
    for _ in range(2):
        copy_version(version, registry, settings=settings)
    (change,) = registry.champion_history("home")
    reason = "the first version of its name in this store, signed by a key that is trusted"
    assert (change.version, change.reason) == (1, reason)


def key_pair(folder: Path) -> StoreSettings:
    """Write a key to sign with and the one to verify with; returns the settings that name both."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(private)
    (folder / "key.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return StoreSettings(signing_key=folder / "key.pem", verification_key=folder / "key.pub")


@pytest.mark.parametrize(
    ("changes", "before"),
    [
        ([], None),
        ([1], None),
        ([1, 2], 1),
        ([1, 2, 3], 2),
        ([1, 2, 3, -2], 1),  # what is before the 2 that was rolled back to
        ([1, 2, -1], None),  # and never the version that was rolled back from
        ([1, 2, 1], 2),  # unless 1 was promoted again
        ([1, 2, -1, 3], 1),
        ([1, 2, 3, -2, -1], None),
        ([1, 2, -5], None),  # 5 was never champion before: nothing is known to be before it
        ([1, 2, 3, -1, 4, -1], None),
    ],
)
def test_what_a_rollback_goes_to(local: ModelRegistry, changes: list[int], before: int | None) -> None:
    for change in changes:
        local.set_alias("home", CHAMPION, abs(change), "", rolled_back=change < 0)
    assert champion_before(local.champion_history("home")) == before


def test_more_than_nine_changes_stay_in_order(local: ModelRegistry) -> None:
    for version in range(1, 12):
        local.set_alias("home", CHAMPION, version, "next")
    assert held(local) == list(range(11, 0, -1))


def test_an_altered_record_is_named(local: ModelRegistry) -> None:
    local.set_alias("home", CHAMPION, 1, "the first")
    local.objects.put_bytes("models/home/history/000001.json", b"[]")
    with pytest.raises(StageFailed, check=coded("history-damaged", "000001.json")):
        local.champion_history("home")


def test_a_refused_alias_leaves_no_history(local: ModelRegistry, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        local.set_alias("home", "3", 1, "no")
    assert not (tmp_path / "local").exists()
