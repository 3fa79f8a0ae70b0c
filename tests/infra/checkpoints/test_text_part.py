"""The text part of multi-modal checkpoints: the same logits as in the whole model, and the build of a text model."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.checkpoints.folder import read_json, read_tensor_headers
from slmops.infra.checkpoints.text_part import is_multimodal, take_text_part, text_config_of
from slmops.infra.errors import BadInput
from slmops.infra.olive.calls import ProveFamily
from tests.support.checkpoints import draw_weights
from tests.support.errors import coded
from tests.support.family_configs import small_config

VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "google/gemma-3-4b-it (text)": (
        "gemma3", {"vision_config": {**VISION, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4}
    ),
    "Qwen/Qwen3.5-0.8B (text)": (
        "qwen3_5", {"vision_config": {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2}}
    ),
    "mistralai/Ministral-3-3B-Instruct-2512 (text)": (
        "mistral3", {"vision_config": {**VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 14}}
    ),
}  # fmt: skip
PROMPT = [(7 * index * index + 13 * index) % 470 for index in range(60)]
OLD_NAMES = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))


def make_whole(directory: Path, model: str) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    kind, further = WHOLE[model]
    config = AutoConfig.for_model(kind, text_config=small_config(model), **further)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    draw_weights(whole, 0)
    whole.save_pretrained(directory, max_shard_size="200KB")
    (directory / "tokenizer.json").write_text("{}")
    return directory


def with_old_names(directory: Path) -> None:
    """Rename the tensors as in the Hub's files before transformers 5."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    renamed = {}
    for name, tensor in tensors.items():
        old = next((old + name.removeprefix(new) for new, old in OLD_NAMES if name.startswith(new)), name)
        renamed[old] = tensor
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})


def logits_of(directory: Path, auto_class: str) -> Any:
    import torch
    import transformers

    model = getattr(transformers, auto_class).from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([PROMPT])).logits[0]


@pytest.mark.parametrize("names", ["as saved today", "as on the Hub"])
@pytest.mark.parametrize("model", WHOLE)
def test_it_gives_the_logits_of_the_multi_modal_model(model: str, names: str, tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "whole", model)
    expected = logits_of(whole, "AutoModelForImageTextToText")
    if names == "as on the Hub":
        with_old_names(whole)
    config = text_config_of(read_json(whole / "config.json"), read_tensor_headers(whole))
    take_text_part(whole, tmp_path / "text", config)
    found = logits_of(tmp_path / "text", "AutoModelForCausalLM")
    assert (found - expected).abs().max() < 1e-5
    assert not is_multimodal(read_json(tmp_path / "text" / "config.json"))
    assert not [name for name in read_tensor_headers(tmp_path / "text") if "vision" in name or "visual" in name]
    assert (tmp_path / "text" / "tokenizer.json").is_file()


@pytest.mark.parametrize("model", WHOLE)
def test_it_is_built_exactly(model: str, tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "whole", model)
    config = text_config_of(read_json(whole / "config.json"), read_tensor_headers(whole))
    take_text_part(whole, tmp_path / "text", config)
    call = ProveFamily(checkpoint_dir=tmp_path / "text", kept_dir=tmp_path / "kept", work_dir=tmp_path, threads=1)
    assert call.perform(lambda done, total, what: None).first_difference is None


def test_a_text_part_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"model_type": "foreign"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, check=coded("architecture-not-supported", "foreign")):
        text_config_of(read_json(tmp_path / "config.json"), {})
