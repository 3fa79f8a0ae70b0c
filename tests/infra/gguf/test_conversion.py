"""Checkpoints that llama.cpp's converter turned into GGUF files are restored bit by bit, with their config."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from slmops.infra.gguf.conversion import convert
from slmops.infra.gguf.file import FLOATING_POINT, QUANTIZED
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.llama_cpp_converter import convert_to_gguf
from tests.support.real_models import real_model

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PHI_ROPE = {
    "rope_type": "longrope",
    "type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 512,
    "long_factor": [1.5] * 12,
    "short_factor": [1.0] * 12,
}
# Family of tests.support.checkpoints, type in the GGUF file, and what is particular in its config.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "f16", {"tied": False, "dtype": "float16"}),
    "llama with biases": ("llama", "bf16", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.2": ("llama", "bf16", {"rope_parameters": LLAMA_3_ROPE, "max_position_embeddings": 16384}),
    "qwen2": ("qwen2", "f32", {"dtype": "float32"}),
    "qwen3": ("qwen3", "bf16", {"head_dim": 64}),
    "granite": ("granite", "bf16", {}),
    "smollm3": ("smollm3", "bf16", {"num_hidden_layers": 5, "no_rope_layers": None}),
    "gemma 2": ("gemma2", "bf16", {"num_hidden_layers": 3}),
    "gemma 3": ("gemma3", "bf16", {"num_hidden_layers": 7, "vocab_size": 500}),
    "phi 3": ("phi3", "bf16", {"num_hidden_layers": 1}),
    "phi 3.5": ("phi3", "bf16", {"rope_parameters": PHI_ROPE, "original_max_position_embeddings": 512}),
}
# What transformers writes and no computation has, or that says in another way what is there.
NOT_SAID = {"transformers_version", "initializer_range", "attention_dropout", "embd_pdrop", "resid_pdrop", "use_cache"}
NOT_SAID |= {
    "_name_or_path",
    "pretraining_tp",
    "max_window_layers",
    "_sliding_window_pattern",
    "use_bidirectional_attention",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The checkpoint of each case, and the one that its GGUF file is converted to."""
    root = tmp_path_factory.mktemp("gguf")
    asked = []
    for name, (family, kind, changes) in CASES.items():
        folder = make_tiny_checkpoint(root / name, family, **changes)
        if family == "phi3":  # the converter takes Phi-4's way for it, as there is no SentencePiece model
            file = folder / "tokenizer_config.json"
            values = json.loads(file.read_text("utf-8")) | {"tokenizer_class": "GPT2Tokenizer"}
            file.write_text(json.dumps(values), "utf-8")
        asked.append((folder, root / f"{name}.gguf", kind))
    convert_to_gguf(asked)
    for folder, file, _ in asked:
        convert(file, root / f"{folder.name} again", lambda done, total, what: None)
    return {name: (root / name, root / f"{name} again") for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_every_weight_comes_back_bit_by_bit(converted: dict[str, tuple[Path, Path]], name: str) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in converted[name])
    assert set(after) == set(before)
    assert {tensor: (after[tensor].float() - before[tensor].float()).abs().max() for tensor in before} == dict.fromkeys(
        before, 0
    )
    matrices = {str(tensor.dtype) for tensor in after.values() if tensor.dim() > 1}
    assert matrices == {str(tensor.dtype) for tensor in before.values() if tensor.dim() > 1}


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_same_config(converted: dict[str, tuple[Path, Path]], name: str) -> None:
    from transformers import AutoConfig

    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in converted[name])
    keys = (set(before) | set(after)) - NOT_SAID
    assert {key: after.get(key) for key in keys} == {key: before.get(key) for key in keys}


def test_quantized_weights_are_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader, dequantize

    file = real_model("smollm2.gguf")
    convert(file, tmp_path / "converted", lambda done, total, what: None)
    written = load_file(tmp_path / "converted" / "model.safetensors")
    for stored in GGUFReader(file).tensors:
        if stored.name in ("token_embd.weight", "blk.3.ffn_down.weight", "blk.29.attn_v.weight"):
            numbers = dequantize(stored.data, GGMLQuantizationType(stored.tensor_type))
            name = {"token_embd.weight": "model.embed_tokens.weight"}.get(
                stored.name, stored.name.replace("blk", "model.layers").replace("ffn_down", "mlp.down_proj")
            ).replace("attn_v", "self_attn.v_proj")
            assert (written[name].numpy() == numbers.astype("float16")).all()


def test_every_type_that_is_accepted_can_be_turned_into_numbers() -> None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for name in (*FLOATING_POINT, *QUANTIZED):
        kind = GGMLQuantizationType[name]
        elements, size_bytes = GGML_QUANT_SIZES[kind]
        assert dequantize(np.zeros((2, size_bytes), np.uint8), kind).shape == (2, elements)
