"""Merging LoRA adapters with the real peft, on a random base and random adapters."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.transformers import adapters
from slmops.infra.transformers.adapters import merge_adapter, read_adapter_config
from slmops.infra.transformers.calls import MergeAdapter
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.family_configs import make_family, small_config

TOKEN_IDS = torch.arange(40, 72).reshape(2, 16)


def _silent(done: float, total: float, what: str) -> None:
    pass


def _merge(adapter: Path, base: Path, output: Path) -> dict[str, Any]:
    call = MergeAdapter(adapter_dir=adapter, base_dir=base, output_dir=output)
    return merge_adapter(call, _silent).model_dump(mode="json")


def _logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=TOKEN_IDS).logits
    return logits


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel  # takes a second to import

    return PeftModel.from_pretrained(model, adapter)


def _save_adapter(base: Path, directory: Path, *, new_tokens: int = 0, **lora: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if new_tokens:
        model.resize_token_embeddings(model.config.vocab_size + new_tokens)
    targets = lora.pop("target_modules", ["q_proj", "v_proj", "down_proj"])
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets, **lora))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    peft_model.save_pretrained(directory, save_embedding_layers=bool(new_tokens) or "auto")
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("base"), "qwen2", dtype="float32")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return _save_adapter(base, tmp_path / "adapter")


def test_the_merged_checkpoint_computes_what_base_and_adapter_do(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = _merge(adapter, base, tmp_path / "merged")
    alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = _logits(alone)
    expected = _logits(_with_adapter(alone, adapter))
    merged = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert (merged - before).abs().max() > 0.1
    assert result["tokenizer_from"] == "base"
    assert result["merged_tensors"] == 12
    assert not list((tmp_path / "merged").glob("*.bin"))
    text = "Turn on the lights"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text) == AutoTokenizer.from_pretrained(base)(text)


def _family(directory: Path, tiny: Path, model: str) -> Path:
    folder = make_family(directory, small_config(model), dtype="float32")
    for path in tiny.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


TIED = ["Qwen/Qwen2.5-0.5B-Instruct", "google/gemma-3-270m-it", "LiquidAI/LFM2-350M", "Qwen/Qwen3.5-0.8B (text)"]
OF_VOCABULARY: dict[str, dict[str, Any]] = {
    "lm_head": {"target_modules": ["o_proj", "lm_head"]},
    "embed_tokens": {"target_modules": ["o_proj", "embed_tokens"]},
    "both": {"target_modules": ["o_proj", "embed_tokens", "lm_head"]},
    "saved whole": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("targets", OF_VOCABULARY)
@pytest.mark.parametrize("model", TIED)
def test_an_adapter_on_the_vocabulary_of_a_tied_base_stays_what_it_was(
    model: str, targets: str, base: Path, tmp_path: Path
) -> None:
    tied = _family(tmp_path / "base", base, model)
    names = {"out_proj", "o_proj"} & {name.rpartition(".")[2] for name in _modules(tied)}
    lora = {**OF_VOCABULARY[targets]}
    lora["target_modules"] = [*sorted(names), *lora["target_modules"][1:]]
    adapter = _save_adapter(tied, tmp_path / "adapter", **lora)
    expected = _logits(_with_adapter(AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32), adapter))
    _merge(adapter, tied, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(_logits(merged), expected, rtol=1e-4, atol=1e-4)


def _modules(folder: Path) -> list[str]:
    return [name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_modules()]


def test_a_merge_into_another_model_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = _save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    monkeypatch.setattr(adapters, "untie", lambda model: None)
    with pytest.raises(StageFailed, check=coded("merge-not-exact")):
        _merge(adapter, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_base_s_dtype_is_kept(tmp_path: Path) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", "llama", dtype="bfloat16")
    result = _merge(_save_adapter(base, tmp_path / "adapter"), base, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert result["dtype"] == "bfloat16"
    assert merged.dtype == torch.bfloat16


def test_tokenizer_and_evaluation_rows_of_the_adapter_are_taken(base: Path, adapter: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "the adapter's own"
    tokenizer.save_pretrained(adapter)
    (adapter / "eval.jsonl").write_text('{"id": "1"}\n')
    assert _merge(adapter, base, tmp_path / "merged")["tokenizer_from"] == "adapter"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "the adapter's own"
    assert (tmp_path / "merged" / "eval.jsonl").read_text() == '{"id": "1"}\n'


def test_an_adapter_with_more_tokens_has_its_own_embeddings(base: Path, tmp_path: Path) -> None:
    adapter = _save_adapter(base, tmp_path / "adapter", new_tokens=32)
    _merge(adapter, base, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    larger = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    vocabulary_size = larger.config.vocab_size + 32
    larger.resize_token_embeddings(vocabulary_size)
    assert merged.config.vocab_size == vocabulary_size
    expected = _logits(_with_adapter(larger, adapter))
    torch.testing.assert_close(_logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_a_larger_tokenizer_without_embeddings_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new-{number}>" for number in range(600)])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(BadInput, check=coded("adapter-vocabulary", "512")):
        _merge(adapter, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_pickles_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(BadInput, check=coded("adapter-without-weights", "adapter_model.bin")):
        _merge(adapter, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_truncated_adapter_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadInput, check=coded("weights-damaged")):
        _merge(adapter, base, tmp_path / "merged")


@pytest.mark.parametrize(
    ("family", "sizes"), [("qwen2", {"hidden_size": 128}), ("qwen2", {"num_hidden_layers": 1}), ("gpt2", {})]
)
def test_a_base_that_does_not_fit_is_named(family: str, sizes: dict[str, int], adapter: Path, tmp_path: Path) -> None:
    other = make_tiny_checkpoint(tmp_path / "other", family, dtype="float32", **sizes)
    with pytest.raises(BadInput, check=coded("adapter-does-not-fit")):
        _merge(adapter, other, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_declared_base_is_read(base: Path, adapter: Path) -> None:
    assert read_adapter_config(adapter) == str(base)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (None, coded("file-missing", "adapter_config.json")),
        ("{", coded("file-not-json")),
        ("[]", coded("file-not-object")),
        (json.dumps({"peft_type": "IA3"}), coded("adapter-kind", "peft_type 'IA3'")),
        (
            json.dumps({"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "antigravity"}),
            coded("adapter-needs-code", "antigravity"),
        ),
        (
            json.dumps({"peft_type": "LORA", "auto_mapping": {"parent_library": "transformers_modules.mine"}}),
            coded("adapter-needs-code", "transformers_modules.mine"),
        ),
    ],
)
def test_a_config_that_cannot_be_used(text: str | None, refused: coded, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(BadInput, check=refused):
        read_adapter_config(tmp_path)


def test_a_config_without_base(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (copy / "adapter_config.json").write_text(json.dumps(config))
    assert read_adapter_config(copy) is None
