"""The registry of versions on every store: reading back, sharing, and behaviour in races and crashes."""

import errno
import functools
import hashlib
import itertools
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slmops.infra.errors import BadInput, PassingFault, StageFailed
from slmops.infra.settings import Settings
from slmops.infra.storage.garbage import collect_garbage, delete_version
from slmops.infra.storage.holders import has_ended, this_process
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest, Source, StoredFile, StoredVariant
from slmops.infra.storage.names import check_name, check_new_name
from slmops.infra.storage.objects import Blob, ObjectStore, OnBytes, no_report
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import CANDIDATE, CHAMPION, ModelRegistry
from tests.support.errors import coded
from tests.support.stores import StoreCase
from tests.support.versions import add_evidence, evidence, latest_evidence, stored_variant, write_files

ROOT = Path(__file__).resolve().parents[3]
SOURCE = Source(digest="a" * 64, origin="/checkpoints/home", architecture="Qwen2ForCausalLM", parameters=494_000_000)
BUILDER = {"olive-ai": "0.13.0", "onnxruntime-genai": "0.18.0"}
FILES = {"model.onnx": b"graph", "model.onnx.data": b"weights" * 1000, "sub/tokenizer.json": b"{}"}


@pytest.fixture
def registry(store: StoreCase, tmp_path: Path) -> ModelRegistry:
    return store.registry(tmp_path / "home")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def local(root: Path) -> ModelRegistry:
    return ModelRegistry(LocalObjectStore(root))


def variant(registry: ModelRegistry, folder: Path, files: dict[str, bytes], precision: str = "int4") -> StoredVariant:
    write_files(folder, files)
    return stored_variant(registry, folder, precision)


_folders = itertools.count()


def commit(
    registry: ModelRegistry, tmp_path: Path, files: dict[str, bytes] = FILES, name: str = "home"
) -> tuple[Manifest, bool]:
    made = variant(registry, tmp_path / f"built-{next(_folders)}", files)
    made_version = registry.commit(name, SOURCE, BUILDER, [made])
    registry.release_files()
    return made_version


def blobs(registry: ModelRegistry) -> dict[str, bytes]:
    objects = registry.objects
    return {entry.key.rpartition("/")[2]: objects.read_bytes(entry.key) for entry in objects.entries("blobs/sha256")}


def alter(registry: ModelRegistry, key: str, data: bytes) -> None:
    registry.objects.delete([key])  # a local blob is read only
    registry.objects.put_bytes(key, data)


