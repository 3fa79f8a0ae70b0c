"""The files of models in an object store: stored as blobs by content, and placed in folders for a runtime."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from slmops.infra.errors import StageFailed
from slmops.infra.process.call import OnProgress
from slmops.infra.storage.holders import temporary_name
from slmops.infra.storage.leases import WriteLease
from slmops.infra.storage.leftovers import ASIDE_ENDING
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest, StoredFile, check_paths, digest_of_file
from slmops.infra.storage.objects import Blob, ObjectStore
from slmops.infra.storage.progress import byte_progress


class ModelFiles:
    """The files of models in an object store.

    A remote store has a `cache` of verified blobs on this machine.
    """

    def __init__(self, objects: ObjectStore, cache: LocalObjectStore | None = None) -> None:
        self.objects = objects
        self.cache = cache
        self._lease = WriteLease(objects)

    def add_files(self, folder: Path, on_progress: OnProgress | None = None) -> tuple[StoredFile, ...]:
        """Store every file under a folder; see `add_paths`."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return self.add_paths({path.relative_to(folder).as_posix(): path for path in paths}, on_progress)

    def add_paths(self, paths: Mapping[str, Path], on_progress: OnProgress | None = None) -> tuple[StoredFile, ...]:
        """Store files as blobs, given by their names in a manifest, and return the manifest's entries.

        Existing blobs are not stored again. No blob of them is collected as garbage until `release_files`. Raises
        `BadInput` for names that not every operating system can store.
        """
        check_paths(paths)
        files = tuple(
            StoredFile(path=name, sha256=digest_of_file(path), size_bytes=path.stat().st_size)
            for name, path in paths.items()
        )
        sources = {blob_of(file): path for file, path in zip(files, paths.values(), strict=True)}
        missing = self._claim(sources)
        on_bytes = byte_progress(on_progress, missing, "storing")
        self.objects.put_blobs([(blob, sources[blob]) for blob in missing], on_bytes)
        if self.cache:
            self.cache.put_blobs([(blob, sources[blob]) for blob in self.cache.missing(sources)])
        return files

    def has_files(self, files: Iterable[StoredFile]) -> bool:
        """Whether every blob is in the store in full size."""
        return not self.objects.missing(map(blob_of, files))

    def claim_files(self, files: Iterable[StoredFile]) -> list[Blob]:
        """Rely on files until `release_files`; returns the blobs that are missing.

        Existing blobs stay. Raises `PassingFault` if a garbage collection does not end.
        """
        return self._claim(map(blob_of, files))

    def _claim(self, blobs: Iterable[Blob]) -> list[Blob]:
        wanted = list(dict.fromkeys(blobs))
        self._lease.claim(wanted)  # claim before looking: see slmops.infra.storage.leases
        return self.objects.missing(wanted)

    def release_files(self) -> None:
        """Give up all claims on files."""
        self._lease.release()

    @contextmanager
    def in_use(self, manifest: Manifest) -> Iterator[None]:
        """Keep a version from being collected by `gc --keep` while this process works with it."""
        self.claim_files(file for variant in manifest.variants for file in variant.files)
        try:
            yield
        finally:
            self.release_files()

    def local_file(self, file: StoredFile) -> Path | None:
        """Return a local file with the stored content, or None if it is not on this machine."""
        for store in (self.objects, self.cache):
            if isinstance(store, LocalObjectStore) and not store.missing([blob_of(file)]):
                return store.blob_path(blob_of(file))
        return None

    def materialize(self, files: Iterable[StoredFile], folder: Path, on_progress: OnProgress | None = None) -> None:
        """Place files of the store under a folder that does not have them yet, by hard links if possible.

        Files that are not on this machine are first fetched into the cache and verified. Raises `StageFailed` for a
        file whose content the store has lost.
        """
        wanted = list(files)
        aside = folder.with_name(temporary_name(ASIDE_ENDING))
        try:
            source = self._on_this_machine(wanted, on_progress)
            source.fetch_blobs([(blob_of(file), folder / file.path) for file in wanted], aside)
        except KeyError as error:
            sha256 = str(error.args[0]).rpartition("/")[2]
            lost = next((file.path for file in wanted if file.sha256 == sha256), "a file")
            raise StageFailed(
                f"The store has lost the content of {lost} ({sha256}).",
                "Push the version again from a machine that has it, or delete it and deploy again.",
                code="content-lost",
            ) from None
        finally:
            with suppress(OSError):
                aside.rmdir()

    def local_files(self, files: Sequence[StoredFile], on_progress: OnProgress | None = None) -> dict[str, Path]:
        """Return the path of each file -> the local file with its content, fetched into the cache if needed.

        Raises `KeyError` for content that the store has lost.
        """
        here = self._on_this_machine(files, on_progress)
        assert isinstance(here, LocalObjectStore)  # a remote store has a cache
        if lost := here.missing([blob_of(file) for file in files]):
            raise KeyError(lost[0].key)
        return {file.path: here.blob_path(blob_of(file)) for file in files}

    def _on_this_machine(self, files: Sequence[StoredFile], on_progress: OnProgress | None) -> ObjectStore:
        if self.cache is None:
            return self.objects
        missing = self.cache.missing(dict.fromkeys(map(blob_of, files)))
        on_bytes = byte_progress(on_progress, missing, "fetching")
        self.objects.fetch_blobs([(blob, self.cache.blob_path(blob)) for blob in missing], self.cache.aside, on_bytes)
        return self.cache

    def copy_files(self, files: Iterable[StoredFile], folder: Path) -> None:
        """Write a writable copy of files of the store for the user, independent of the store's files."""
        wanted = list(files)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            self.materialize(wanted, Path(aside) / "files")
            for file in wanted:
                path = folder / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(aside) / "files" / file.path, path)


def blob_of(file: StoredFile) -> Blob:
    """Return the content of a file."""
    return Blob(file.sha256, file.size_bytes)
