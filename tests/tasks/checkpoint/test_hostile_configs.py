"""Whatever values a config.json has, the plan accepts it or refuses it in a sentence."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slmops.infra.errors import BadInput, SlmopsError
from slmops.tasks.checkpoint.inspection import inspect_checkpoint
from slmops.tasks.exams.decoding import settle_decoding
from slmops.tasks.request.deploy_request import read_chat_template_file
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded

KEYS = (
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"),
    *("rope_parameters", "rope_scaling", "rope_theta", "layer_types", "sliding_window", "text_config", "dtype"),
    *("quantization_config", "compression_config", "auto_map", "eos_token_id", "rms_norm_eps", "attn_implementation"),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["qwen2", 1e999]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=5,
)
FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield make_tiny_checkpoint(tmp_path_factory.mktemp("hostile") / "checkpoint", "qwen2")


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(file=st.sampled_from(FILES), changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
@example(file="config.json", changes={"num_attention_heads": 10**30})
@example(file="config.json", changes={"architectures": [["Qwen2ForCausalLM"]]})
@example(file="config.json", changes={"model_type": []})
@example(file="config.json", changes={"attn_implementation": [[]]})
@example(file="config.json", changes={"quantization_config": {"quant_method": []}})
@example(file="tokenizer_config.json", changes={"eos_token_id": {}, "architectures": None})
def test_a_plan_ends_in_an_answer_or_a_sentence(checkpoint: Path, file: str, changes: dict[str, object]) -> None:
    path = checkpoint / file
    before = path.read_bytes() if path.is_file() else b"{}"
    try:
        path.write_text(json.dumps(json.loads(before) | changes), "utf-8")
        inspect_checkpoint(checkpoint)
        settle_decoding(checkpoint, {})
    except SlmopsError as error:
        assert error.message.endswith(".")
        assert "\n" not in error.message
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": {"": "owner/kernel@v1:forward"}},
        {"sub_config": {"experts_implementation": "owner/kernel"}},
    ],
)
def test_a_config_that_names_code_on_the_hub_is_refused(checkpoint: Path, changes: dict[str, object]) -> None:
    path = checkpoint / "config.json"
    before = path.read_bytes()
    try:
        path.write_text(json.dumps(json.loads(before) | changes), "utf-8")
        with pytest.raises(BadInput, check=coded("config-names-code", "owner/kernel")):
            inspect_checkpoint(checkpoint)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "warm", True, [0.5]])
@pytest.mark.parametrize("name", ["temperature", "top_k", "max_length"])
def test_a_generation_default_that_is_no_number_is_refused(checkpoint: Path, name: str, value: object) -> None:
    path = checkpoint / "generation_config.json"
    before = path.read_bytes()
    try:
        path.write_text(json.dumps(json.loads(before) | {name: value}), "utf-8")
        with pytest.raises(BadInput, check=coded("generation-config-not-valid", name)):
            inspect_checkpoint(checkpoint)
    finally:
        path.write_bytes(before)


def test_end_tokens_that_are_no_tokens_of_the_model_are_left_out(checkpoint: Path) -> None:
    path = checkpoint / "generation_config.json"
    before = path.read_bytes()
    valid = settle_decoding(checkpoint, {}).end_token_ids
    try:
        path.write_text(json.dumps({"eos_token_id": [*valid, -5, 99_999_999]}), "utf-8")
        settled = settle_decoding(checkpoint, {})
        assert settled.end_token_ids == valid
        assert settled.decoding.end_token_ids == valid  # transformers would go by the file
        (warning,) = [text for text in settled.warnings if "no tokens of the model" in text]
        assert "generation_config.json: -5, generation_config.json: 99999999" in warning
    finally:
        path.write_bytes(before)


def test_a_template_that_takes_minutes_to_parse_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    endless = "{{ messages }}" * 20_000
    path = checkpoint / "chat_template.jinja"
    before = path.read_bytes()
    try:
        path.write_text(endless, "utf-8")
        with pytest.raises(BadInput, check=coded("chat-template-too-long", "280,000")):
            inspect_checkpoint(checkpoint)
    finally:
        path.write_bytes(before)
    (tmp_path / "given.jinja").write_text(endless, "utf-8")
    with pytest.raises(BadInput, check=coded("chat-template-too-long", "280,000")):
        read_chat_template_file(tmp_path / "given.jinja")