# The blobs that a store keeps, and of how many it is asked at once: a listing of one page, of the first and of both.
@pytest.mark.parametrize(("kept", "questions"), [(40, [50]), (1_010, [60, 110])])
def test_which_of_many_blobs_are_missing(kept: int, questions: list[int], store: StoreCase, tmp_path: Path) -> None:
    files = []
    for number in range(kept):
        path = tmp_path / f"files/{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(str(number).encode())
        files.append((Blob(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size), path))
    objects = store.open(tmp_path / "home")
    objects.put_blobs(files)
    in_order = sorted((blob for blob, _ in files), key=lambda blob: blob.key)
    for asked in questions:
        there = in_order[-asked // 2 :]  # the end of the listing
        other_size = Blob(there[0].sha256, there[0].size_bytes + 1)
        count = asked - len(there) - 1
        absent = [Blob(hashlib.sha256(f"no {number}".encode()).hexdigest(), 3) for number in range(count)]
        assert objects.missing([*there, other_size, *absent]) == [other_size, *absent]
        assert objects.missing(there) == []


class TestVersions:
    def test_the_bytes_are_read_back(self, registry: ModelRegistry, tmp_path: Path) -> None:
        manifest, is_new = commit(registry, tmp_path)
        assert (manifest.reference, is_new) == ("home@1", True)
        assert registry.version("home") == registry.version("home", 1) == registry.of(manifest)
        registry.materialize(manifest.variant("int4").files, tmp_path / "out")
        found = {
            path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in all_files(tmp_path / "out")
        }
        assert found == FILES
        assert manifest.variant("int4").size_bytes == sum(map(len, FILES.values()))

    def test_the_same_content_is_the_same_version(self, registry: ModelRegistry, tmp_path: Path) -> None:
        first, _ = commit(registry, tmp_path)
        again, is_new = commit(registry, tmp_path)
        assert (again, is_new) == (first, False)
        assert len(registry.versions("home")) == 1

    def test_other_content_gets_the_next_number(self, registry: ModelRegistry, tmp_path: Path) -> None:
        commit(registry, tmp_path)
        second, is_new = commit(registry, tmp_path, {**FILES, "model.onnx": b"another graph"})
        assert (second.reference, is_new) == ("home@2", True)
        other_builder = registry.commit("home", SOURCE, {**BUILDER, "olive-ai": "0.14"}, second.variants)[0]
        other_source = registry.commit("home", SOURCE.model_copy(update={"digest": "c" * 64}), BUILDER, second.variants)
        assert [other_builder.version, other_source[0].version] == [3, 4]
        assert commit(registry, tmp_path, name="away")[0].reference == "away@1"

    def test_only_the_origins_spelling_differs_and_it_is_the_same_version(
        self, registry: ModelRegistry, tmp_path: Path
    ) -> None:
        first, _ = commit(registry, tmp_path)
        moved = SOURCE.model_copy(update={"origin": "/elsewhere"})
        assert registry.commit("home", moved, BUILDER, first.variants) == (first, False)

    def test_shared_files_are_stored_once(self, registry: ModelRegistry, tmp_path: Path) -> None:
        int4 = variant(registry, tmp_path / "4", {"tokenizer.json": b"shared", "model.onnx": b"4"})
        int8 = variant(registry, tmp_path / "8", {"tokenizer.json": b"shared", "model.onnx": b"8"}, "int8")
        registry.commit("home", SOURCE, BUILDER, [int4, int8])
        assert sorted(blobs(registry).values()) == [b"4", b"8", b"shared"]

    def test_a_number_is_never_used_again(self, registry: ModelRegistry, tmp_path: Path) -> None:
        commit(registry, tmp_path)
        commit(registry, tmp_path, {"model.onnx": b"two"})
        delete_version(registry.version("home", 2))
        assert [version.number for version in registry.versions("home")] == [1]
        assert commit(registry, tmp_path, {"model.onnx": b"three"})[0].version == 3
        assert commit(registry, tmp_path, {"model.onnx": b"two"})[0].version == 4
        for number in (1, 3, 4):
            delete_version(registry.version("home", number))
        assert registry.names() == []
        assert commit(registry, tmp_path)[0].version == 5

    def test_delete_keeps_what_others_need(self, registry: ModelRegistry, tmp_path: Path) -> None:
        commit(registry, tmp_path, {"tokenizer.json": b"shared", "model.onnx": b"first"})
        kept, _ = commit(registry, tmp_path, {"tokenizer.json": b"shared", "model.onnx": b"second"}, name="away")
        registry.set_alias("home", CHAMPION, 1, "first")
        freed = delete_version(registry.version("home", 1))
        assert freed == len(b"first")
        assert sorted(blobs(registry).values()) == [b"second", b"shared"]
        assert registry.has_files(kept.variants[0].files)
        assert registry.aliases("home") == {}
        with pytest.raises(BadInput, check=coded("version-missing", "home@1")) as caught:
            registry.version("home", 1)
        assert "away" in caught.value.what_to_do

    def test_a_commit_of_lost_files_may_pass_at_the_next_attempt(self, registry: ModelRegistry, tmp_path: Path) -> None:
        made = variant(registry, tmp_path / "built", FILES)
        registry.objects.delete([f"blobs/sha256/{made.files[0].sha256}"])
        with pytest.raises(PassingFault, check=coded("content-lost-meanwhile")):
            registry.commit("home", SOURCE, BUILDER, [made])
        assert registry.versions("home") == []

    def test_the_version_without_a_number_is_the_champion_or_else_the_newest(
        self, registry: ModelRegistry, tmp_path: Path
    ) -> None:
        commit(registry, tmp_path)
        commit(registry, tmp_path, {"model.onnx": b"two"})
        assert registry.version("home").number == 2
        registry.set_alias("home", CHAMPION, 1, "the first")
        assert registry.version("home").number == 1

    def test_a_missing_version_is_reported_with_the_existing_ones(
        self, registry: ModelRegistry, tmp_path: Path
    ) -> None:
        with pytest.raises(BadInput, check=coded("version-missing")) as caught:
            registry.version("home")
        assert "nothing yet" in caught.value.what_to_do
        manifest, _ = commit(registry, tmp_path)
        with pytest.raises(BadInput, check=coded("version-missing", "home@7")) as caught:
            registry.version("home", 7)
        assert "home@1" in caught.value.what_to_do
        with pytest.raises(BadInput, check=coded("variant-missing", "'fp16'")) as caught:
            manifest.variant("fp16")
        assert "int4" in caught.value.what_to_do

    def test_a_lost_blob_is_a_failed_stage(self, store: StoreCase, registry: ModelRegistry, tmp_path: Path) -> None:
        manifest, _ = commit(registry, tmp_path)
        file = manifest.variants[0].files[0]
        registry.objects.delete([f"blobs/sha256/{file.sha256}"])
        assert not registry.has_files([file])
        elsewhere = store.registry(tmp_path / "another home")
        with pytest.raises(StageFailed, check=coded("content-lost", file.path)):
            elsewhere.materialize([file], tmp_path / "out")


def all_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class TestFilesOfTheStore:
    def test_files_are_read_only_and_a_users_copy_is_not(self, registry: ModelRegistry, tmp_path: Path) -> None:
        manifest, _ = commit(registry, tmp_path)
        registry.materialize(manifest.variants[0].files, tmp_path / "model")
        written = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
        assert {path.stat().st_mode & written for path in all_files(tmp_path / "model")} == {0}
        registry.copy_files(manifest.variants[0].files, tmp_path / "copy")
        for path in all_files(tmp_path / "copy"):
            assert path.stat().st_mode & stat.S_IWUSR
            path.write_bytes(b"the user's own now")
        assert b"the user's own now" not in blobs(registry).values()
        assert sorted(blobs(registry).values()) == sorted(FILES.values())

    def test_a_blob_of_the_wrong_size_is_repaired(self, registry: ModelRegistry, tmp_path: Path) -> None:
        manifest, _ = commit(registry, tmp_path)
        file = next(file for file in manifest.variants[0].files if file.path == "model.onnx.data")
        alter(registry, f"blobs/sha256/{file.sha256}", b"cut off")
        assert not registry.has_files([file])
        assert commit(registry, tmp_path) == (manifest, False)
        assert blobs(registry)[file.sha256] == FILES["model.onnx.data"]

    def test_no_other_key_reaches_outside(self, root: Path) -> None:
        store = LocalObjectStore(root)
        for key in ("../outside", "a/../../outside", "/outside", "a//b", "a/./b", "c:/x", "a\\b", ""):
            with pytest.raises(ValueError, match="not a key"):
                store.put_bytes(key, b"x")
        assert not root.exists()

    def test_bytes_are_put_once_if_requested(self, store: StoreCase, root: Path, tmp_path: Path) -> None:
        objects = store.open(tmp_path)
        assert objects.put_bytes_if_absent("a/b", b"first")
        assert not objects.put_bytes_if_absent("a/b", b"second")
        assert objects.put_bytes_if_absent("a/b", b"first")  # whoever asks twice is told the same
        assert objects.read_bytes("a/b") == b"first"
        objects.put_bytes("a/b", b"third")
        assert objects.read_bytes("a/b") == b"third"
        objects.put_bytes("a/c", b"")
        objects.put_bytes("ab", b"another folder")
        assert [(entry.key, entry.size_bytes) for entry in objects.entries("a")] == [("a/b", 5), ("a/c", 0)]
        objects.delete(["a/b", "a/c", "a/gone"])
        objects.delete(["a/b"])
        assert list(objects.entries("a")) == []
        with pytest.raises(KeyError, match="a/b"):
            objects.read_bytes("a/b")
        assert not (root / "aside").exists() or list((root / "aside").iterdir()) == []

    @pytest.mark.parametrize("put", ["blobs", "bytes", "bytes_if_absent"])
    def test_a_full_disk_fails_with_a_clear_sentence_and_leaves_nothing(
        self, put: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        (tmp_path / "file").write_bytes(b"x" * 100)
        store = LocalObjectStore(root)
        blob = Blob(hashlib.sha256(b"x" * 100).hexdigest(), 100)
        arguments = ([(blob, tmp_path / "file")],) if put == "blobs" else ("a/b", b"x" * 100)
        with pytest.raises(
            StageFailed, check=coded("disk-failed", "No space left", "(blobs/" if put == "blobs" else "(a/b)")
        ) as caught:
            getattr(store, f"put_{put}")(*arguments)
        assert "free space" in caught.value.what_to_do
        assert all_files(root) == []

    def test_a_place_that_cannot_be_written_is_told_and_not_the_store(self, tmp_path: Path) -> None:
        registry = ModelRegistry(LocalObjectStore(tmp_path / "store"))
        (tmp_path / "occupied").write_bytes(b"1")
        files = registry.add_paths({"model.onnx": tmp_path / "occupied"})
        with pytest.raises(StageFailed, check=coded("disk-failed", f"{tmp_path / 'occupied'} cannot be written")):
            registry.materialize(files, tmp_path / "occupied")

    def test_a_store_that_is_a_file_fails_with_a_clear_sentence(self, root: Path, tmp_path: Path) -> None:
        root.write_bytes(b"not a folder")
        registry = ModelRegistry(LocalObjectStore(root))
        assert registry.names() == []
        with pytest.raises(StageFailed, check=coded("disk-failed", str(root))):
            variant(registry, tmp_path / "built", FILES)

    def test_only_stores_that_can_be_opened_are(self, tmp_path: Path) -> None:
        registry = open_registry(Settings(home=tmp_path / "a home"))
        manifest, _ = commit(registry, tmp_path)
        assert registry.of(manifest).uri == (tmp_path / "a home/store/models/home/1/manifest.json").as_uri()
        assert registry.of(manifest).variant("int4").uri.endswith("/models/home/1/manifest.json#int4")
        for uri in (
            "ftp://server/x",
            "store",
            "",
            "file://server/share",
            "file:relative",
            "ftp://[x",
            "https://a:b@c/x",
        ):
            settings = Settings.model_validate({"home": tmp_path, "store": {"uri": uri or "x:"}})
            with pytest.raises(BadInput, check=coded("store-not-valid")):
                open_registry(settings)


class TestAltered:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"version": 0}, "greater than or equal to 1"),
            ({"version": 9}, "it belongs to home@9"),
            ({"name": "other"}, "it belongs to other@1"),
            ({"signed_by": "me"}, "Extra inputs"),
            ({"variants": "none"}, "valid array"),
        ],
    )
    def test_a_hand_edited_manifest_is_named(
        self, change: dict[str, Any], said: str, registry: ModelRegistry, tmp_path: Path
    ) -> None:
        commit(registry, tmp_path)
        key = "models/home/1/manifest.json"
        registry.objects.put_bytes(key, json.dumps({**json.loads(registry.objects.read_bytes(key)), **change}).encode())
        with pytest.raises(StageFailed, check=coded("manifest-damaged", "home@1", said)) as caught:
            registry.version("home", 1)
        assert registry.objects.uri(key).removeprefix("file://") in caught.value.what_to_do

    def test_a_damaged_manifest_stops_a_delete_before_anything_is_removed(
        self, registry: ModelRegistry, tmp_path: Path
    ) -> None:
        manifest, _ = commit(registry, tmp_path)
        registry.set_alias("home", CHAMPION, 1, "first")
        commit(registry, tmp_path, {"model.onnx": b"other"}, name="away")
        registry.objects.put_bytes("models/away/1/manifest.json", b"{")
        with pytest.raises(StageFailed, check=coded("manifest-damaged", "away@1")):
            delete_version(registry.version("home", 1))
        assert registry.version("home", 1) == registry.of(manifest)
        assert registry.alias("home", CHAMPION) == 1
        registry.objects.delete(["models/away/1/manifest.json"])
        delete_version(registry.version("home", 1))
        assert registry.names() == []


