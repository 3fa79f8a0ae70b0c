"""Push and pull: versions between a machine's own store and every kind of store."""

import json
from pathlib import Path

import pytest

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.storage.copying import copy_version
from slmops.infra.storage.evidence import DEPLOY, SIGNATURE, Signature
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.verification import repair_version, verify_version
from tests.support.errors import coded
from tests.support.stores import StoreCase
from tests.support.versions import FILES, add_evidence, content_of, latest_evidence, store_version

OTHER = {**FILES, "model.onnx": b"another graph"}


@pytest.fixture
def here(tmp_path: Path) -> ModelRegistry:
    """This machine's own store."""
    return ModelRegistry(LocalObjectStore(tmp_path / "here"))


@pytest.fixture
def team(store: StoreCase, tmp_path: Path) -> ModelRegistry:
    """The store of each kind that a version is copied to and from."""
    return store.registry(tmp_path / "team home")


def another_machine(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(LocalObjectStore(tmp_path / "there"))


def test_a_version_goes_there_and_back(
    here: ModelRegistry, team: ModelRegistry, store: StoreCase, tmp_path: Path
) -> None:
    manifest = store_version(here, tmp_path / "built")
    told: list[tuple[float, float, str]] = []
    pushed = copy_version(here.of(manifest), team, on_progress=lambda *step: told.append(step))
    size = sum(map(len, FILES.values()))
    assert (pushed.version.manifest, pushed.is_new, pushed.moved_bytes, pushed.skipped_bytes) == (
        manifest,
        True,
        size,
        0,
    )
    assert told[-1][:2] == (size, size)
    assert told[-1][2].startswith("copying: 0.0 of 0.0 MB")

    there = another_machine(tmp_path)
    fresh = store.registry(tmp_path / "another home")  # nothing is in its cache
    pulled = copy_version(fresh.find("home"), there)
    assert (pulled.version.manifest, pulled.is_new, pulled.moved_bytes) == (manifest, True, size)
    assert content_of(there, manifest, tmp_path / "out") == FILES
    assert there.of(manifest).stored_manifest() == here.of(manifest).stored_manifest()
    for registry in (team, there):
        assert registry.of(manifest).says_origin  # copied evidence is a claim of its origin
        assert latest_evidence(registry, manifest, "deploy") == latest_evidence(here, manifest, "deploy")
        assert registry.objects.read_bytes("models/home/1/evidence/report.md") == b"# home@1"
        assert registry.aliases("home") == {}
        assert verify_version(registry.of(manifest)).ok
        assert list(registry.objects.entries("leases")) == []


@pytest.mark.parametrize("file", ["deploy-1.md", "deploy-9.json"])
def test_evidence_that_is_forged_is_not_taken_for_the_stores_own(
    file: str, here: ModelRegistry, tmp_path: Path
) -> None:
    """It is newer than any other, claims not to be a copy, and one file has the name of a report, which has no mark."""
    manifest = store_version(here, tmp_path / "built")
    forged = {
        "kind": "deploy",
        "manifest": manifest.digest,
        "recorded_at": "2999-01-01T00:00:00.000000+00:00",
        "copied_from": None,
        "content": {"variants": [{"precision": "int4", "status": "registered"}], "description": "forged"},
    }
    there = another_machine(tmp_path)
    copy_version(here.of(manifest), there)
    add_evidence(there, manifest, "deploy", {"variants": [], "description": "own"})
    here.objects.put_bytes(f"models/home/1/evidence/{file}", json.dumps(forged).encode())
    copy_version(here.of(manifest), there)
    assert there.objects.read_bytes(f"models/home/1/evidence/{file}")
    assert not there.of(manifest).says_origin
    assert [deployed.description for deployed in there.of(manifest).all(DEPLOY)] == ["own"]
    elsewhere = ModelRegistry(LocalObjectStore(tmp_path / "elsewhere"))
    copy_version(here.of(manifest), elsewhere)
    assert elsewhere.of(manifest).says_origin


def test_existing_content_is_not_transferred_again(here: ModelRegistry, team: ModelRegistry, tmp_path: Path) -> None:
    copy_version(here.of(store_version(here, tmp_path / "1")), team)
    again = copy_version(here.version("home", 1), team)
    assert (again.is_new, again.moved_bytes) == (False, 0)
    second = store_version(here, tmp_path / "2", OTHER)
    moved = copy_version(here.of(second), team)
    assert (moved.version.manifest.version, moved.moved_bytes) == (2, len(b"another graph"))
    assert moved.skipped_bytes == sum(map(len, FILES.values())) - len(b"graph")
    add_evidence(here, second, "note", {"text": "later"})
    copy_version(here.of(second), team)
    assert [note.value.text for note in team.of(second).notes] == ["later"]


def test_a_number_that_is_taken_is_another_versions(here: ModelRegistry, team: ModelRegistry, tmp_path: Path) -> None:
    store_version(team, tmp_path / "theirs")
    mine = store_version(here, tmp_path / "mine", OTHER)
    here.of(mine).record(SIGNATURE, Signature(bundle={"covers": "home@1"}))
    with pytest.raises(BadInput, check=coded("version-taken", "home@1")) as caught:
        copy_version(here.of(mine), team)
    assert "--renumber" in caught.value.what_to_do
    assert len(list(team.objects.entries("blobs/sha256"))) == len(FILES)  # refused before anything moved
    stored = copy_version(here.of(mine), team, renumber=True).version.manifest
    assert (stored.reference, stored.identity) == ("home@2", mine.identity)
    record = latest_evidence(team, stored, "deploy")
    assert record
    assert record["variants"][0]["status"] == "registered"
    # What names or covers the old number stays behind.
    names = [entry.key.rpartition("/")[2] for entry in team.of(stored).evidence_entries()]
    assert all(name.startswith("deploy-") for name in names), names
    again = copy_version(here.of(mine), team, renumber=True)
    assert (again.version.manifest.reference, again.is_new) == ("home@2", False)
    assert copy_version(here.of(mine), team).version.manifest.reference == "home@2"


def test_an_altered_file_does_not_get_there(here: ModelRegistry, team: ModelRegistry, tmp_path: Path) -> None:
    manifest = store_version(here, tmp_path / "built")
    altered = manifest.variants[0].files[1]
    path = here.local_file(altered)
    assert path
    path.chmod(0o644)
    path.write_bytes(b"W" + path.read_bytes()[1:])
    with pytest.raises(StageFailed):
        copy_version(here.of(manifest), team)
    assert team.names() == []
    assert f"blobs/sha256/{altered.sha256}" not in {entry.key for entry in team.objects.entries("blobs/sha256")}
    path.write_bytes(b"w" + path.read_bytes()[1:])
    copy_version(here.of(manifest), team)
    assert verify_version(team.of(manifest)).ok


def test_a_lost_file_is_named(here: ModelRegistry, team: ModelRegistry, store: StoreCase, tmp_path: Path) -> None:
    manifest = store_version(here, tmp_path / "built")
    copy_version(here.of(manifest), team)
    file = manifest.variants[0].files[0]
    team.objects.delete([f"blobs/sha256/{file.sha256}"])
    there = another_machine(tmp_path)
    with pytest.raises(StageFailed, check=coded("content-lost", file.sha256)):
        copy_version(store.registry(tmp_path / "another home").of(manifest), there)
    assert there.names() == []
    found = verify_version(team.of(manifest))
    assert [(damage.what, damage.fault) for damage in found.damage] == [(f"int4/{file.path}", "missing")]
    assert isinstance(here.objects, LocalObjectStore)
    assert repair_version(team.of(manifest), found, [here.objects]) == 1
    assert verify_version(team.of(manifest)).ok
    copy_version(team.of(manifest), there)


def test_verify_names_what_is_wrong(here: ModelRegistry, team: ModelRegistry, tmp_path: Path) -> None:
    manifest = store_version(team, tmp_path / "built")
    found = verify_version(team.of(manifest))
    assert (found.ok, found.files, found.size_bytes) == (True, 3, sum(map(len, FILES.values())))
    keys = {file.path: f"blobs/sha256/{file.sha256}" for file in manifest.variants[0].files}

    def put(path: str, content: bytes) -> None:
        team.objects.delete([keys[path]])
        team.objects.put_bytes(keys[path], content)

    put("model.onnx", b"grapH")
    put("model.onnx.data", FILES["model.onnx.data"][:-1])
    team.objects.put_bytes("models/home/1/evidence/verdict-1.json", b"[" * 5000)
    found = verify_version(team.of(manifest))
    assert {damage.what: damage.fault for damage in found.damage} == {
        "int4/model.onnx": "altered",
        "int4/model.onnx.data": "truncated",
        "evidence/verdict-1.json": "altered",
    }
    for path in ("model.onnx", "model.onnx.data"):
        put(path, FILES[path])
    team.objects.delete(["models/home/1/evidence/verdict-1.json"])
    data = team.of(manifest).stored_manifest()
    team.objects.put_bytes("models/home/1/manifest.json", data.replace(b"/checkpoints/home", b"/checkpoints/away"))
    found = verify_version(team.version("home", 1))
    assert [damage.what for damage in found.damage] == ["manifest.json"]
    assert "evidence/deploy-" in found.damage[0].detail
    team.objects.put_bytes("models/home/1/manifest.json", data + b"\n")
    assert [damage.what for damage in verify_version(team.of(manifest)).damage] == ["manifest.json"]
