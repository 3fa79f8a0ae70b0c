"""Versions as single files: the restored content, reproducible archives, and everything that is refused."""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.storage import archive
from slmops.infra.storage import tar as tar_file
from slmops.infra.storage.archive import export_version, import_version
from slmops.infra.storage.garbage import delete_version
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest, Source
from slmops.infra.storage.origin import unmarked
from slmops.infra.storage.registry import CHAMPION, ModelRegistry
from slmops.infra.storage.verification import verify_version
from tests.support.errors import coded
from tests.support.versions import add_evidence, latest_evidence, stored_variant, write_files

SOURCE = Source(digest="a" * 64, origin="/checkpoints/home", architecture="Qwen2ForCausalLM", parameters=494_000_000)
INT4 = {"model.onnx": b"graph", "model.onnx.data": bytes(range(256)) * 40, "sub/tokenizer.json": b"{}", "empty": b""}
INT8 = {"model.onnx": b"another graph", "sub/tokenizer.json": b"{}", "ä b.txt": b"text"}
LONG_KEY = "k" * 150
NAME = "models/home/1/"
BLOBS = "blobs/sha256/"

Members = list[tuple[tarfile.TarInfo, bytes]]


class FarStore:
    """A store that behaves like a remote one."""

    def __init__(self, root: Path) -> None:
        self._store = LocalObjectStore(root)

    def __getattr__(self, name: str) -> Any:
        if name in ("blob_path", "adopt_blob", "aside"):
            raise AttributeError(name)
        return getattr(self._store, name)


def make_version(
    registry: ModelRegistry,
    work: Path,
    variants: dict[str, dict[str, bytes]] | None = None,
    *,
    evidence: bool = True,
) -> Manifest:
    stored = []
    for precision, files in (variants or {"int4": INT4, "int8": INT8}).items():
        with TemporaryDirectory(dir=work) as folder:
            write_files(Path(folder), files)
            stored.append(stored_variant(registry, Path(folder), precision))
    manifest, _ = registry.commit("home", SOURCE, {"olive-ai": "0.13.0"}, stored)
    registry.release_files()
    if evidence:
        add_evidence(registry, manifest, "measurement", {"ttft_ms": 7.3}, LONG_KEY)
        add_evidence(registry, manifest, "deploy", {"variants": [{"precision": "int4", "status": "registered"}]})
        registry.of(manifest).put_report("report.md", "# home@1 äöü\n")
        registry.of(manifest).put_report("report.html", "<h1>home@1</h1>\n")
    return manifest


def local_registry(root: Path) -> ModelRegistry:
    return ModelRegistry(LocalObjectStore(root))


def files_below(folder: Path) -> dict[str, bytes]:
    paths = folder.rglob("*") if folder.is_dir() else []
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def versions_files(folder: Path) -> dict[str, bytes]:
    """The versions of a store, without aliases and their history, whose times are those of the copy."""
    return {key: data for key, data in files_below(folder).items() if not {"aliases", "history"} & set(key.split("/"))}


class Exported:
    """A version in a store, its archive, and a target and a staging folder that are empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = local_registry(folder / "source")
        self.manifest = make_version(self.source, folder)
        self.file = folder / "home.tar"
        self.written = export_version(self.source, self.manifest, self.file)
        self.staging = folder / "staging"
        self.target_root = folder / "target"
        self.target = local_registry(self.target_root)

    def members(self) -> Members:
        with tarfile.open(self.file, "r:") as tar:
            members = [(member, tar.extractfile(member)) for member in tar.getmembers()]
            return [(tarfile_info(member.name), stream.read()) for member, stream in members if stream]

    def run(self, file: Path | None = None, **options: Any) -> Any:
        return import_version(file or self.file, self.target, self.staging, **options)

    def assert_nothing_is_left(self) -> None:
        assert files_below(self.staging) == files_below(self.target_root) == {}
        assert not self.staging.exists() or list(self.staging.iterdir()) == []

    def assert_refused(self, said: str, file: Path | None = None) -> BadInput:
        with pytest.raises(BadInput, match=said) as caught:
            self.run(file)
        self.assert_nothing_is_left()
        assert str(file or self.file) in caught.value.message
        return caught.value


def tarfile_info(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member


def pack(file: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(file, "w", format=form) as tar:
        for member, data in members:
            if member.type == tarfile.REGTYPE:
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    return Exported(tmp_path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An archive that tests only read, and do not import."""
    return Exported(tmp_path_factory.mktemp("archive"))