class TestManifest:
    paths = st.lists(st.text("abcXYZ09._- ä", min_size=1, max_size=8), min_size=1, max_size=3).map("/".join)
    files = st.builds(
        StoredFile,
        path=paths.filter(lambda path: not {"..", "."} & set(path.split("/"))),
        sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
        size_bytes=st.integers(0, 2**50),
    )
    variants = st.builds(
        StoredVariant,
        precision=st.sampled_from(["fp16", "int8", "int4"]),
        device=st.sampled_from(["cpu", "gpu"]),
        execution_provider=st.sampled_from(["cpu", "cuda"]),
        recipe=st.text(max_size=20),
        recipe_digest=st.text("0123456789abcdef", min_size=64, max_size=64),
        files=st.lists(files, max_size=4, unique_by=lambda file: file.path.split("/")[0].casefold()).map(tuple),
    )
    manifests = st.builds(
        Manifest,
        schema_version=st.just(1),
        name=st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
        version=st.integers(1, 10**9),
        source=st.just(SOURCE),
        builder=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
        variants=st.lists(variants, max_size=3, unique_by=lambda one: one.precision).map(tuple),
        created_at=st.datetimes().map(str),
    )

    @given(manifests)
    def test_round_trip(self, manifest: Manifest) -> None:
        again = Manifest.model_validate_json(manifest.to_bytes())
        assert again == manifest
        assert (again.digest, again.identity) == (manifest.digest, manifest.identity)

    @given(manifests, st.integers(1, 100), st.randoms(use_true_random=False))
    def test_identity_does_not_depend_on_order_time_version_or_name(
        self, manifest: Manifest, version: int, chance: Any
    ) -> None:
        shuffled = chance.sample(manifest.variants, len(manifest.variants))
        builder = dict(chance.sample(list(manifest.builder.items()), len(manifest.builder)))
        other = manifest.model_copy(
            update={
                "version": version,
                "name": "other",
                "created_at": "later",
                "builder": builder,
                "variants": tuple(shuffled),
                "source": SOURCE.model_copy(update={"origin": "elsewhere"}),
            }
        )
        assert other.identity == manifest.identity

    @given(manifests.filter(lambda one: any(variant.files for variant in one.variants)), st.data())
    def test_identity_changes_with_every_file(self, manifest: Manifest, data: st.DataObject) -> None:
        changed = data.draw(st.sampled_from([variant for variant in manifest.variants if variant.files]))
        file = data.draw(st.sampled_from(changed.files))
        update = data.draw(st.sampled_from([{"sha256": "f" * 63 + "e"}, {"path": "other"}]))
        files = tuple(kept.model_copy(update=update) if kept is file else kept for kept in changed.files)
        variants = tuple(
            variant.model_copy(update={"files": files}) if variant is changed else variant
            for variant in manifest.variants
        )
        other = manifest.model_copy(update={"variants": variants})
        if other != manifest:
            assert other.identity != manifest.identity
            assert next(variant for variant in variants if variant.files is files).digest != changed.digest

    @given(st.permutations(list(FILES)))
    def test_the_order_of_files_does_not_change_a_variants_digest(self, names: list[str]) -> None:
        files = tuple(StoredFile(path=name, sha256="d" * 64, size_bytes=1) for name in names)
        fields = {"device": "cpu", "execution_provider": "cpu", "recipe": "r", "recipe_digest": "e" * 64}
        made = StoredVariant(precision="int4", files=files, **fields)
        assert made.digest == made.model_copy(update={"files": tuple(sorted(files, key=lambda one: one.path))}).digest

    @given(
        st.text(max_size=20), st.sampled_from(["/", "../", "a/../", "..", "C:", "\\\\server\\"]), st.text(max_size=20)
    )
    def test_hostile_file_paths_are_refused(self, before: str, hostile: str, after: str) -> None:
        for path in (hostile + after, f"{before}/{hostile}" if hostile.startswith("..") else hostile + before):
            parts = path.replace("\\", "/").split("/")
            if path.startswith("/") or ".." in parts or ":" in path or "\\" in path:
                with pytest.raises(ValidationError, match="not a path inside"):
                    StoredFile(path=path, sha256="a" * 64, size_bytes=1)

    @pytest.mark.parametrize("path", ["", ".", "/", "/etc/passwd", "..", "a/../b", "a\\b", "C:/x", "x:stream"])
    def test_these_are_no_paths_inside_a_variant(self, path: str) -> None:
        with pytest.raises(ValidationError, match="not a path inside"):
            StoredFile(path=path, sha256="a" * 64, size_bytes=1)


