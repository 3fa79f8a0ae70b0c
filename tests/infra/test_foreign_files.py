"""Pipes, devices and links to them in place of files that others hand over: refused at once, wherever they are read."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from slmops.infra.errors import SlmopsError
from slmops.infra.foreign_files import NotRegularFile, check_regular, open_regular, read_regular, read_text
from slmops.infra.model_screening import screen_model
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import link_or_copy
from slmops.infra.storage.inputs import ingest
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.objects import Blob
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.tar import opened_tar
from slmops.infra.transformers.adapters import read_adapter_config
from slmops.tasks.build.calibration import read_calibration_file
from slmops.tasks.build.olive_config import read_olive_config
from slmops.tasks.checkpoint.inspection import inspect_checkpoint
from slmops.tasks.questions.evaluation_set import read_rows
from slmops.tasks.questions.output_format import read_output_schema
from slmops.tasks.request.deploy_request import read_chat_template_file
from slmops.tasks.training.dataset import read_dataset

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes in folders")
ENOUGH_S = 60  # a reader that blocks never ends
SHA256 = "0" * 64


def outcome(call: Callable[[], object]) -> BaseException | None:
    """Return the error that a call raised, None without one; fails if it does not end."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ENOUGH_S)
    assert not thread.is_alive(), "it waits for a writer"
    return raised[0] if raised else None


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


PLACED = [pipe, link_to_pipe, link_to_device]
READERS: dict[str, Callable[[Path], object]] = {
    "evaluation rows": lambda path: read_rows(str(path), None),
    "calibration rows": lambda path: read_calibration_file(str(path), []),
    "output schema": read_output_schema,
    "chat template": read_chat_template_file,
    "Olive configuration": read_olive_config,
    "dataset": lambda path: read_dataset(str(path), Settings(home=path.parent / "home")),
    "dataset's folder": lambda path: read_dataset(str(path.parent), Settings(home=path.parent / "home")),
    "adapter": lambda path: read_adapter_config(path.parent),
    "archive": lambda path: opened_tar(path).__enter__(),
    "genai folder": lambda path: screen_model(path.parent),
}


@pytest.mark.parametrize("place", PLACED)
@pytest.mark.parametrize("reader", READERS)
def test_a_users_file_is_refused_in_a_sentence(reader: str, place: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    place(path)
    error = outcome(lambda: READERS[reader](path))
    assert isinstance(error, SlmopsError)
    assert "\n" not in error.message


@pytest.mark.parametrize("place", PLACED)
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json",
     "chat_template.jinja", "model.safetensors", "eval.jsonl"],
)  # fmt: skip
def test_a_file_of_a_checkpoint(
    name: str, place: Callable[[Path], None], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (folder / name).unlink(missing_ok=True)
    place(folder / name)
    for call in (lambda: inspect_checkpoint(folder), lambda: ingest(registry(tmp_path), folder)):
        error = outcome(call)
        assert isinstance(error, SlmopsError) and error.code == "file-not-regular"
        assert "not a regular file" in error.message


def registry(folder: Path) -> ModelRegistry:
    return ModelRegistry(LocalObjectStore(folder / "store"))


@pytest.mark.parametrize("place", PLACED)
def test_an_object_of_a_store(place: Callable[[Path], None], tmp_path: Path) -> None:
    objects, blob = LocalObjectStore(tmp_path / "store"), Blob(SHA256, 1)
    path = objects.blob_path(blob)
    path.parent.mkdir(parents=True)
    place(path)
    source = tmp_path / "source"
    place(source)
    calls: list[Callable[[], object]] = [
        lambda: objects.read_bytes(blob.key),
        lambda: objects.put_bytes_if_absent(blob.key, b"x"),
        lambda: list(objects.digests([blob])),
        lambda: objects.fetch_blobs([(blob, tmp_path / "copy")], tmp_path / "aside"),
        lambda: objects.put_blobs([(blob, source)]),
    ]
    for call in calls:
        error = outcome(call)
        assert isinstance(error, SlmopsError) and "not a regular file" in error.message
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("place", PLACED)
def test_a_link_to_it_is_not_made(place: Callable[[Path], None], tmp_path: Path) -> None:
    place(tmp_path / "file")
    for call in (
        lambda: link_or_copy(tmp_path / "file", tmp_path / "copy"),
        lambda: check_regular(tmp_path / "file"),
        lambda: open_regular(tmp_path / "file"),
    ):
        assert isinstance(outcome(call), NotRegularFile)


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="it has more than 4 bytes"):
        read_regular(tmp_path / "file", 4)


@pytest.mark.parametrize("text", ['{"a": "größer"}', "", "{"])
def test_marks_and_line_ends_of_windows_are_no_part_of_a_text(text: str, tmp_path: Path) -> None:
    for written in (text + "\r\nx\r\n", text + "\rx\r", text + "\nx\n"):
        (tmp_path / "file").write_bytes(written.encode("utf-8-sig"))
        assert read_text(tmp_path / "file") == text + "\nx\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({"a": 1}), encoding)
    with pytest.raises(ValueError, match=f"it is {encoding[:6].upper()} and not UTF-8; save it as UTF-8"):
        read_text(tmp_path / "file")
