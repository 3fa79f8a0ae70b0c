"""GGUF files as checkpoints: inspected as what they become, converted once, and told to be quantized twice."""

import json
import shutil
from pathlib import Path

import pytest

from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.tasks.checkpoint import conversion
from slmops.tasks.checkpoint.from_gguf import from_gguf
from slmops.tasks.checkpoint.inspection import content_digest, inspect_checkpoint
from tests.infra.gguf.test_file import write_gguf
from tests.support.errors import coded
from tests.support.real_models import real_model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf")


def test_a_file_is_inspected_as_the_checkpoint_that_it_becomes(settings: Settings, file: Path) -> None:
    before, after = inspect_checkpoint(file), inspect_checkpoint(from_gguf(file, settings))
    assert before == after
    assert (before.kind, before.architecture, before.warnings) == ("checkpoint", "LlamaForCausalLM", ())


def test_it_is_converted_once_and_the_same_anywhere(
    settings: Settings, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = from_gguf(file, settings)
    elsewhere = from_gguf(file, settings.model_copy(update={"home": tmp_path / "another"}))
    assert content_digest(first) == content_digest(elsewhere)
    monkeypatch.setattr(conversion, "run_in_child", None)
    assert from_gguf(file, settings) == first
    assert from_gguf(Path(shutil.copy(file, tmp_path / "copy.gguf")), settings) == first


def test_a_folder_with_one_file_takes_what_the_deploy_asks_for_along(settings: Settings, file: Path) -> None:
    row = {"id": 1, "messages": [{"role": "user", "content": "Hi"}], "expected": "Hello"}
    (file.parent / "eval.jsonl").write_text(json.dumps(row), "utf-8")
    converted = from_gguf(file.parent, settings)
    assert json.loads((converted / "eval.jsonl").read_text("utf-8")) == row
    assert content_digest(converted) == content_digest(from_gguf(file, settings))


def test_a_folder_with_several_files_needs_a_choice(settings: Settings, file: Path) -> None:
    shutil.copy(file, file.with_name("another.gguf"))
    with pytest.raises(BadInput, check=coded("gguf-several")):
        from_gguf(file.parent, settings)


def test_a_file_that_cannot_be_converted_leaves_nothing(settings: Settings, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput, check=coded("gguf-cut-off")):
        from_gguf(file, settings)
    assert not settings.home.exists()


def test_quantized_weights_are_reported_before_and_after(settings: Settings) -> None:
    file = real_model("smollm2.gguf")
    before, after = inspect_checkpoint(file), inspect_checkpoint(from_gguf(file, settings))
    assert before == after
    assert "quantized already (Q4_1)" in before.warnings[0]
