"""A checkpoint that answers with its matrices as they are stored, beside the same one in float32."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmops.infra.transformers.loading import load_to_answer
from tests.support.checkpoints import FAMILIES, VOCABULARY_SIZE, make_tiny_checkpoint
from tests.support.family_configs import make_family, small_config

IDS = torch.tensor([[5, 17, 301, 44, 9, 120, 77, 3], [9, 8, 7, 6, 5, 4, 3, 2]])
# A matrix in chunks, so that several make up one output.
CHUNK_ELEMENTS = 64 * 24


# Convolutions, linear attention, and experts.
OTHERS = ("LiquidAI/LFM2-350M", "Qwen/Qwen3.5-0.8B (text)", "openai/gpt-oss-20b")


def results_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of whole prompts, and greedy answers to them."""
    with torch.inference_mode():
        answers = model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, min_new_tokens=8, do_sample=False
        )
        return model(input_ids=IDS, use_cache=False).logits, answers


def bytes_of(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_it_answers_as_in_float32_with_matrices_of_16_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmops.infra.transformers.loading.WIDENED_ELEMENTS", CHUNK_ELEMENTS)
    checkpoint = tmp_path / "checkpoint"
    make_tiny_checkpoint(checkpoint, family if family in FAMILIES else "llama")
    if family not in FAMILIES:
        make_family(tmp_path / "family", small_config(family) | {"vocab_size": VOCABULARY_SIZE})
        for file in checkpoint.glob("tokenizer*"):
            shutil.copy(file, tmp_path / "family")
        checkpoint = tmp_path / "family"
    _, model = load_to_answer(checkpoint)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    logits, answers = results_of(model)
    expected_logits, expected_answers = results_of(whole)
    assert logits.dtype == torch.float32 == model.dtype
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(answers, expected_answers)
    # Matrices of GPT-2 and experts are of classes of their own.
    assert bytes_of(model) < (0.9 if family in ("gpt2", "openai/gpt-oss-20b") else 0.52) * bytes_of(whole)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_all_weights_but_the_matrices_are_widened(dtype: str, tmp_path: Path) -> None:
    _, model = load_to_answer(make_tiny_checkpoint(tmp_path, "qwen2", dtype=dtype))
    of_matrices = {value.dtype for name, value in model.named_parameters() if value.dim() > 1}
    of_vectors = {value.dtype for name, value in model.named_parameters() if value.dim() == 1}
    assert (of_matrices, of_vectors) == ({getattr(torch, dtype)}, {torch.float32})
