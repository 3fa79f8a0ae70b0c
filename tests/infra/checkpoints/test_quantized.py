"""Quantized checkpoints become the numbers that they stand for, and a build of their packed weights gives the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.infra.checkpoints.dequantization import dequantize, packed_checkpoint
from slmops.infra.checkpoints.quantized import quantization_of
from slmops.infra.errors import BadInput
from slmops.infra.olive.calls import Build
from slmops.infra.process.channel import QUIET_ENVIRONMENT
from slmops.tasks.build.olive_config import olive_run_config
from slmops.tasks.build.planning import fitting_recipes
from slmops.tasks.checkpoint.inspection import inspect_checkpoint
from slmops.tasks.plan import parse_request
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import logits_of
from tests.support.quantized_checkpoints import quantized_as, quantized_by_olive

PROMPT = [(7 * position) % 400 + 20 for position in range(40)]


@pytest.fixture(scope="module")
def floating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("floating") / "checkpoint", "qwen2", tied=False)


@pytest.mark.parametrize(("method", "bits"), [("gptq", 4), ("gptq", 8), ("awq", 4), ("olive", 4)])
def test_a_build_computes_with_the_numbers_that_the_packed_weights_stand_for(
    floating: Path, tmp_path: Path, method: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slmops.infra.olive.engine import build

    for name, value in (QUIET_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    if method == "olive":
        quantized = quantized_by_olive(floating, tmp_path / "quantized")
    else:
        quantized = quantized_as(method, floating, tmp_path / "quantized", bits=bits)
    dequantize(quantized, tmp_path / "numbers", lambda done, total, what: None)
    inspection = inspect_checkpoint(quantized)
    assert inspection == inspect_checkpoint(tmp_path / "numbers")
    assert inspection.quantized == f"int{bits}"
    (recipe,) = fitting_recipes([], parse_request({"checkpoint": str(quantized), "name": "home"}), inspection.quantized)
    asked = Build(
        olive_config=olive_run_config(recipe),
        checkpoint_dir=packed_checkpoint(tmp_path / "numbers", tmp_path / "packed"),
        output_dir=tmp_path / "built",
        cache_dir=tmp_path / "cache",
        threads=1,
    )
    build(asked, lambda done, total, what: None)

    built, numbers = logits_of(tmp_path / "built", PROMPT), _logits_of_transformers(tmp_path / "numbers")
    assert np.abs(built - numbers).mean() < 0.03 * numbers.std()
    if bits == 4:  # what the first quantization did is larger by far
        assert np.abs(built - _logits_of_transformers(floating)).mean() > 0.1 * numbers.std()


@pytest.mark.parametrize(
    "section",
    [
        "gptq",
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "auto-round", "bits": 4, "group_size": 128},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 3, "group_size": 128},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"},
        {"quant_method": "gptq", "bits": 4, "group_size": -1},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
        {"quant_method": "olive", "bits": 4, "group_size": 32, "embeds": True},
    ],
)
def test_what_the_builder_does_not_read_or_the_cpu_not_run_is_refused_with_the_reason(section: Any) -> None:
    with pytest.raises(BadInput, check=coded("checkpoint-quantized")) as raised:
        quantization_of({"quantization_config": section})
    assert "cannot be built as it is" in raised.value.message
    if section != "gptq" and section["quant_method"] == "compressed-tensors":
        assert "FP8 and NVFP4" in raised.value.message


@pytest.mark.parametrize("changes", [{"precisions": ("fp16", "int8")}, {"precisions": ("int4",), "recipes": ("int4",)}])
def test_another_precision_or_recipe_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        fitting_recipes([], parse_request({"checkpoint": "here", "name": "home", **changes}), "int4")


def test_the_mark_says_how_it_was_quantized(floating: Path, tmp_path: Path) -> None:
    quantized = quantized_as("gptq", floating, tmp_path / "quantized")
    dequantize(quantized, tmp_path / "numbers", lambda done, total, what: None)
    section = json.loads((tmp_path / "numbers" / "quantized.json").read_text("utf-8"))
    assert section == json.loads((quantized / "config.json").read_text("utf-8"))["quantization_config"]
    assert "quantization_config" not in json.loads((tmp_path / "numbers" / "config.json").read_text("utf-8"))


def _logits_of_transformers(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0].numpy()