class TestEvidence:
    def test_it_is_appended_and_the_latest_is_found(self, registry: ModelRegistry, tmp_path: Path) -> None:
        manifest, _ = commit(registry, tmp_path)
        for number in range(20):
            add_evidence(registry, manifest, "verdict", {"number": number})
        assert [record["number"] for record in evidence(registry, manifest, "verdict")] == list(range(20))
        latest = latest_evidence(registry, manifest, "verdict")
        assert latest
        assert latest["number"] == 19
        assert latest_evidence(registry, manifest, "proof") is None
        assert registry.version("home", 1) == registry.of(manifest)

    def test_a_key_is_answered_once_and_exactly(self, registry: ModelRegistry, tmp_path: Path) -> None:
        manifest, _ = commit(registry, tmp_path)
        add_evidence(registry, manifest, "measurement", {"tps": 1}, key="ab")
        add_evidence(registry, manifest, "measurement", {"tps": 2}, key="ab")
        add_evidence(registry, manifest, "measurement", {"tps": 3}, key="abc")
        assert [record["tps"] for record in evidence(registry, manifest, "measurement", "ab")] == [2]
        assert list(evidence(registry, manifest, "measurement", "a")) == []
        assert len(list(evidence(registry, manifest, "measurement"))) == 2

    def test_a_kind_is_not_taken_for_a_longer_one(self, registry: ModelRegistry, tmp_path: Path) -> None:
        manifest, _ = commit(registry, tmp_path)
        add_evidence(registry, manifest, "proof-int4", {"answer": "on"})
        registry.of(manifest).put_report("report.md", "# home")
        assert list(evidence(registry, manifest, "proof")) == []
        assert len(list(evidence(registry, manifest, "proof-int4"))) == 1

    def test_evidence_belongs_to_one_manifest(self, registry: ModelRegistry, tmp_path: Path) -> None:
        manifest, _ = commit(registry, tmp_path)
        add_evidence(registry, manifest, "verdict", {"passed": True})
        altered = manifest.model_copy(update={"created_at": "another time"})
        assert list(evidence(registry, altered, "verdict")) == []

    def test_figures_that_are_no_numbers_are_refused(self, registry: ModelRegistry, tmp_path: Path) -> None:
        manifest, _ = commit(registry, tmp_path)
        with pytest.raises(ValueError, match="JSON compliant"):
            add_evidence(registry, manifest, "measurement", {"tps": float("nan")})
        assert list(evidence(registry, manifest, "measurement")) == []

    def test_a_report_is_read_back_and_goes_with_its_version(self, registry: ModelRegistry, tmp_path: Path) -> None:
        manifest, _ = commit(registry, tmp_path)
        uri = registry.of(manifest).put_report("report.md", "größer")
        key = "models/home/1/evidence/report.md"
        assert (uri, registry.objects.read_bytes(key).decode()) == (registry.objects.uri(key), "größer")
        delete_version(registry.version("home", 1))
        left = [entry.key for entry in registry.objects.entries("models")]
        assert left == ["models/home/1/deleted.json", "models/home/1/manifest.json"]


