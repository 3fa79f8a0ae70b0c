"""Garbage and leases: what is removed, and what running work keeps."""

import os
import re
import stat
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from slmops.infra.errors import BadInput, PassingFault, StageFailed
from slmops.infra.storage import leases
from slmops.infra.storage.champion_lease import champion_is_changing, champion_lease
from slmops.infra.storage.garbage import claimed_blobs, collect_garbage, delete_version, needed_blobs
from slmops.infra.storage.holders import has_ended, name_prefix, this_process
from slmops.infra.storage.inputs import delete_input, fetch_input, ingest, read_input
from slmops.infra.storage.leases import Collector, WriteLease, collecting
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.objects import Blob
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.verification import verify_version
from tests.support.errors import coded
from tests.support.stores import StoreCase
from tests.support.versions import FILES, store_version


@pytest.fixture
def registry(store: StoreCase, tmp_path: Path) -> ModelRegistry:
    return store.registry(tmp_path / "home")


def blob_keys(registry: ModelRegistry) -> set[str]:
    return {entry.key for entry in registry.objects.entries("blobs/sha256")}


def an_ended_process() -> str:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return re.sub("~.*", f"~{process.pid}~1", this_process())


def test_only_what_nothing_needs_goes(registry: ModelRegistry, tmp_path: Path) -> None:
    kept = store_version(registry, tmp_path / "kept")
    gone = store_version(registry, tmp_path / "gone", {"model.onnx": b"graph", "own": b"gone with its version"})
    registry.objects.put_bytes("blobs/sha256/" + "0" * 64, b"of a deploy that broke off")
    registry.mark_deleted(gone)
    planned = collect_garbage(registry, dry_run=True)
    assert len(planned.blobs) == 2
    assert len(planned.evidence) == 2
    assert planned.size_bytes == sum(entry.size_bytes for entry in (*planned.blobs, *planned.evidence))
    assert len(blob_keys(registry)) == 5
    assert collect_garbage(registry) == planned
    assert blob_keys(registry) == {blob.key for blob in needed_blobs(registry)}
    assert verify_version(registry.of(kept)).ok
    assert collect_garbage(registry).size_bytes == 0
    assert list(registry.objects.entries("leases")) == []


def test_what_is_stored_but_not_yet_a_version_is_spared(
    registry: ModelRegistry, store: StoreCase, tmp_path: Path
) -> None:
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "model.onnx").write_bytes(b"of a running deploy")
    files = registry.add_files(tmp_path / "built")
    other = store.registry(tmp_path / "another home")
    found = collect_garbage(other)
    assert (len(found.blobs), found.spared_blobs) == (0, 1)
    assert claimed_blobs(other) == {files[0].sha256}
    assert not registry.claim_files(files)
    registry.release_files()
    assert len(collect_garbage(other).blobs) == 1
    assert registry.claim_files(files)


def test_a_version_in_use_is_not_pruned(registry: ModelRegistry, store: StoreCase, tmp_path: Path) -> None:
    manifest = store_version(registry, tmp_path / "built")
    other = store.registry(tmp_path / "another home")
    with registry.in_use(manifest):
        assert delete_version(other.of(manifest), even_in_use=False) is None
        assert other.versions("home") == [other.of(manifest)]
    assert delete_version(other.of(manifest), even_in_use=False) == sum(map(len, FILES.values()))
    assert other.versions("home") == []


def test_a_manifest_that_cannot_be_read_stops_it(registry: ModelRegistry, tmp_path: Path) -> None:
    store_version(registry, tmp_path / "built")
    registry.objects.put_bytes("blobs/sha256/" + "0" * 64, b"an orphan")
    registry.objects.put_bytes("models/home/1/manifest.json", b"{")
    before = blob_keys(registry)
    with pytest.raises(StageFailed, check=coded("manifest-damaged", "home@1")):
        collect_garbage(registry)
    assert blob_keys(registry) == before
    assert list(registry.objects.entries("leases")) == []


