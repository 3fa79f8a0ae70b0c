"""Which config.json is accepted, and what the refusal says."""

from typing import Any

import pytest

from slmops.infra.errors import BadInput
from slmops.infra.olive.architectures import SUPPORTED_ARCHITECTURES, check_architecture

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no architectures": ({}, "names no architecture"),
    "empty architectures": ({"architectures": []}, "names no architecture"),
    "architecture is no list": ({"architectures": "LlamaForCausalLM"}, "names no architecture"),
    "OLMo 2": ({"architectures": ["Olmo2ForCausalLM"]}, "Olmo2ForCausalLM is not supported"),
    "GPT-2": ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
    "Gemma 3": ({"architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM is not supported"),
    "a vision model": ({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}, "is not supported"),
    "a mixture of experts": ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM is not supported"),
    "quantized": (
        {"architectures": ["Qwen2ForCausalLM"], "quantization_config": {"quant_method": "awq"}},
        r"already quantized \(awq\)",
    ),
    "linear rope": (
        {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "linear", "factor": 2.0}},
        "type linear",
    ),
    "yarn": ({"architectures": ["Qwen2ForCausalLM"], "rope_parameters": {"rope_type": "yarn"}}, "type yarn"),
    "longrope": ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"}}, "type longrope"),
    "partial rope": (
        {"architectures": ["LlamaForCausalLM"], "rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_correctly_is_named(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(BadInput, match=message) as refusal:
        check_architecture(config)
    assert refusal.value.what_to_do


def test_the_refusal_lists_what_is_supported() -> None:
    with pytest.raises(BadInput) as refusal:
        check_architecture({"architectures": ["MambaForCausalLM"]})
    assert all(name in refusal.value.what_to_do for name in SUPPORTED_ARCHITECTURES)


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
@pytest.mark.parametrize("rope", [None, {}, {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "llama3"}])
def test_supported_checkpoints_pass(architecture: str, rope: dict[str, Any] | None) -> None:
    check_architecture({"architectures": [architecture], "rope_scaling": None, "rope_parameters": rope})