class TestAliases:
    def test_they_move(self, registry: ModelRegistry, tmp_path: Path) -> None:
        first, _ = commit(registry, tmp_path)
        registry.set_alias("home", CHAMPION, 1, "first")
        registry.set_alias("home", CANDIDATE, 1, "why not")
        assert registry.aliases("home") == {CANDIDATE: 1, CHAMPION: 1}
        assert registry.aliases_of(first) == (CANDIDATE, CHAMPION)
        registry.set_alias("home", CHAMPION, 2, "better")
        registry.remove_alias("home", CANDIDATE)
        registry.remove_alias("home", CANDIDATE)
        assert registry.aliases("home") == {CHAMPION: 2}
        assert registry.alias("home", CANDIDATE) is None

    @pytest.mark.parametrize("alias", ["", "../1/manifest.json", "a/b", "A", "ä", "a\n", "3"])
    def test_hostile_ones_are_refused(self, alias: str, local: ModelRegistry, root: Path) -> None:
        with pytest.raises(BadInput, check=coded("alias-not-valid")):
            local.set_alias("home", alias, 1, "no")
        assert not root.exists()


class TestNames:
    @given(st.text(max_size=70))
    def test_a_name_is_valid_or_refused(self, name: str) -> None:
        allowed = "abcdefghijklmnopqrstuvwxyz0123456789-"
        if 1 <= len(name) <= 63 and set(name) <= set(allowed) and name[0] != "-":
            assert check_name(name) == name
        else:
            with pytest.raises(BadInput, check=coded("name-not-valid")):
                check_name(name)

    @pytest.mark.parametrize("name", ["con", "nul", "aux", "prn", "com1", "lpt9"])
    def test_a_new_model_is_no_device_of_windows(self, name: str) -> None:
        assert check_name(name) == name  # a store of an earlier release may have it
        with pytest.raises(BadInput, check=coded("name-not-valid", "Windows")):
            check_new_name(name)
        assert check_new_name(f"{name}x") == f"{name}x"

    @pytest.mark.parametrize(
        ("paths", "fault"),
        [
            (("a:b.txt",), "contains :"),
            (("x/what?.json",), "contains ?"),
            (("back\\slash",), "contains \\"),
            (("new\nline.txt",), "'new\\nline.txt' has a character"),
            (("\udcff.txt",), "has a character"),
            (("CON.json",), "name of a device"),
            (("x/nul",), "name of a device"),
            (("ends.",), "dot or a space"),
            (("ü" * 128,), "more than 255 bytes"),
            (("Model.onnx", "model.ONNX"), "are one file"),
            (("é.json", "e\u0301.json"), "are one file"),
        ],
    )
    def test_files_that_not_every_system_can_store_are_refused(
        self, paths: tuple[str, ...], fault: str, tmp_path: Path
    ) -> None:
        (tmp_path / "content").write_bytes(b"1")
        registry = ModelRegistry(LocalObjectStore(tmp_path / "store"))
        with pytest.raises(BadInput, check=coded("file-name-not-valid", fault)):
            registry.add_paths(dict.fromkeys(paths, tmp_path / "content"))
        assert not (tmp_path / "store").exists()
        registry.add_paths(dict.fromkeys(("größer 日本.json", ".hidden", "console", "a/b.c"), tmp_path / "content"))

    def test_what_is_no_reference_is_refused(self, tmp_path: Path) -> None:
        registry = ModelRegistry(LocalObjectStore(tmp_path))
        for text in ("home@", "home@0", "home@01", "home@-1", "home@1.0", "home@1\n", "home@٣", "home@1/int4", "@1"):
            with pytest.raises(BadInput):
                registry.find(text)