class TestRoundTrip:
    def test_the_version_its_files_and_its_evidence_come_back(self, exported: Exported) -> None:
        copied = exported.run()
        assert (copied.version.manifest, copied.is_new) == (exported.manifest, True)
        assert copied.moved_bytes == sum(map(len, {*INT4.values(), *INT8.values()}))
        found = {key: unmarked(data) for key, data in versions_files(exported.target_root).items()}
        assert found == versions_files(exported.folder / "source")
        for precision, files in (("int4", INT4), ("int8", INT8)):
            exported.target.materialize(copied.version.manifest.variant(precision).files, exported.folder / precision)
            assert files_below(exported.folder / precision) == files
        assert verify_version(exported.target.of(copied.version.manifest)).ok
        assert exported.target.alias("home", CHAMPION) is None
        assert latest_evidence(exported.target, copied.version.manifest, "measurement", LONG_KEY) is None
        assert latest_evidence(exported.target, copied.version.manifest, "measurement") is not None
        assert list(exported.staging.iterdir()) == []

    def test_the_second_import_changes_nothing(self, exported: Exported) -> None:
        exported.run()
        before = files_below(exported.target_root)
        again = exported.run()
        assert (again.is_new, again.moved_bytes) == (False, 0)
        assert files_below(exported.target_root) == before

    def test_the_result_describes_what_was_written(self, exported: Exported) -> None:
        data = exported.file.read_bytes()
        assert exported.written.file == exported.file
        assert exported.written.size_bytes == len(data)
        assert exported.written.sha256 == hashlib.sha256(data).hexdigest()

    def test_two_exports_are_equal_to_the_byte_also_from_the_store_that_it_was_imported_to(
        self, exported: Exported
    ) -> None:
        copied = exported.run()
        other = exported.folder / "other.tar"
        assert export_version(exported.target, copied.version.manifest, other).sha256 == exported.written.sha256
        assert other.read_bytes() == exported.file.read_bytes()

    def test_other_programs_read_it(self, exported: Exported) -> None:
        with tarfile.open(exported.file, "r:") as tar:
            members = tar.getmembers()
        names = [member.name for member in members]
        shared = {*INT4.values(), *INT8.values()}
        assert names[0] == f"{NAME}manifest.json"
        assert names[1 : -len(shared)] == sorted(names[1 : -len(shared)])
        assert f"{NAME}evidence/measurement-{LONG_KEY}.json" in names
        assert names[-len(shared) :] == sorted(f"{BLOBS}{hashlib.sha256(content).hexdigest()}" for content in shared)
        assert {
            (member.mode, member.mtime, member.uid, member.gid, member.uname, member.gname) for member in members
        } == {(0o644, 0, 0, 0, "", "")}

    def test_a_version_without_evidence_or_without_files(self, exported: Exported) -> None:
        bare = make_version(exported.source, exported.folder, {"fp16": {"empty": b""}}, evidence=False)
        none, _ = exported.source.commit("none", SOURCE, {}, [])
        for manifest in (bare, none):
            file = exported.folder / f"{manifest.reference}.tar"
            assert export_version(exported.source, manifest, file).size_bytes == tarfile.RECORDSIZE
            assert exported.run(file).version.manifest == manifest

    def test_progress_is_reported_in_bytes_and_ends_at_the_total(self, exported: Exported) -> None:
        told: list[tuple[float, float, str]] = []
        export_version(exported.source, exported.manifest, exported.folder / "2.tar", lambda *one: told.append(one))
        exported.run(on_progress=lambda *one: told.append(one))
        verbs = [text.split()[0] for _, _, text in told]
        assert list(dict.fromkeys(verbs)) == ["exporting:", "unpacking:", "copying:"]
        whole = sum(map(len, {*INT4.values(), *INT8.values()}))
        for verb in set(verbs):
            assert [report[:2] for report in told if report[2].startswith(verb)][-1] == (whole, whole)

    def test_from_and_to_a_store_that_is_not_on_this_machine(self, exported: Exported) -> None:
        for name, cache in (("with-cache", LocalObjectStore(exported.folder / "cache")), ("without-cache", None)):
            far = ModelRegistry(FarStore(exported.folder / name), cache)
            copied = import_version(exported.file, far, exported.staging)
            assert copied.version.manifest == exported.manifest
            file = exported.folder / f"{name}.tar"
            before = set(exported.folder.iterdir())
            export_version(far, copied.version.manifest, file)
            assert file.read_bytes() == exported.file.read_bytes()
            assert set(exported.folder.iterdir()) - before <= {file, exported.folder / "cache"}

    def test_a_member_of_8_gib_and_more(self, tmp_path: Path) -> None:
        size_bytes = (8 << 30) + 5
        with (tmp_path / "large.tar").open("wb") as file:
            file.write(tar_file.header_of(f"{BLOBS}{'a' * 64}", size_bytes))
            file.truncate(tar_file.whole_size(file.tell() + size_bytes))
        with tar_file.opened_tar(tmp_path / "large.tar") as reader:
            member = reader.next()
        assert member is not None
        assert (member.name, member.size) == (f"{BLOBS}{'a' * 64}", size_bytes)
        with tarfile.open(tmp_path / "large.tar", "r:") as tar:
            assert [member.size for member in tar.getmembers()] == [size_bytes]


class TestConflicts:
    def test_a_number_that_is_anothers_is_refused_and_renumber_takes_the_next(self, exported: Exported) -> None:
        other = make_version(exported.target, exported.folder, {"int4": {"model.onnx": b"other"}})
        before = files_below(exported.target_root)
        with pytest.raises(BadInput, check=coded("version-taken", "home@1")) as caught:
            exported.run()
        assert "--renumber" in caught.value.what_to_do
        assert files_below(exported.target_root) == before
        assert list(exported.staging.iterdir()) == []
        copied = exported.run(renumber=True)
        assert (copied.version.manifest.reference, copied.is_new) == ("home@2", True)
        assert copied.version.manifest.identity == exported.manifest.identity
        assert exported.target.versions("home") == [exported.target.of(other), copied.version]
        assert verify_version(exported.target.of(copied.version.manifest)).ok
        assert exported.run(renumber=True).version.manifest == copied.version.manifest

    def test_a_renumbered_version_is_exported_and_imported_like_any_other(self, exported: Exported) -> None:
        make_version(exported.target, exported.folder, {"int4": {"model.onnx": b"other"}})
        copied = exported.run(renumber=True)
        export_version(exported.target, copied.version.manifest, exported.folder / "second.tar")
        third = local_registry(exported.folder / "third")
        assert (
            import_version(exported.folder / "second.tar", third, exported.staging).version.manifest
            == copied.version.manifest
        )
        assert verify_version(third.of(copied.version.manifest)).ok

    def test_the_number_of_a_deleted_version_stays_taken(self, exported: Exported) -> None:
        exported.run()
        delete_version(exported.target.of(exported.manifest))
        with pytest.raises(BadInput, check=coded("version-taken", "home@1")):
            exported.run()
        assert exported.run(renumber=True).version.manifest.version == 2


