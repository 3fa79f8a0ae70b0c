"""A folder of the user's own lm-eval tasks: the check that it contains only data, and its digest."""

import glob
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import yaml

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import open_regular, read_text

# Formats that contain only data. For example, "pandas" unpickles its files, which can run code.
DATA_FORMATS = {"json", "csv", "parquet", "arrow", "text"}
PLAIN_TAGS = tuple(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "merge")
)


class _DataLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads YAML's data and ignores objects that a tag would construct."""


_DataLoader.add_multi_constructor("", lambda loader, tag, node: None)


def check_task_folder(folder: Path, *, allow_code: bool) -> None:
    """Check every YAML file of a folder, and the files that they include from outside lm-eval.

    A task file can name Python code to run (`!function`), and data in formats that run code when they are read. Unless
    `allow_code`, such a file is refused.

    Raises `BadInput`, which names the file, for a missing folder, a folder without a task file, invalid YAML, or code.
    """
    if not folder.is_dir():
        raise BadInput(
            f"There is no folder {folder} with lm-eval tasks.",
            "Name the folder that holds the YAML files.",
            code="lm-eval-folder-missing",
        )
    waiting = sorted(folder.rglob("*.yaml"))
    if not waiting:
        raise BadInput(
            f"The folder {folder} has no task file (*.yaml).",
            "Name the folder that holds the YAML files.",
            code="lm-eval-folder-empty",
        )
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop().resolve()
        if path in seen or _is_of_lm_eval(path):
            continue
        seen.add(path)
        content = _read(path, allow_code=allow_code)
        for name in [] if allow_code else _values_of("dataset_path", content):
            _check_dataset(path, name)
        waiting += [path.parent / name for name in _strings(_included(content))]


def _included(content: object) -> object:
    return content.get("include") if isinstance(content, dict) else None


def digest_of_task_folder(folder: Path) -> str:
    """SHA-256 over the folder's files and the local data files that its tasks name, also outside the folder.

    Raises `BadInput` for a folder or a file that cannot be read.
    """
    if not folder.is_dir():
        raise BadInput(
            f"There is no folder {folder} with lm-eval tasks.",
            "Name the folder that holds the YAML files.",
            code="lm-eval-folder-missing",
        )
    files = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    for path in sorted(folder.rglob("*.yaml")):
        content = _read(path, allow_code=True)
        for value in (*_values_of("dataset_kwargs", content), *_values_of("dataset_path", content)):
            for name in _strings(value):
                # Path.glob does not accept an absolute pattern.
                found = [folder / match for match in glob.glob(name, root_dir=folder, recursive=True)]  # noqa: PTH207
                files |= {path for place in found for path in (place.rglob("*") if place.is_dir() else [place])}
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        try:
            with open_regular(path) as file:
                content_digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BadInput(
                f"{path} cannot be read: {error.strerror or error}.",
                "Make it readable.",
                code="lm-eval-file-unreadable",
            ) from error
        shown = path.relative_to(folder) if path.is_relative_to(folder) else path
        digest.update(f"{content_digest} {shown.as_posix()}\n".encode())
    return digest.hexdigest()


def _read(path: Path, *, allow_code: bool) -> object:
    try:
        text = read_text(path)
        for event in [] if allow_code else yaml.parse(text, _DataLoader):
            tag = getattr(event, "tag", None)
            if tag and tag != "!" and tag not in PLAIN_TAGS:
                line = event.start_mark.line + 1
                raise BadInput(
                    f"{path} names code to run ({tag}, line {line}).",
                    "Remove it, or allow code if you trust the folder.",
                    code="lm-eval-code",
                )
        return yaml.load(text, _DataLoader)  # noqa: S506 a subclass of SafeLoader
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read: {error.strerror or error}.", "Make it readable.", code="lm-eval-file-unreadable"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or "nested too deep"
        raise BadInput(
            f"{path} is not YAML: {reason}.", "Correct the file, or move it elsewhere.", code="lm-eval-file-not-yaml"
        ) from error


def _check_dataset(path: Path, name: object) -> None:
    if isinstance(name, str) and name not in DATA_FORMATS and "/" not in name and "\\" not in name:
        raise BadInput(
            f"{path} has the dataset_path {name!r}, which is neither a format of plain data "
            f"({', '.join(sorted(DATA_FORMATS))}) nor a dataset of the Hub (owner/name).",
            "Correct the dataset_path.",
            code="lm-eval-dataset-not-allowed",
        )


def _is_of_lm_eval(path: Path) -> bool:
    spec = importlib.util.find_spec("lm_eval")
    roots = (spec.submodule_search_locations or []) if spec else []
    return any(path.is_relative_to(Path(root).resolve()) for root in roots)


def _values_of(key: str, content: object) -> Iterator[object]:
    """Yield the values of a key at any depth, because a group's file may contain its tasks."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name == key:
                yield value
            yield from _values_of(key, value)
    elif isinstance(content, list):
        for value in content:
            yield from _values_of(key, value)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
