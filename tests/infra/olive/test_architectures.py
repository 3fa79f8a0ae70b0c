"""Which config.json is accepted, and what the refusal says."""

from typing import Any

import pytest

from slmops.infra.errors import BadInput
from slmops.infra.olive.architectures import SUPPORTED_ARCHITECTURES, check_architecture
from tests.support.errors import coded

REFUSED: dict[str, tuple[dict[str, Any], coded]] = {
    "no architectures": ({}, coded("architecture-not-named")),
    "empty architectures": ({"architectures": []}, coded("architecture-not-named")),
    "architecture is no list": ({"architectures": "LlamaForCausalLM"}, coded("architecture-not-named")),
    "OLMo 2": ({"architectures": ["Olmo2ForCausalLM"]}, coded("architecture-not-supported", "Olmo2ForCausalLM")),
    "GPT-2": ({"architectures": ["GPT2LMHeadModel"]}, coded("architecture-not-supported", "GPT2LMHeadModel")),
    "Gemma 3": ({"architectures": ["Gemma3ForCausalLM"]}, coded("architecture-not-supported", "Gemma3ForCausalLM")),
    "a vision model": (
        {"architectures": ["Qwen2_5_VLForConditionalGeneration"]},
        coded("architecture-not-supported", "Qwen2_5_VL"),
    ),
    "a mixture of experts": (
        {"architectures": ["Qwen3MoeForCausalLM"]},
        coded("architecture-not-supported", "Qwen3MoeForCausalLM"),
    ),
    "quantized": (
        {"architectures": ["Qwen2ForCausalLM"], "quantization_config": {"quant_method": "awq"}},
        coded("checkpoint-quantized", "(awq)"),
    ),
    "linear rope": (
        {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "linear", "factor": 2.0}},
        coded("rope-not-supported", "type linear"),
    ),
    "yarn": (
        {"architectures": ["Qwen2ForCausalLM"], "rope_parameters": {"rope_type": "yarn"}},
        coded("rope-not-supported", "type yarn"),
    ),
    "longrope": (
        {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"}},
        coded("rope-not-supported", "type longrope"),
    ),
    "partial rope": (
        {"architectures": ["LlamaForCausalLM"], "rope_parameters": {"partial_rotary_factor": 0.5}},
        coded("rope-not-supported", "partial_rotary_factor 0.5"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_correctly_is_named(case: str) -> None:
    config, refused = REFUSED[case]
    with pytest.raises(BadInput, check=refused) as refusal:
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
