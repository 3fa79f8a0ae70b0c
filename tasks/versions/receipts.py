"""Receipts: notes of deploys that ended well, so that the same deploy with nothing changed needs no run.

A receipt names the state of everything that such a run would read or check: the request, the settings, the packages,
the user's files, the model's part of the store, and Foundry Local's cache. Files are compared by path, size, time and
inode, without reading them. Whatever differs, or cannot be told, leads to a run.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue, ValidationError

from slmops.infra.checkpoints.source import SourceKind, parse_checkpoint
from slmops.infra.errors import SlmopsError
from slmops.infra.files import write_whole
from slmops.infra.foundry.interruption import has_marks
from slmops.infra.records import Json, Record
from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import digest_of, now
from slmops.infra.storage.opening import open_registry
from slmops.tasks.environment.host import host_facts, installed_version

if TYPE_CHECKING:
    from slmops.tasks.report.records import DeployReport

PACKAGES = (
    "slmops", "foundry-local-sdk", "olive-ai", "onnx-ir", "onnxruntime", "onnxruntime-genai", "onnxruntime-genai-core",
    "tokenizers", "torch", "transformers",
)  # fmt: skip
CODE = Path(__file__).resolve().parents[2]  # the folder with the package's four
ROOMS = ("deployments", "flows", "infra", "tasks")
NEEDS_A_RUN = ("output", "approval")  # a request with one of these asks for more than a registered version


class Receipt(Record):
    """The outcome of a deploy, and the state of what it read (`given`) and what it `left`, as digests.

    `report` is the document of `slmops deploy --json`, `rows` the table of its variants.
    """

    at: str
    given: str
    left: str
    report: Json
    summary: str
    rows: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Receipts:
    """The receipts of one request on this machine; `given` is the state of what it reads, None if it cannot be told."""

    settings: Settings
    parameters: Mapping[str, object]
    given: str | None

    @classmethod
    def of(cls, settings: Settings, parameters: Mapping[str, object]) -> "Receipts":
        """Return those of a request, in the present state of its files."""
        given = None
        with contextlib.suppress(SlmopsError, OSError):  # the run says what is wrong
            given = _given(settings, parameters)
        return cls(settings, parameters, given)

    @property
    def path(self) -> Path:
        """The file of the newest one."""
        key = digest_of({"parameters": _shown(self.parameters), "folder": str(Path.cwd())})
        return self.settings.cache_dir / "receipts" / f"{key}.json"

    def known(self) -> Receipt | None:
        """Return the receipt of a deploy since which nothing changed, or None."""
        if self.given is None:
            return None
        with contextlib.suppress(SlmopsError, OSError, ValidationError):
            found = Receipt.model_validate_json(self.path.read_bytes())
            if found.given == self.given and found.left == self._left(found.report):
                return found
        return None

    def keep(self, report: "DeployReport", rows: Iterable[Mapping[str, str]]) -> None:
        """Keep a receipt of a deploy that ended well, if what it read is still as it was at its beginning."""
        if self.given is None or not _ended_well(report) or Receipts.of(self.settings, self.parameters) != self:
            return
        again = report.model_copy(update={"status": "unchanged"})
        document: Json = again.model_dump(mode="json")
        with contextlib.suppress(SlmopsError, OSError):  # the next deploy is a run then
            receipt = Receipt(
                at=now(),
                given=self.given,
                left=self._left(document),
                report=document,
                summary=again.summary,
                rows=tuple(dict(row) for row in rows),
            )
            write_whole(self.path, receipt.model_dump_json())

    def _left(self, report: Json) -> str:
        """Return the state of what the deploy left: the store's part of the model, Foundry's cache, the report."""
        registry, foundry = open_registry(self.settings), self.settings.foundry_dir
        manifest = registry.version(str(report["name"]), int(str(report["version"]))).manifest
        entries = registry.objects.entries(f"models/{manifest.name}")
        runtime = foundry / ".slmops-runtime"  # its logs
        reports = [Path(str(report[name])) for name in ("report_file", "html_file") if report[name]]
        return digest_of(
            {
                "store": [[entry.key, entry.size_bytes, entry.modified_at.isoformat()] for entry in entries],
                "whole": all(registry.has_files(variant.files) for variant in manifest.variants),
                "foundry": [state for path, state in _states(foundry) if runtime not in path.parents],
                "reports": [state for path in reports for _, state in _states(path)],
                "interrupted": has_marks(self.settings.home_dir),
            }
        )


def _given(settings: Settings, parameters: Mapping[str, object]) -> str | None:
    """Return the digest of all that a request's run reads; None if this cannot be told without a run."""
    source = parse_checkpoint(str(parameters["checkpoint"]))
    is_adapter = (Path(source.location) / "adapter_config.json").exists()  # its base may be anywhere
    texts = list(_texts(parameters.values()))
    if (
        source.kind is not SourceKind.LOCAL
        or is_adapter
        or settings.store.require_signature
        or any(parameters.get(name) for name in NEEDS_A_RUN)
        or any("://" in text for text in texts)
    ):
        return None
    return digest_of(
        {
            "parameters": _shown(parameters),
            "settings": settings.model_dump(mode="json"),
            "packages": {name: installed_version(name) for name in PACKAGES},
            "code": [state for room in ROOMS for path, state in _states(CODE / room) if path.suffix != ".pyc"],
            "host": dict(host_facts()),
            "files": [state for path in _existing(texts) for _, state in _states(path)],
        }
    )


def _shown(parameters: Mapping[str, object]) -> dict[str, JsonValue]:
    return {name: repr(value) for name, value in sorted(parameters.items())}


def _texts(values: Iterable[object]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | tuple):
            yield from _texts(value)


def _existing(texts: Iterable[str]) -> Iterator[Path]:
    """Yield the paths among the values of parameters that name a file or a folder."""
    for text in filter(None, texts):
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # a description is no path, and may be long
            if (path := Path(text).expanduser()).exists():
                yield path


def _states(root: Path) -> Iterator[tuple[Path, list[JsonValue]]]:
    """Yield the files below a folder, or a file itself, and what changes when their content does."""
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if not path.is_dir():
            found = path.stat()
            yield path, [str(path), found.st_size, found.st_mtime_ns, found.st_ino]


def _ended_well(report: "DeployReport") -> bool:
    """Whether every variant is registered, with figures of speed that are not to be measured again."""
    well = all(variant.status == "registered" and variant.reliable for variant in report.variants)
    return well and report.version is not None and report.status in ("registered", "unchanged")
