"""The accepted forms of config.json, and the refusals."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.errors import BadInput
from slmops.infra.olive.architectures import (
    MULTIMODAL_ARCHITECTURES,
    SUPPORTED_ARCHITECTURES,
    check_architecture,
    check_family_precisions,
)
from tests.support.errors import coded

REFUSED: dict[str, tuple[dict[str, Any], coded]] = {
    "no architectures": ({}, coded("architecture-not-named")),
    "empty architectures": ({"architectures": []}, coded("architecture-not-named")),
    "architecture is no list": ({"architectures": "LlamaForCausalLM"}, coded("architecture-not-named")),
    "OLMo 2": ({"architectures": ["Olmo2ForCausalLM"]}, coded("architecture-not-supported", "Olmo2ForCausalLM")),
    "GPT-2": ({"architectures": ["GPT2LMHeadModel"]}, coded("architecture-not-supported", "GPT2LMHeadModel")),
    "Gemma 3n": (
        {"architectures": ["Gemma3nForConditionalGeneration"]},
        coded("architecture-not-supported", "google/gemma-3-1b-it"),
    ),
    "Granite 4 with Mamba": (
        {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["mamba", "attention"]},
        coded("architecture-not-supported", "granite-4.0-micro"),
    ),
    "Granite 4 with experts": (
        {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["attention"], "num_local_experts": 8},
        coded("architecture-not-supported", "mixture of experts"),
    ),
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
    "dynamic rope": (
        {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        coded("rope-not-supported", "type dynamic"),
    ),
    "longrope of another model": (
        {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "longrope"}},
        coded("rope-not-supported", "type longrope"),
    ),
    "an unknown rope in some layers": (
        {"architectures": ["Gemma3ForCausalLM"], "rope_parameters": {"full_attention": {"rope_type": "foreign"}}},
        coded("rope-not-supported", "type foreign"),
    ),
    "longrope from another length on": (
        {
            "architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"},
            "original_max_position_embeddings": 8192, "max_position_embeddings": 131072,
        },
        coded("original-length-not-supported", "8192", "4096"),
    ),
    "an original length above the context": (
        {"architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 2048},
        coded("original-length-not-supported", "4096", "2048"),
    ),
    "a kernel from the Hub": (
        {"architectures": ["LlamaForCausalLM"], "attn_implementation": "kernels-community/flash-attn"},
        coded("config-names-code", "attn_implementation", "kernels-community/flash-attn"),
    ),
    "a kernel by a private key, deep inside": (
        {"architectures": ["LlamaForCausalLM"], "x": {"_attn_implementation_internal": "who/ever:fn"}},
        coded("config-names-code", "who/ever:fn"),
    ),
    "kernels of some parts": (
        {"architectures": ["LlamaForCausalLM"], "_experts_implementation": {"": "eager", "text_config": "who/ever"}},
        coded("config-names-code", "who/ever"),
    ),
}  # fmt: skip


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
    config = {"architectures": [architecture], "rope_scaling": None, "rope_parameters": rope}
    check_architecture({**config, "layer_types": ["attention"], "num_local_experts": 0, "attn_implementation": "sdpa"})


def test_a_precision_that_a_family_does_not_have_is_refused() -> None:
    check_family_precisions("GptOssForCausalLM", ["fp16"])
    check_family_precisions("LlamaForCausalLM", ["fp16", "int8", "int4"])
    with pytest.raises(BadInput, check=coded("precision-not-supported", "int4 and int8", "--precision fp16")):
        check_family_precisions("GptOssForCausalLM", ["fp16", "int8", "int4"])


def test_every_decoder_of_the_builder_is_accepted_or_has_its_reason() -> None:
    """If this fails, the builder has a new one: prove it, and add it to the supported ones or to the others here."""
    spec = importlib.util.find_spec("onnxruntime_genai.models")
    assert spec and spec.submodule_search_locations
    source = (Path(next(iter(spec.submodule_search_locations))) / "builder.py").read_text("utf-8")
    dispatched = set(re.findall(r'config.architectures\[0\] == "(\w+)"', source))
    renamed = {"Ministral3ForCausalLM", "Qwen3_5ForCausalLM"}  # built under the multi-modal name
    assert {*SUPPORTED_ARCHITECTURES, *MULTIMODAL_ARCHITECTURES} - renamed <= dispatched
    assert dispatched - {*SUPPORTED_ARCHITECTURES, *MULTIMODAL_ARCHITECTURES} == {
        # transformers has no class of theirs, and code of a checkpoint is never run
        *("ChatGLMForConditionalGeneration", "ChatGLMModel", "InternLM2ForCausalLM", "Phi3SmallForCausalLM"),
        *("Phi3VForCausalLM", "Phi4MMForCausalLM", "VideoChatFlashQwenForCausalLM"),
        # their experts run on CUDA only
        "PhiMoEForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
        # their text part has no class of its own in transformers, or none that the builder is exact for
        *("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration", "Lfm2VlForConditionalGeneration"),
        *("Lfm2AudioForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
        "WhisperForConditionalGeneration",  # speech to text
    }