class Crash(BaseException):
    """A process that ends at this point."""


@contextmanager
def a_process_that_ends() -> Iterator[None]:
    """Remains of this block in a store look like those of an ended process of this machine."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        ended = re.sub("~.*", f"~{process.pid}~1", this_process())
    assert has_ended(ended)
    with mock.patch("slmops.infra.storage.leases.this_process", lambda: ended):
        yield


class CrashingStore:
    """A store whose process ends before its n-th write, which leaves what an end after the write before it would."""

    WRITES = ("put_bytes", "put_bytes_if_absent", "delete", "remove_leftovers")

    def __init__(self, store: ObjectStore, at: int) -> None:
        self._store, self._at, self.writes = store, at, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return functools.partial(self._write, found) if name in self.WRITES else found

    def _write(self, write: Callable[..., Any], *arguments: Any) -> Any:
        self.writes += 1
        if self.writes == self._at:
            raise Crash
        return write(*arguments)

    def put_blobs(self, files: Sequence[tuple[Blob, Path]], on_bytes: OnBytes = no_report) -> None:
        for file in files:
            self._write(self._store.put_blobs, [file], on_bytes)


def test_a_crash_at_any_write_leaves_no_half_version(store: StoreCase, tmp_path: Path) -> None:
    crashed = True
    at = 0
    while crashed:
        at += 1
        name, files = f"home-{at}", {name: content + bytes([at]) for name, content in FILES.items()}
        crashed = False
        try:
            with a_process_that_ends():
                commit(ModelRegistry(CrashingStore(store.open(tmp_path), at)), tmp_path, files, name)
        except Crash:
            crashed = True
        registry = ModelRegistry(store.open(tmp_path))
        for version in registry.versions(name):
            assert registry.has_files(version.variants[0].files)
        was_there = bool(registry.versions(name))
        manifest, is_new = commit(registry, tmp_path, files, name)
        assert (manifest.version, is_new) == (1, not was_there)
        assert set(files.values()) <= set(blobs(registry).values())
    assert at > len(FILES) + 3


def test_a_crash_in_a_delete_leaves_a_complete_version_or_none(store: StoreCase, tmp_path: Path) -> None:
    crashed = True
    at = 0
    while crashed:
        at += 1
        registry = ModelRegistry(store.open(tmp_path))
        name, shared = f"home-{at}", {"model.onnx": b"shared %d" % at}
        manifest, _ = commit(registry, tmp_path, {**shared, "own": b"own %d" % at}, name)
        kept, _ = commit(registry, tmp_path, {**shared, "other": b"other"}, name=f"away-{at}")
        add_evidence(registry, manifest, "verdict", {"passed": True})
        registry.set_alias(name, CHAMPION, 1, "first")
        crashed = False
        try:
            with a_process_that_ends():
                delete_version(ModelRegistry(CrashingStore(store.open(tmp_path), at)).of(manifest))
        except Crash:
            crashed = True
        assert registry.has_files(kept.variants[0].files)
        for found in registry.versions(name):
            assert registry.has_files(found.variants[0].files)
        if not registry.versions(name):
            collect_garbage(registry)
            keys = [entry.key for entry in registry.objects.entries(f"models/{name}") if "/history/" not in entry.key]
            assert keys == [f"models/{name}/1/deleted.json", f"models/{name}/1/manifest.json"]
            assert b"own %d" % at not in blobs(registry).values()
        assert registry.has_files(kept.variants[0].files)
    assert at > 5


COMMITTER = """
import sys
from pathlib import Path
from slmops.infra.settings import load_settings
from slmops.infra.storage.manifest import Source, StoredVariant
from slmops.infra.storage.opening import open_registry