def test_a_writer_waits_for_a_collector(
    registry: ModelRegistry, store: StoreCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "POLL_S", 0.02)
    steps: list[str] = []
    blob = Blob("c" * 64, 1)

    def write() -> None:
        WriteLease(store.open(tmp_path)).claim([blob])
        steps.append("written")

    with collecting(registry.objects):
        writer = threading.Thread(target=write)
        writer.start()
        while not any("/write-" in entry.key for entry in registry.objects.entries("leases")):
            time.sleep(0.02)
        time.sleep(0.3)
        steps.append("collected")
    writer.join(240)
    assert steps == ["collected", "written"]
    assert claimed_blobs(registry) == {blob.sha256}


@pytest.mark.skipif(sys.platform != "linux", reason="Windows and macOS record the time of a process's start")
def test_a_clock_that_steps_ends_no_living_writer(registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = WriteLease(registry.objects)
    lease.claim([Blob("e" * 64, 1)])
    started = psutil.Process().create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda _process: started + 3600)  # the boot's time moved
    assert claimed_blobs(registry) == {"e" * 64}
    assert not has_ended(this_process())


def test_a_clock_that_is_set_by_years_ends_no_living_writer(tmp_path: Path) -> None:
    """A machine without a battery starts in 1970, and gets the time from the network while it works."""
    registry = ModelRegistry(LocalObjectStore(tmp_path / "store"))
    WriteLease(registry.objects).claim([Blob("e" * 64, 1)])
    aside = tmp_path / "store" / "aside" / f"{name_prefix()}{'1' * 32}"
    aside.parent.mkdir(exist_ok=True)
    aside.write_bytes(b"half a blob")
    with champion_lease(registry.objects, "home", "promotion of home@2"):
        for path in (tmp_path / "store").rglob("*"):
            os.utime(path, (60, 60))
        assert claimed_blobs(registry) == {"e" * 64}
        assert collect_garbage(registry).leftovers == ()
        assert aside.is_file()
        assert champion_is_changing(registry.objects, "home")
        refused, second = coded("champion-is-changing"), champion_lease(registry.objects, "home", "another", wait_s=0)
        with pytest.raises(StageFailed, check=refused), second:
            pass


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_the_files_of_a_teams_store_follow_the_umask_and_the_folders_group(tmp_path: Path) -> None:
    for umask, mode in ((0o002, 0o664), (0o077, 0o600)):
        root = tmp_path / f"{umask:o}"
        root.mkdir()
        before = os.umask(umask)
        try:
            registry = ModelRegistry(LocalObjectStore(root))
            store_version(registry, tmp_path / f"files-{umask:o}")
            registry.set_alias("home", "champion", 1, "the first")
        finally:
            os.umask(before)
        written = [path for path in root.rglob("*") if path.is_file() and "blobs" not in path.parts]
        assert written
        assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {mode}


