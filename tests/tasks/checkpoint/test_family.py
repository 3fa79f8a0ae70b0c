"""The proof of a checkpoint's family as a deploy and `slmops check` run it, and multi-modal checkpoints taken apart."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slmops.deployments.cli import app as cli
from slmops.infra.errors import BadInput
from slmops.infra.process.call import Call, ChildResult
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.tasks.checkpoint.family import proof_of, prove_family
from slmops.tasks.checkpoint.inspection import content_digest, inspect_checkpoint
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint, with_text_part
from slmops.tasks.workshop import Workshop, working_in
from tests.infra.checkpoints.test_text_part import WHOLE, make_whole
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.family_configs import make_family, small_config
from tests.support.torch_process import TORCH_PROCESS

# A field that transformers does not read and the builder does.
SILENTLY_WRONG = {"rope_position_scale": 0.5}


def with_tokenizer(folder: Path, tiny: Path) -> Path:
    for path in (*tiny.glob("tokenizer*"), *tiny.glob("chat_template*")):
        shutil.copy(path, folder)
    return folder


def prove(folder: Path, settings: Settings) -> Any:
    return proof_of(folder, settings, TORCH_PROCESS, lambda done, total, what: None, log="proof")


@pytest.fixture
def wrong(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    config = {**small_config("HuggingFaceTB/SmolLM2-135M-Instruct"), **SILENTLY_WRONG}
    return with_tokenizer(make_family(tmp_path / "wrong", config), tiny_checkpoint)


def test_a_model_that_would_be_silently_wrong_is_refused_with_its_first_position(
    wrong: Path, settings: Settings
) -> None:
    named = ("LlamaForCausalLM", "position 1 ")
    for _ in range(2):  # the second time it is known
        with pytest.raises(BadInput, check=coded("family-not-exact", *named)):
            prove(wrong, settings)
    assert not list((settings.cache_dir / "work").iterdir())


@pytest.mark.usefixtures("torch_stays")
def test_check_refuses_it_too(wrong: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", str(wrong), "--json"]) == 2
    assert "position 1 " in json.loads(capsys.readouterr().out)["error"]["message"]


def test_what_is_known_costs_no_build(settings: Settings, tmp_path: Path) -> None:
    first = make_tiny_checkpoint(tmp_path / "first", "qwen2", seed=1)
    further = make_tiny_checkpoint(tmp_path / "further", "qwen2", seed=2, num_hidden_layers=4)
    prove(first, settings)
    assert prove(further, settings).known


def test_a_deploy_proves_a_checkpoint_again_only_after_it_changed(settings: Settings, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "checkpoint", "qwen2", seed=1)

    def prove_within(child: ChildProcess) -> None:
        inspection, digest = inspect_checkpoint(folder), content_digest(folder)
        prepared = PreparedCheckpoint(uri=folder.as_uri(), origin=str(folder), digest=digest, inspection=inspection)
        with working_in(Workshop(settings, open_registry(settings), child)):
            prove_family.fn(prepared, ["int8"])

    prove_within(TORCH_PROCESS)
    prove_within(NeverStarted())
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | SILENTLY_WRONG), "utf-8")
    with pytest.raises(Started):
        prove_within(NeverStarted())


class Started(Exception):
    """A child was started."""


class NeverStarted(ChildProcess):
    def run(self, call: Call[Any], **options: Any) -> ChildResult[Any]:
        raise Started


@pytest.mark.parametrize("model", WHOLE)
def test_a_multi_modal_checkpoint_is_taken_apart(
    model: str, tiny_checkpoint: Path, settings: Settings, tmp_path: Path
) -> None:
    whole = with_tokenizer(make_whole(tmp_path / "whole", model), tiny_checkpoint)
    inspection = inspect_checkpoint(whole)
    assert inspection.multimodal
    assert any("only its text part is built" in warning for warning in inspection.warnings)
    text = with_text_part(whole, settings)
    found = inspect_checkpoint(text)
    assert (found.multimodal, found.architecture) == (False, inspection.architecture)
    assert (found.parameters, found.vocabulary_size) == (inspection.parameters, 512)
    assert with_text_part(whole, settings) == text


def test_a_control_token_that_no_prompt_holds_needs_no_row(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Gemma 3's text models have one for images behind their embedding's last row."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    image = {**tokenizer["added_tokens"][0], "id": 512, "content": "<image_soft_token>", "special": True}
    tokenizer["added_tokens"].append(image)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (warning,) = inspect_checkpoint(folder).warnings
    assert "'<image_soft_token>'" in warning
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text("utf-8") + "{# <image_soft_token> #}", "utf-8")
    with pytest.raises(BadInput, check=coded("vocabulary-larger-than-embedding", "512", "<image_soft_token>")):
        inspect_checkpoint(folder)