root, mine = Path(sys.argv[1]), sys.argv[2]
registry = open_registry(load_settings())
source = Source(digest="a" * 64, origin=mine, architecture="x", parameters=1)
for line in sys.stdin:  # one line starts one round, in both processes at once
    number, kind = line.split()
    content = f"{number} shared" if kind == "same" else f"{number} {mine}"
    folder = root / f"{mine}-{number}"
    folder.mkdir()
    (folder / "model.onnx").write_text(content)
    files = registry.add_files(folder)
    made = StoredVariant(
        precision="int4", device="cpu", execution_provider="cpu", recipe="r", recipe_digest="b" * 64, files=files
    )
    manifest, is_new = registry.commit("home", source, {}, [made])
    registry.release_files()
    print(manifest.version, int(is_new), flush=True)
"""


def test_two_processes_commit_to_one_name_at_once(store: StoreCase, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COMMITTER, str(tmp_path), mine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SLMOPS_HOME": str(tmp_path / f"home-{mine}"),
                **store.environment(),
            },
        )
        for mine in ("left", "right")
    ]
    expected = 0
    for number in range(12):
        kind = "same" if number % 2 else "own"
        for process in processes:
            assert process.stdin
            process.stdin.write(f"{number} {kind}\n")
            process.stdin.flush()
        rounds = []
        for process in processes:
            assert process.stdout
            version, is_new = process.stdout.readline().split()
            rounds.append((int(version), bool(int(is_new))))
        expected += 1 if kind == "same" else 2
        versions, new = {version for version, _ in rounds}, [is_new for _, is_new in rounds]
        assert len(versions) == (1 if kind == "same" else 2)
        assert sorted(new) == ([False, True] if kind == "same" else [True, True])
        assert max(versions) == expected or store.kind == "rclone"
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    registry = store.registry(tmp_path / "home")
    numbers = [version.number for version in registry.versions("home")]
    # Without conditional writes a number may be skipped, but none is shared.
    assert numbers == list(range(1, 19)) or (store.kind == "rclone" and len(set(numbers)) == 18)
    assert len({version.manifest.identity for version in registry.versions("home")}) == 18
    assert list(registry.objects.entries("leases")) == []