class TestExportRefuses:
    def test_a_file_that_exists(self, exported: Exported) -> None:
        (exported.folder / "dangling.tar").symlink_to(exported.folder / "nowhere")
        for name in ("home.tar", "source", "dangling.tar"):
            with pytest.raises(BadInput, check=coded("archive-exists", name)):
                export_version(exported.source, exported.manifest, exported.folder / name)
        assert hashlib.sha256(exported.file.read_bytes()).hexdigest() == exported.written.sha256

    def test_a_folder_that_cannot_be_written_to(self, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
        for folder in ("missing", "home.tar"):
            with pytest.raises(BadInput, check=coded("folder-missing")):
                export_version(exported.source, exported.manifest, exported.folder / folder / "x.tar")

        def refuse(_path: Path, mode: str = "r", *_: Any, **__: Any) -> Any:
            assert mode == "xb"
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(BadInput, check=coded("folder-not-writable", "Permission denied")):
            export_version(exported.source, exported.manifest, exported.folder / "x.tar")

    @pytest.mark.parametrize("content", [b"altered", b"", None])
    def test_content_that_the_store_has_lost_or_altered(self, content: bytes | None, exported: Exported) -> None:
        weights = exported.manifest.variant("int4").files
        file = next(file for file in weights if file.path == "model.onnx.data")
        path = exported.folder / "source/blobs/sha256" / file.sha256
        path.chmod(0o644)
        path.unlink()
        if content is not None:
            path.write_bytes(content.ljust(file.size_bytes, b"x") if content else content)
        with pytest.raises(
            StageFailed, check=coded("content-lost" if content is None else "content-altered", "model.onnx.data")
        ):
            export_version(exported.source, exported.manifest, exported.folder / "x.tar")
        assert_only_old_files(exported)

    @pytest.mark.parametrize(
        ("key", "data", "said"),
        [
            ("manifest.json", lambda old: old + b"\n", "its manifest is not written as"),
            ("evidence/report.md", lambda _: b"\xff", "'report.md' is not UTF-8"),
            ("evidence/new.json", lambda _: b"{", "'new.json' is not JSON"),
            ("evidence/a b.json", lambda _: b"{}", "'a b.json' is not a valid name"),
            ("evidence/model.bin", lambda _: b"{}", "'model.bin' is not a valid name"),
        ],
    )
    def test_what_import_would_refuse(
        self, key: str, data: Callable[[bytes], bytes], said: str, exported: Exported
    ) -> None:
        path = exported.folder / "source" / NAME / key
        path.write_bytes(data(path.read_bytes() if path.exists() else b""))
        with pytest.raises(StageFailed, check=coded("version-not-exportable", "home@1", said)):
            export_version(exported.source, exported.manifest, exported.folder / "x.tar")
        assert_only_old_files(exported)

    @pytest.mark.parametrize("limit", ["MOST_MANIFEST_BYTES", "MOST_EVIDENCE_BYTES"])
    def test_what_is_larger_than_import_takes(
        self, limit: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(archive, limit, 10)
        with pytest.raises(StageFailed, check=coded("version-not-exportable", "at most 10")):
            export_version(exported.source, exported.manifest, exported.folder / "x.tar")
        assert_only_old_files(exported)

    def test_content_that_cannot_be_read(self, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path) -> Any:
            assert path.parent.name == "sha256"
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(archive, "open_regular", refuse)
        with pytest.raises(StageFailed, check=coded("content-unreadable", "Input/output error")):
            export_version(exported.source, exported.manifest, exported.folder / "x.tar")
        assert_only_old_files(exported)

    def test_a_disk_that_takes_no_more_files(self, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_path: Path, *_: Any, **__: Any) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(StageFailed, check=coded("folder-not-writable", "No space left")):
            export_version(exported.source, exported.manifest, exported.folder / "x.tar")

    def test_more_evidence_than_an_archive_holds(self, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(archive, "MOST_EVIDENCE_FILES", 3)
        with pytest.raises(StageFailed, check=coded("evidence-too-much", "4 files")):
            export_version(exported.source, exported.manifest, exported.folder / "x.tar")
        exported.assert_refused("exceeds the limit")

    def test_a_version_that_was_deleted_meanwhile(self, exported: Exported) -> None:
        (exported.folder / "source" / NAME / "manifest.json").unlink()
        with pytest.raises(StageFailed, check=coded("content-lost", "models/home/1/manifest.json")):
            export_version(exported.source, exported.manifest, exported.folder / "x.tar")
        assert_only_old_files(exported)


def assert_only_old_files(exported: Exported) -> None:
    assert {path.name for path in exported.folder.iterdir()} == {"source", "home.tar"}


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


@contextlib.contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestFullDisk:
    def test_an_export_that_cannot_be_flushed(self, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
        fill_disk(monkeypatch)
        with pytest.raises(StageFailed, check=coded("disk-failed", "x.tar", "No space left on device")) as caught:
            export_version(exported.source, exported.manifest, exported.folder / "x.tar")
        assert "free space" in caught.value.what_to_do
        assert_only_old_files(exported)

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
    def test_an_export_that_breaks_off_in_the_middle(self, exported: Exported) -> None:
        with files_of_at_most(9_000), pytest.raises(StageFailed, check=coded("disk-failed", "x.tar", "File too large")):
            export_version(exported.source, exported.manifest, exported.folder / "x.tar")
        assert_only_old_files(exported)

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
    def test_an_import_that_breaks_off_in_the_middle(self, exported: Exported) -> None:
        with (
            files_of_at_most(9_000),
            pytest.raises(StageFailed, check=coded("disk-failed", "unpacked", "File too large")),
        ):
            exported.run()
        exported.assert_nothing_is_left()

    def test_an_import_that_cannot_be_flushed(self, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
        fill_disk(monkeypatch)
        with pytest.raises(StageFailed, check=coded("disk-failed", "No space left on device")):
            exported.run()
        exported.assert_nothing_is_left()

    def test_too_little_room_is_reported_before_anything_is_written(
        self, exported: Exported, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        content = sum(map(len, {*INT4.values(), *INT8.values()}))
        room = [0]
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, room[0]))
        room[0] = content - 1
        with pytest.raises(StageFailed, check=coded("disk-full", "has 0.0 MB free", "takes 0.0 MB")):
            export_version(exported.source, exported.manifest, exported.folder / "x.tar")
        room[0] = exported.written.size_bytes + content - 1  # unpacked, and once more in the store beside
        with pytest.raises(StageFailed, check=coded("disk-full", "has 0.0 MB free")):
            exported.run()
        exported.assert_nothing_is_left()
        room[0] += 1
        assert exported.run().is_new
        room[0] = exported.written.size_bytes  # the store has it already
        assert not exported.run().is_new

    def test_a_staging_folder_that_cannot_be_made(self, exported: Exported) -> None:
        exported.staging.write_bytes(b"a file")
        with pytest.raises(StageFailed, check=coded("disk-failed", "staging")):
            exported.run()
        assert files_below(exported.target_root) == {}


def insert(index: int, name: str, data: bytes = b"{}", **fields: Any) -> Callable[[Members], Members]:
    def changed(members: Members) -> Members:
        members.insert(index % (len(members) + 1), (tarfile_info(name, **fields), data))
        return members

    return changed


def same_but(**fields: Any) -> Callable[[Members], Members]:
    """The last blob, with other fields in its header."""

    def changed(members: Members) -> Members:
        for field, value in fields.items():
            setattr(members[-1][0], field, value)
        return members

    return changed


def swapped(first: int, second: int) -> Callable[[Members], Members]:
    def changed(members: Members) -> Members:
        members[first], members[second] = members[second], members[first]
        return members

    return changed


def altered(index: int, change: Callable[[bytes], bytes]) -> Callable[[Members], Members]:
    def changed(members: Members) -> Members:
        member, data = members[index]
        members[index] = (member, change(data))
        return members

    return changed


def evidence(name: str, data: bytes) -> Callable[[Members], Members]:
    return insert(1, f"{NAME}evidence/{name}", data)


LARGEST = f"{BLOBS}{hashlib.sha256(INT4['model.onnx.data']).hexdigest()}"
OUT_OF_PLACE = "does not belong to home@1|comes twice or out of order"

MEMBERS: dict[str, tuple[Callable[[Members], Members], str]] = {
    "parent folder": (insert(-1, "../x"), OUT_OF_PLACE),
    "parent folder first": (insert(0, "../x"), r"\.\./x comes before the manifest"),
    "parent folder in a name": (insert(1, f"{NAME}evidence/../x.json"), "is not a valid name of a record"),
    "parent folder after a blob": (insert(-1, f"{BLOBS}../../x"), OUT_OF_PLACE),
    "absolute": (insert(-1, "/x"), OUT_OF_PLACE),
    "backslash": (insert(-1, "a\\b"), r"'a\\\\b' is not a valid name"),
    "backslash in a record": (insert(1, f"{NAME}evidence/a\\b.json"), r"a\\\\b.json' is not a valid name"),
    "drive": (insert(-1, "C:x"), "'C:x' is not a valid name"),
    "double slash": (insert(1, f"{NAME}evidence//x.json"), "is not a valid name of a record"),
    "NUL": (insert(1, f"{NAME}evidence/a.json\0b.json"), "a header that slmops export does not write"),
    "line feed": (insert(1, f"{NAME}evidence/a.json\n"), r"\\n' is not a valid name"),
    "terminal's escape": (insert(1, f"{NAME}evidence/\x1b[2J.json"), r"\\x1b\[2J\.json' is not a valid name"),
    "not ASCII": (insert(1, f"{NAME}evidence/ä.json"), "is not a valid name"),
    "look-alike": (insert(-1, "blobs\u2215sha256/" + "a" * 64), "is not a valid name"),
    "not ASCII in a blob": (insert(-1, BLOBS + "а" * 64), "is not a valid name"),  # noqa: RUF001
    "empty name": (insert(1, ""), "is not a valid name"),
    "hidden record": (insert(1, f"{NAME}evidence/.json"), "is not a valid name of a record"),
    "record in a folder": (insert(1, f"{NAME}evidence/sub/x.json"), "is not a valid name of a record"),
    "record of another version": (insert(-1, "models/home/2/evidence/x.json"), OUT_OF_PLACE),
    "record with a long name": (insert(1, f"{NAME}evidence/{'x' * 196}.json"), "is not a valid name of a record"),
    "another kind of record": (insert(1, f"{NAME}evidence/x.exe"), "is not a valid name of a record"),
    "alias": (insert(-1, "models/home/aliases/champion"), OUT_OF_PLACE),
    "lease": (insert(-1, "leases/x"), OUT_OF_PLACE),
    "symbolic link": (
        insert(1, f"{NAME}evidence/x.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "symbolic link",
    ),
    "hard link": (insert(-1, LARGEST, type=tarfile.LNKTYPE, linkname="../../x"), "is a hard link, not a plain file"),
    "pipe": (insert(1, f"{NAME}evidence/x.json", type=tarfile.FIFOTYPE), "is a pipe"),
    "character device": (insert(1, f"{NAME}evidence/x.json", type=tarfile.CHRTYPE, devmajor=1), "is a device"),
    "block device": (insert(1, f"{NAME}evidence/x.json", type=tarfile.BLKTYPE, devmajor=8), "is a device"),
    "folder": (insert(1, f"{NAME}evidence", type=tarfile.DIRTYPE), "is a folder"),
    "folder first": (insert(0, "models", type=tarfile.DIRTYPE), "is a folder"),
    "sparse file": (same_but(type=tarfile.GNUTYPE_SPARSE), "is a sparse file"),
    "contiguous file": (same_but(type=tarfile.CONTTYPE), "is of a kind of tar"),
    "file of an old tar": (same_but(type=tarfile.AREGTYPE), "is of a kind of tar"),
    "unknown kind": (same_but(type=b"Z"), "is of a kind of tar"),
    "sparse file of pax": (
        same_but(pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}),
        "has a header that",
    ),
    "comment of pax": (same_but(pax_headers={"comment": "hello"}), "has a header that"),
    "another size by pax": (same_but(pax_headers={"size": "1"}), "has a header that"),
    "another name by pax": (same_but(pax_headers={"path": "../x"}), "has a header that"),
    "mode": (same_but(mode=0o4755), "has a header that"),
    "owner": (same_but(uid=1000), "has a header that"),
    "owner's name": (same_but(uname="root"), "has a header that"),
    "time": (same_but(mtime=1), "has a header that"),
    "fraction of a second": (same_but(mtime=1.5), "has a header that"),
    "link's name": (same_but(linkname="x"), "has a header that"),
    "blob that the manifest does not name": (insert(-1, f"{BLOBS}{'f' * 64}"), OUT_OF_PLACE),
    "blob altered by one byte": (altered(-2, lambda data: bytes([data[0] ^ 1]) + data[1:]), "was altered: its SHA-256"),
    "blob longer": (altered(-1, lambda data: data + b"\0"), "bytes by its header, and .* by the manifest"),
    "blob shorter": (altered(-1, lambda data: data[:-1]), "bytes by its header, and .* by the manifest"),
    "blob missing": (lambda members: members[:-1], r"int./.* \(blobs/sha256/[0-9a-f]{64}\) is not in it"),
    "all blobs missing": (
        lambda members: [member for member in members if not member[0].name.startswith(BLOBS)],
        "is not in it|names more bytes",
    ),
    "blob twice": (lambda members: [*members, members[-1]], "comes twice"),
    "record twice": (lambda members: [*members[:2], *members[1:]], "comes twice"),
    "manifest twice": (lambda members: [members[0], *members], "manifest.json comes twice|does not belong"),
    "second manifest": (insert(-1, "models/home/2/manifest.json"), "models/home/2/manifest.json (does not|comes)"),
    "second manifest before the blobs": (insert(1, "models/away/1/manifest.json"), "out of order|does not belong"),
    "blob before the manifest": (swapped(0, -1), "comes before the manifest"),
    "record before the manifest": (swapped(0, 1), "comes before the manifest"),
    "records out of order": (swapped(1, 2), "out of order"),
    "blobs out of order": (swapped(-1, -2), "out of order"),
    "record after the blobs": (swapped(1, -1), "out of order"),
    "no manifest": (lambda members: members[1:], "comes before the manifest"),
    "no member": (lambda _: [], "does not begin with a manifest"),
    "record that is no JSON": (evidence("a.json", b"{"), r"a\.json is not JSON"),
    "record that is empty": (evidence("a.json", b""), r"a\.json is not JSON"),
    "record that is not UTF-8": (evidence("a.json", b'{"\xff": 1}'), r"a\.json is not JSON"),
    "record that is a list": (evidence("a.json", b"[]"), "is not a record"),
    "record without content": (
        evidence("a.json", b'{"kind": "a", "manifest": "x", "recorded_at": "x"}'),
        "is not a record, which has kind, manifest, recorded_at, content",
    ),
    "record whose content is a list": (
        evidence("a.json", b'{"kind": "a", "manifest": "x", "recorded_at": "x", "content": []}'),
        "is not a record",
    ),
    "record on another manifest": (
        evidence("a.json", b'{"kind": "a", "manifest": "\\u001b", "recorded_at": "x", "content": {}}'),
        r"a\.json is on another manifest, '\\x1b'",
    ),
    "deploy without variants": (
        evidence("deploy-a.json", b'{"kind": "deploy", "manifest": "x", "recorded_at": "x", "content": {}}'),
        "without the status of its variants",
    ),
    "deploy of variants without status": (
        evidence(
            "deploy-a.json",
            b'{"kind": "deploy", "manifest": "x", "recorded_at": "x", "content": {"variants": [{}]}}',
        ),
        "without the status of its variants",
    ),
    "record that is not finite": (evidence("a.json", b'{"content": NaN}'), "is not JSON"),
    "record that is deep": (evidence("a.json", b"[" * 100_000 + b"]" * 100_000), "is not JSON"),
    "report that is not UTF-8": (evidence("a.md", b"\xff"), "is not UTF-8"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_a_member_that_is_not_as_export_writes_it_is_refused(case: str, kept: Exported, tmp_path: Path) -> None:
    change, said = MEMBERS[case]
    pack(tmp_path / "hostile.tar", change(kept.members()))
    error = kept.assert_refused(said, tmp_path / "hostile.tar")
    assert "Nothing was imported" in error.what_to_do
    assert error.message.isprintable()


def test_what_was_taken_apart_and_put_together_unchanged_is_the_same_archive(kept: Exported, tmp_path: Path) -> None:
    pack(tmp_path / "same.tar", kept.members())
    assert (tmp_path / "same.tar").read_bytes() == kept.file.read_bytes()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_another_dialect_of_tar_is_refused(form: int, kept: Exported, tmp_path: Path) -> None:
    members = kept.members()
    if form == tarfile.USTAR_FORMAT:
        members = [member for member in members if len(member[0].name) < 150]
        members[1][0].name = f"{NAME}evidence/{'d' * 90}.json"
    pack(tmp_path / "hostile.tar", members, form)
    kept.assert_refused("header that|kind of tar", tmp_path / "hostile.tar")


def test_a_global_header_is_refused(kept: Exported, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "hostile.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "x"}) as tar:
        for member, data in kept.members():
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    kept.assert_refused("header that slmops export does not write", tmp_path / "hostile.tar")


def test_a_header_that_is_damaged_is_no_end(kept: Exported, tmp_path: Path) -> None:
    data = bytearray(kept.file.read_bytes())
    data[data.rindex(b"blobs/sha256/")] ^= 1
    (tmp_path / "hostile.tar").write_bytes(data)
    kept.assert_refused(r"its header at byte [0-9,]+ is damaged \(bad checksum\)", tmp_path / "hostile.tar")


def manifest_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        value = json.loads(data)
        change(value)
        return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()

    return changed


def first_file(**fields: Any) -> Callable[[bytes], bytes]:
    return manifest_of(lambda value: value["variants"][0]["files"][0].update(fields))


def first_variant(**fields: Any) -> Callable[[bytes], bytes]:
    return manifest_of(lambda value: value["variants"][0].update(fields))


def field(**fields: Any) -> Callable[[bytes], bytes]:
    return manifest_of(lambda value: value.update(fields))


MANIFESTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another's": (field(name="away"), "manifest.json is the manifest of away@1"),
    "another number": (field(version=2), "is the manifest of home@2"),
    "no JSON": (lambda _: b"{", "is not valid"),
    "empty": (lambda _: b"", "is not valid"),
    "null": (lambda _: b"null", "is not valid"),
    "list": (lambda _: b"[]", "is not valid"),
    "variants that are none": (field(variants="none"), "is not valid: 'variants'"),
    "variants that are numbers": (field(variants=[0]), "is not valid"),
    "files that are none": (first_variant(files="none"), "is not valid"),
    "files that are numbers": (first_variant(files=[0]), "is not valid"),
    "unknown field": (field(signed_by="me"), "is not valid: 'signed_by': Extra inputs"),
    "no source": (manifest_of(lambda value: value.pop("source")), "is not valid: 'source': Field required"),
    "other layout": (lambda data: json.dumps(json.loads(data)).encode(), "is not written as slmops writes"),
    "one more line feed": (lambda data: data + b"\n", "is not written as slmops writes"),
    "key twice": (lambda data: data.replace(b"{", b'{\n  "name": "other",', 1), "is not written as slmops writes"),
    "number as a text": (field(version="1"), "is not written as slmops writes"),
    "not UTF-8": (lambda data: data.replace(b"/checkpoints", b"/\xff\xfe"), "is not valid"),
    "deep": (lambda _: b"[" * 100_000, "is not valid"),
    "many keys": (lambda _: json.dumps({str(number): 0 for number in range(100_000)}).encode(), "more than 200 keys"),
    "many variants": (field(variants=[{}] * 300_000), "is not valid"),
    "many files": (first_variant(files=[{}] * 300_000), "is not valid"),
    "number of a million digits": (
        lambda data: data.replace(b'"size_bytes": 0', b'"size_bytes": ' + b"9" * 1_000_000),
        "is not valid",
    ),
    "size of 4,300 digits": (first_file(size_bytes=int("9" * 4300)), "names more bytes than the"),
    "size that is negative": (first_file(size_bytes=-1), "is not valid"),
    "more bytes than there are": (first_file(size_bytes=1 << 50), "names more bytes than the"),
    "another size": (first_file(size_bytes=1), "is on another manifest"),
    "two sizes": (
        manifest_of(
            lambda value: value["variants"][1]["files"].append(
                {**value["variants"][0]["files"][1], "path": "x", "size_bytes": 3}
            )
        ),
        "two sizes",
    ),
    "two variants of one precision": (first_variant(precision="int8"), "a precision is named twice"),
    "precision that leads out": (first_variant(precision="../../x"), "'precision': String should match"),
    "precision that is empty": (first_variant(precision=""), "'precision': String should match"),
    "device that leads out": (first_variant(device="x/../.."), "'device': String should match"),
    "path that leads out": (first_file(path="../x"), "is not valid"),
    "absolute path": (first_file(path="/x"), "is not valid"),
    "path with a NUL": (first_file(path="a\0b"), "is not valid"),
    "path with an escape": (first_file(path="a\x1b[2Jb"), "is not valid"),
    "path with a double slash": (first_file(path="a//b"), "is not valid"),
    "path of many folders": (first_file(path="a/" * 400_000 + "b"), "cannot be placed"),
    "path with a long name": (first_file(path="a" * 256), "a part of more than 255 bytes"),
    "path of a device of Windows": (first_file(path="tokenizer/CON.json"), "name of a device on Windows"),
    "path that Windows does not allow": (first_file(path="what?.json"), "which Windows does not allow"),
    "path with a dot at its end": (first_file(path="a./b"), "ends with a dot or a space"),
    "path that leads out, and is long": (first_file(path="a/" * 1_000_000 + "../b"), "is not valid"),
    "path with a dot": (first_file(path="a/./b"), "is not valid"),
    "path that is another's folder": (first_file(path="model.onnx/x"), "model.onnx is a file and a folder"),
    "path that is another's": (first_file(path="model.onnx"), "a file is named twice"),
    "path that is another's in capitals": (
        first_file(path="Model.ONNX"),
        "differ by case or by the form of an accent only",
    ),
    "digest in capitals": (first_file(sha256="A" * 64), "is not valid"),
    "digest that leads out": (first_file(sha256="../" * 21 + "x"), "is not valid"),
    "a text altered": (lambda data: data.replace(b"/checkpoints/home", b"/checkpoints/homf"), "is on another manifest"),
    "a file more": (
        manifest_of(
            lambda value: value["variants"][0]["files"].append({"path": "x", "sha256": "0" * 64, "size_bytes": 3})
        ),
        "is on another manifest",
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_cannot_be_relied_on_is_refused(case: str, kept: Exported, tmp_path: Path) -> None:
    change, said = MANIFESTS[case]
    pack(tmp_path / "hostile.tar", altered(0, change)(kept.members()))
    began = time.monotonic()
    error = kept.assert_refused(said, tmp_path / "hostile.tar")
    assert time.monotonic() - began < 60
    assert len(error.message) < 1000


class TestSizes:
    """A member that is too large by its header is refused before it is read."""

    @pytest.mark.parametrize(
        ("index", "size_bytes", "said"),
        [
            (0, 1 << 40, "has 1,099,511,627,776 bytes by its header, but fewer follow"),
            (0, (16 << 20) + 1, "at most 16,777,216 are allowed"),
            (1, (64 << 20) + 1, "at most 67,108,864 are allowed"),
            (-1, 1 << 40, "fewer follow"),
            (-1, 70 << 20, "73,400,320 bytes by its header, and .* by the manifest"),
            (-1, 10**19, "fewer follow"),
            (-1, 1 << 80, "a header that slmops export does not write"),
        ],
    )
    def test_a_bomb(self, index: int, size_bytes: int, said: str, kept: Exported, tmp_path: Path) -> None:
        file = tmp_path / "hostile.tar"
        members = kept.members()
        pack(file, members[: index % len(members)])
        offset = 0
        with tarfile.open(file, "r:") as tar:
            offset = max((member.offset_data + -(-member.size // 512) * 512 for member in tar.getmembers()), default=0)
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(tar_file.header_of(members[index][0].name, size_bytes))
            stream.truncate(100 << 20)  # a sparse file: 100 MiB for everybody who asks
        kept.assert_refused(said, file)

    @pytest.mark.parametrize("number", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"99999999999\0", b"-0000000001\0"])
    def test_a_size_that_is_no_octal_number(self, number: bytes, kept: Exported, tmp_path: Path) -> None:
        data = bytearray(kept.file.read_bytes())
        data[124:136] = number
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        (tmp_path / "hostile.tar").write_bytes(data)
        kept.assert_refused("by its header|is not a tar|header that", tmp_path / "hostile.tar")

    def test_an_extended_header_is_not_read_into_memory(self, kept: Exported, tmp_path: Path) -> None:
        header = tarfile_info("././@PaxHeader", tarfile.XHDTYPE, size=4 << 30).tobuf(tarfile.USTAR_FORMAT)
        with (tmp_path / "hostile.tar").open("wb") as file:
            file.write(header)
            file.truncate(5 << 30)
        kept.assert_refused("is damaged", tmp_path / "hostile.tar")


class TestNoArchive:
    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"", "ends too early, at byte 0"),
            (b"x" * 511, "ends too early, at byte 511"),
            (b"x" * 20_480, "is not a tar"),
            (bytes(10_240), "does not begin with a manifest"),
            (bytes(1024), "has 1,024 bytes and should have 10,240"),
            (b"PK\x03\x04" + bytes(1000), r"compressed \(zip\)"),
            (b"\x28\xb5\x2f\xfd" + bytes(1000), r"compressed \(zstd\)"),
        ],
    )
    def test_garbage(self, data: bytes, said: str, kept: Exported, tmp_path: Path) -> None:
        (tmp_path / "garbage.tar").write_bytes(data)
        kept.assert_refused(said, tmp_path / "garbage.tar")

    @pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
    def test_a_compressed_archive(self, compression: str, kept: Exported, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "hostile.tar", f"w:{compression}") as tar:  # type: ignore[call-overload]
            for member, data in kept.members():
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        error = kept.assert_refused(f"is compressed .*{compression[0]}", tmp_path / "hostile.tar")
        assert "Decompress" in error.what_to_do

    def test_a_gzip_bomb_is_not_opened(self, kept: Exported, tmp_path: Path) -> None:
        (tmp_path / "bomb.tar").write_bytes(gzip.compress(bytes(64 << 20)))
        kept.assert_refused(r"is compressed \(gzip\)", tmp_path / "bomb.tar")

    def test_what_is_no_file(self, kept: Exported, tmp_path: Path) -> None:
        kept.assert_refused("There is no file", tmp_path / "missing")
        kept.assert_refused("is a folder", tmp_path)
        if sys.platform != "win32":
            os.mkfifo(tmp_path / "pipe")
            kept.assert_refused("it is a pipe", tmp_path / "pipe")

    def test_a_file_that_cannot_be_read(self, kept: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_path: Path) -> Any:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        (tmp_path / "home.tar").write_bytes(b"")
        monkeypatch.setattr(tar_file, "open_regular", refuse)
        kept.assert_refused("cannot be read: Permission denied", tmp_path / "home.tar")


def test_an_archive_that_is_cut_off_anywhere_is_refused(kept: Exported, tmp_path: Path) -> None:
    data = kept.file.read_bytes()
    file = tmp_path / "cut.tar"
    for size_bytes in range(0, len(data), 512):
        file.write_bytes(data[:size_bytes])
        kept.assert_refused("cannot be imported", file)


@pytest.mark.parametrize("more", [b"x", b"\0", bytes(512), bytes(10_240), b"x" * 512])
def test_something_after_the_end_is_refused(more: bytes, kept: Exported, tmp_path: Path) -> None:
    (tmp_path / "long.tar").write_bytes(kept.file.read_bytes() + more)
    kept.assert_refused("bytes and should have", tmp_path / "long.tar")


def test_a_second_archive_after_the_end_is_refused(kept: Exported, tmp_path: Path) -> None:
    (tmp_path / "two.tar").write_bytes(kept.file.read_bytes() * 2)
    kept.assert_refused("bytes and should have", tmp_path / "two.tar")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_one_altered_byte_is_refused_or_was_of_the_evidence(kept: Exported, data: st.DataObject) -> None:
    """Files and manifest are checked by their digests, everything else by its form; only evidence has no digest."""
    content = bytearray(kept.file.read_bytes())
    offset = data.draw(st.integers(0, len(content) - 1))
    content[offset] ^= data.draw(st.integers(1, 255))
    with TemporaryDirectory() as folder:
        file, staging, root = (Path(folder) / name for name in ("altered.tar", "staging", "target"))
        file.write_bytes(content)
        try:
            copied = import_version(file, local_registry(root), staging)
        except BadInput:
            assert files_below(root) == {}
        else:
            assert copied.version.manifest == kept.manifest
            assert blobs_of(root) == blobs_of(kept.folder / "source")
            with tarfile.open(kept.file, "r:") as tar:
                places = [
                    member for member in tar.getmembers() if member.offset <= offset < member.offset_data + member.size
                ]
            assert [f"{NAME}evidence/" in member.name for member in places] == [True]
        assert not staging.exists() or list(staging.iterdir()) == []


def blobs_of(root: Path) -> dict[str, bytes]:
    return files_below(root / "blobs")


FIELDS = st.sampled_from([b"", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"00000000777\0", b"77777777777\0", b"x"])
PAX = st.sampled_from(
    [
        *(b"", b"99 path=x\n", b"0 a=b\n", b"12 size=-1\n", b"%d size=%s\n" % (300, b"9" * 290)),
        *(b"19 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", b"30 GNU.sparse.map=1,x\n"),
        *(b"26 hdrcharset=\xff\n", b"30 GNU.sparse.realsize=x\n"),
    ]
)


@settings(max_examples=100, deadline=None)
@given(kinds=st.lists(st.sampled_from(b"\0001234567LKSxgXZ"), max_size=3), size=FIELDS, tail=FIELDS, pax=PAX)
def test_a_header_whose_checksum_is_right_is_read_or_refused(
    kinds: list[int], size: bytes, tail: bytes, pax: bytes
) -> None:
    """Extended headers, sparse maps and long names of any size and in any order: no other error, and no more memory."""
    blocks = b""
    for kind in kinds:
        header = bytearray(tar_file.header_of("a", 0))
        header[124 : 124 + len(size)], header[156], header[483 : 483 + len(tail)] = size, kind, tail
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        blocks += header + pax.ljust(512, b"\0")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "hostile.tar"
        file.write_bytes(blocks.ljust(10_240, b"\0"))
        with pytest.raises(BadInput, check=lambda error: "cannot be imported" in str(error)):
            import_version(file, local_registry(Path(folder) / "target"), Path(folder) / "staging")