def test_leases_of_processes_that_ended_hold_nobody_up(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = an_ended_process()
    assert has_ended(ended)
    assert not has_ended(this_process())
    assert not has_ended("another-machine~1~1")
    assert not has_ended("nonsense")
    for kind in ("write", "collect"):
        registry.objects.put_bytes(f"leases/{kind}-{ended}-{'1' * 32}.json", b'["%s"]' % (b"d" * 64))
    lease = WriteLease(registry.objects)
    lease.claim([Blob("e" * 64, 1)])  # without waiting for the collector
    assert claimed_blobs(registry) == {"e" * 64}
    lease.release()
    assert list(registry.objects.entries("leases")) == []  # the collector has removed those of ended processes


def test_leases_of_other_machines_expire(registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("write", "collect"):
        registry.objects.put_bytes(f"leases/{kind}-elsewhere~1~1-{'1' * 32}.json", b'["%s"]' % (b"d" * 64))
    assert claimed_blobs(registry) == {"d" * 64}
    monkeypatch.setattr(leases, "TERMS", dict.fromkeys(leases.TERMS, timedelta(seconds=-10)))
    assert claimed_blobs(registry) == set()
    WriteLease(registry.objects).claim([Blob("e" * 64, 1)])


def test_a_collector_that_was_delayed_stops(registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector(registry.objects)
    collector.begin()
    later = time.monotonic() + leases.COLLECT_LEASE.total_seconds()
    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: later))
    with pytest.raises(PassingFault, check=coded("collector-delayed")):
        collector.renew()


def test_leftovers_are_found_and_removed(registry: ModelRegistry, store: StoreCase) -> None:
    with collecting(registry.objects) as collector:
        now = collector.now
    if store.server:
        bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
        store.server.client().create_multipart_upload(Bucket=bucket, Key=f"{prefix}/blobs/sha256/{'1' * 64}")
        registry.objects.put_bytes("claims/models/home/1/manifest.json/abc", b"")
        registry.objects.put_bytes("probes/abc", b"")
        expected = 3
    else:
        registry.objects.put_bytes("aside/of-a-write", b"x")
        expected = 1
    recent = registry.objects.leftovers(now - timedelta(hours=1))
    assert recent == []
    found = registry.objects.leftovers(now + timedelta(hours=1))
    assert len(found) == expected
    registry.objects.remove_leftovers(found)
    assert registry.objects.leftovers(now + timedelta(hours=1)) == []


class TestInputs:
    def test_a_folder_and_a_file_are_read_back_elsewhere(
        self, registry: ModelRegistry, store: StoreCase, tmp_path: Path
    ) -> None:
        folder = tmp_path / "my-model"
        (folder / "sub").mkdir(parents=True)
        for name, content in {"config.json": b"{}", "sub/weights": b"w" * 5000}.items():
            (folder / name).write_bytes(content)
        (tmp_path / "eval.jsonl").write_bytes(b"{}\n")
        stored = ingest(registry, folder)
        file = ingest(registry, tmp_path / "eval.jsonl")
        assert (stored.kind, stored.name, stored.size_bytes, file.kind) == ("folder", "my-model", 5002, "file")
        assert ingest(registry, folder) == stored
        other = store.registry(tmp_path / "another home")
        assert read_input(other, stored.address) == stored
        found = fetch_input(other, stored.address, tmp_path / "inputs")
        assert {
            path.relative_to(found).as_posix(): path.read_bytes() for path in found.rglob("*") if path.is_file()
        } == {
            "config.json": b"{}",
            "sub/weights": b"w" * 5000,
        }
        assert fetch_input(other, file.address, tmp_path / "inputs").read_bytes() == b"{}\n"
        assert collect_garbage(other).blobs == ()
        delete_input(other, stored.address)
        assert len(collect_garbage(other).blobs) == 2
        assert fetch_input(other, file.address, tmp_path / "more inputs").is_file()

    def test_bad_input(self, registry: ModelRegistry, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for path, code in ((tmp_path / "gone", "input-missing"), (tmp_path / "empty", "input-not-valid")):
            with pytest.raises(BadInput, check=coded(code)):
                ingest(registry, path)
        (tmp_path / "linked").mkdir()
        (tmp_path / "secret").write_text("not to be shared")
        (tmp_path / "linked" / "config.json").symlink_to(tmp_path / "secret")
        with pytest.raises(BadInput, check=coded("input-not-valid", "config.json")):
            ingest(registry, tmp_path / "linked")
        for address in ("store://", "store://abc", "store://" + "g" * 64, "store://" + "0" * 64, "store://../x"):
            with pytest.raises(
                BadInput, check=lambda error: error.code in ("input-address-not-valid", "input-missing")
            ):
                read_input(registry, address)
        assert blob_keys(registry) == set()

    def test_an_altered_record_is_named(self, registry: ModelRegistry, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text("{}")
        stored = ingest(registry, tmp_path / "rows.jsonl")
        key = f"inputs/{stored.digest}.json"
        for data in (registry.objects.read_bytes(key).replace(b"rows.jsonl", b"../../rows"), b"{", b"[]"):
            registry.objects.put_bytes(key, data)
            with pytest.raises(StageFailed, check=coded("input-damaged")):
                read_input(registry, stored.address)
