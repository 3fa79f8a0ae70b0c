"""An adapter whose base is gone or quantized: the plan and the merge say what to give with --base."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.tasks.checkpoint.preparation import merge_into_base
from slmops.tasks.plan import plan_deploy

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def adapter_of(folder: Path, base: str | None) -> Path:
    folder.mkdir()
    save_file({"base_model.model.x.lora_A.weight": np.zeros((4, 8), np.float32)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    # As an editor on Windows saves it.
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), "utf-8-sig", newline="\r\n")
    return folder


def quantized(checkpoint: Path, folder: Path) -> Path:
    """A copy whose config.json says that bitsandbytes quantized it."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"quantization_config": BNB}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("base", "code", "advised"),
    [
        ("/kaggle/working/base-model", "folder-missing", "--base FOLDER_OR_HUB_ID"),
        ("unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit", "checkpoint-quantized", "--base unsloth/Qwen2.5-0.5B-Instruct."),
        ("unsloth/Llama-3.2-1B-unsloth-bnb-4bit", "checkpoint-quantized", "--base unsloth/Llama-3.2-1B."),
        ("quantized", "checkpoint-quantized", "--base FOLDER_OR_HUB_ID"),
        ("owner/base", "hub-unreachable", "--base FOLDER_OR_HUB_ID"),
    ],
)
def test_what_to_give_for_a_base_that_cannot_be_used(
    base: str,
    code: str,
    advised: str,
    tiny_checkpoint: Path,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if base == "quantized":
        base = str(quantized(tiny_checkpoint, tmp_path / "quantized"))
    adapter = adapter_of(tmp_path / "adapter", base)
    for refuse in (
        lambda: plan_deploy(settings, {"checkpoint": str(adapter), "name": "tiny"}),
        lambda: merge_into_base(adapter, None, settings, lambda *_: None),
    ):
        with pytest.raises(BadInput) as refused:
            refuse()
        assert refused.value.code == code
        assert f"The adapter's base {base} " in refused.value.message
        assert advised in refused.value.what_to_do


def test_a_given_base_replaces_the_one_that_is_gone(tiny_checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", "/kaggle/working/base-model")
    plan = plan_deploy(settings, {"checkpoint": str(adapter), "name": "tiny", "base": str(tiny_checkpoint)})
    assert plan.architecture == "Qwen2ForCausalLM"
