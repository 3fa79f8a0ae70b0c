"""What a checkpoint is, what makes it bad input, and what its digest covers."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from slmops.infra.checkpoints.folder import read_chat_template
from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import Source
from slmops.infra.storage.opening import open_registry
from slmops.tasks.checkpoint.inspection import content_digest, inspect_checkpoint
from slmops.tasks.checkpoint.preparation import folder_of, merge_into_base, prepare_checkpoint, prepare_source
from slmops.tasks.checkpoint.rewriting import with_chat_template
from slmops.tasks.request.deploy_request import DeployRequest
from tests.support.checkpoints import make_tiny_checkpoint, read_config
from tests.support.errors import coded
from tests.support.genai_models import EMPTY_GRAPH
from tests.support.versions import BUILDER, stored_variant


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def change_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}), "utf-8")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestInspection:
    def test_a_whole_checkpoint(self, tiny_checkpoint: Path) -> None:
        found = inspect_checkpoint(tiny_checkpoint)
        weights = (tiny_checkpoint / "model.safetensors").stat().st_size
        assert (found.kind, found.architecture, found.dtype) == ("checkpoint", "Qwen2ForCausalLM", "BF16")
        assert found.size_bytes == 2 * found.parameters
        assert 0 < weights - found.size_bytes < 10_000
        assert (found.vocabulary_size, found.hidden_size, found.context_length) == (512, 64, 1024)
        assert found.largest_tensor_elements == 512 * 64
        assert found.tied_embeddings
        assert found.warnings == ()

    @pytest.mark.parametrize("family", ["llama3-rope", "mistral", "qwen3", "smollm3", "granite", "phi3"])
    def test_other_families_and_shards(self, family: str, tmp_path: Path) -> None:
        folder = make_tiny_checkpoint(tmp_path / "checkpoint", family, tied=False, max_shard_size="100KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        found = inspect_checkpoint(folder)
        assert found.kind == "checkpoint"
        assert not found.tied_embeddings

    def test_heads_that_are_wider_than_the_hidden_size(self, tmp_path: Path) -> None:
        folder = make_tiny_checkpoint(tmp_path / "checkpoint", "qwen3", num_attention_heads=4)
        assert inspect_checkpoint(folder).hidden_size == 64

    def test_code_in_a_checkpoint_is_warned_of_and_not_run(self, checkpoint: Path, tmp_path: Path) -> None:
        change_json(checkpoint / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
        (checkpoint / "modeling.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
        found = inspect_checkpoint(checkpoint)
        assert "never runs it" in found.warnings[0]
        assert not (tmp_path / "trace").exists()

    def test_a_byte_order_mark_in_a_checkpoints_template_is_a_part_of_prompts_and_warned_of(
        self, checkpoint: Path
    ) -> None:
        template = (checkpoint / "chat_template.jinja").read_bytes()
        (checkpoint / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf" + template)
        assert "byte order mark" in inspect_checkpoint(checkpoint).warnings[0]
        assert inspect_checkpoint(checkpoint, chat_template_given=True).warnings == ()

    def test_a_given_chat_template_stands_in_for_the_missing_one(self, checkpoint: Path) -> None:
        remove_chat_template(checkpoint)
        assert inspect_checkpoint(checkpoint, chat_template_given=True).kind == "checkpoint"


def remove_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    change_json(folder / "tokenizer_config.json", chat_template=...)


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def keep_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **changes)


def write(name: str, content: bytes) -> Callable[[Path], int]:
    return lambda folder: (folder / name).write_bytes(content)


BAD = {
    "no config": (lambda folder: (folder / "config.json").unlink(), coded("file-missing", "config.json")),
    "broken config": (write("config.json", b'{"a": '), coded("file-not-json", "config.json")),
    "config in UTF-16": (write("config.json", "{}".encode("utf-16")), coded("file-not-json", "UTF-16")),
    "config is a list": (write("config.json", b"[]"), coded("file-not-object")),
    "no architecture": (config(architectures=...), coded("architecture-not-named")),
    "olmo2": (config(architectures=["Olmo2ForCausalLM"]), coded("architecture-not-supported", "Olmo2ForCausalLM")),
    "gpt2": (config(architectures=["GPT2LMHeadModel"]), coded("architecture-not-supported", "GPT2LMHeadModel")),
    "truncated weights": (truncate_weights, coded("weights-damaged")),
    "pickled weights": (pickle_weights, coded("weights-pickled")),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), coded("shard-missing", "model.safetensors")),
    "other hidden size": (config(hidden_size=128), coded("tensor-shape")),
    "other vocabulary": (
        config(vocab_size=513),
        coded("tensor-shape", "embed_tokens.weight ", " [512, 64], config.json says [513, 64]"),
    ),
    "more layers": (config(num_hidden_layers=3), coded("tensor-missing", "model.layers.2")),
    "other heads": (config(num_key_value_heads=2), coded("tensor-shape", "k_proj.weight ")),
    "other intermediate": (config(intermediate_size=256), coded("tensor-shape", "gate_proj.weight ")),
    "untied": (config(tie_word_embeddings=False), coded("tensor-missing", "lm_head.weight")),
    "no hidden size": (config(hidden_size=...), coded("size-not-valid", "hidden_size: None")),
    "no heads": (config(num_attention_heads=0), coded("size-not-valid", "num_attention_heads: 0")),
    "text for a size": (config(vocab_size="512"), coded("size-not-valid", "vocab_size: '512'")),
    "a billion layers": (config(num_hidden_layers=10**9), coded("size-not-valid", "num_hidden_layers")),
    "a million layers": (config(num_hidden_layers=10**6), coded("layers-not-valid", "num_hidden_layers")),
    "odd context": (config(max_position_embeddings=[1]), coded("size-not-valid", "max_position_embeddings")),
    "no tokenizer": (remove_tokenizer, coded("tokenizer-missing")),
    "SentencePiece alone": (keep_sentencepiece, coded("tokenizer-not-converted", "tokenizer.model only")),
    "no chat template": (remove_chat_template, coded("chat-template-missing")),
    "index without its shard": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "model-9.safetensors"}}'),
        coded("shard-missing", "model-9.safetensors"),
    ),
    "index that leaves the folder": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "../checkpoint/model.safetensors"}}'),
        coded("index-names-foreign-file"),
    ),
}


class TestBadInput:
    @pytest.mark.parametrize("damage", BAD)
    def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(self, damage: str, checkpoint: Path) -> None:
        damaging, refused = BAD[damage]
        damaging(checkpoint)
        before = bytes_of(checkpoint)
        with pytest.raises(BadInput, check=refused) as caught:
            inspect_checkpoint(checkpoint)
        assert caught.value.what_to_do
        assert "\n" not in caught.value.message
        assert bytes_of(checkpoint) == before

    def test_no_folder_and_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, check=coded("checkpoint-missing")):
            inspect_checkpoint(tmp_path / "gone")
        (tmp_path / "file").touch()
        with pytest.raises(BadInput, check=coded("checkpoint-is-file")):
            inspect_checkpoint(tmp_path / "file")

    def test_the_way_out_of_a_missing_chat_template_is_named(self, checkpoint: Path) -> None:
        remove_chat_template(checkpoint)
        with pytest.raises(BadInput) as caught:
            inspect_checkpoint(checkpoint)
        assert "--chat-template FILE" in caught.value.what_to_do

    @pytest.mark.parametrize("family", ["olmo2", "gpt2"])
    def test_a_real_checkpoint_of_another_architecture(self, family: str, tmp_path: Path) -> None:
        folder = make_tiny_checkpoint(tmp_path / family, family)
        with pytest.raises(
            BadInput, check=coded("architecture-not-supported", read_config(folder)["architectures"][0])
        ):
            inspect_checkpoint(folder)

    @hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_tensor_of_another_shape_is_found(self, data: st.DataObject, checkpoint: Path) -> None:
        tensors = {}
        shapes = _shapes(checkpoint)
        name = data.draw(st.sampled_from(sorted(name for name, shape in shapes.items() if len(shape) == 2)))
        axis = data.draw(st.sampled_from([0, 1]))
        for one, shape in shapes.items():
            changed = [size + (one == name and index == axis) for index, size in enumerate(shape)]
            tensors[one] = np.zeros(changed, np.int8)
        folder = checkpoint.parent / "reshaped"
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(BadInput, check=coded("tensor-shape", f"{name} in ")):
            inspect_checkpoint(folder)

    @hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        key=st.sampled_from(
            ["architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "intermediate_size", "vocab_size", "head_dim", "rope_parameters", "rope_scaling", "quantization_config",
             "max_position_embeddings", "tie_word_embeddings", "model_type", "auto_map", "partial_rotary_factor"]
        ),
        value=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "x"]), inner),
            max_leaves=3,
        ),
    )  # fmt: skip
    def test_any_config_is_accepted_or_refused_as_bad_input(self, key: str, value: Any, checkpoint: Path) -> None:
        original = (checkpoint / "config.json").read_bytes()
        try:
            change_json(checkpoint / "config.json", **{key: value})
            inspect_checkpoint(checkpoint)
        except BadInput:
            pass
        finally:
            (checkpoint / "config.json").write_bytes(original)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from slmops.infra.checkpoints.folder import read_tensor_headers

    return {name: header.shape for name, header in read_tensor_headers(folder).items()}


class TestContentDigest:
    @pytest.mark.parametrize(
        "name",
        ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "chat_template.jinja"],
    )  # fmt: skip
    def test_it_changes_with_every_content_file(self, name: str, checkpoint: Path) -> None:
        before = content_digest(checkpoint)
        with (checkpoint / name).open("ab") as stream:
            stream.write(b" ")
        changed = content_digest(checkpoint)
        (checkpoint / name).unlink()
        assert len({before, changed, content_digest(checkpoint)}) == 3

    def test_it_changes_with_a_files_name(self, checkpoint: Path) -> None:
        before = content_digest(checkpoint)
        (checkpoint / "chat_template.jinja").rename(checkpoint / "other.jinja")
        assert content_digest(checkpoint) != before

    @pytest.mark.parametrize(
        "name",
        ["README.md", "LICENSE", "LICENSE.txt", "eval.jsonl", "trainer_state.json", "modeling.py", ".gitattributes"],
    )
    def test_it_does_not_change_with_what_decides_no_answer(self, name: str, checkpoint: Path) -> None:
        before = content_digest(checkpoint)
        (checkpoint / name).write_text("something")
        assert content_digest(checkpoint) == before

    def test_it_does_not_depend_on_place_or_time(self, checkpoint: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(checkpoint, tmp_path / "copy ä"))
        os.utime(copy / "config.json", (0, 0))
        assert content_digest(copy) == content_digest(checkpoint)
        assert folder_of(copy.as_uri()) == copy


class TestChatTemplateOverlay:
    TEMPLATE = "{{ messages[0]['content'] }} größer"

    def test_both_readers_find_the_new_template(self, checkpoint: Path, settings: Settings) -> None:
        from transformers import AutoTokenizer

        before = bytes_of(checkpoint)
        overlay = with_chat_template(checkpoint, self.TEMPLATE, settings)
        assert read_chat_template(overlay) == self.TEMPLATE
        tokenizer = AutoTokenizer.from_pretrained(overlay)
        assert tokenizer.chat_template == self.TEMPLATE
        assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x größer"
        assert json.loads((overlay / "tokenizer_config.json").read_text("utf-8"))["chat_template"] == self.TEMPLATE
        assert bytes_of(checkpoint) == before
        assert inspect_checkpoint(overlay).kind == "checkpoint"
        assert content_digest(overlay) != content_digest(checkpoint)

    def test_the_weights_are_linked(self, checkpoint: Path, settings: Settings) -> None:
        overlay = with_chat_template(checkpoint, self.TEMPLATE, settings)
        assert (overlay / "model.safetensors").samefile(checkpoint / "model.safetensors")

    def test_a_checkpoint_without_one_gets_one(self, checkpoint: Path, settings: Settings) -> None:
        remove_chat_template(checkpoint)
        assert inspect_checkpoint(with_chat_template(checkpoint, self.TEMPLATE, settings)).kind == "checkpoint"

    def test_an_unchanged_checkpoint_is_prepared_once_and_a_changed_one_again(
        self, checkpoint: Path, settings: Settings
    ) -> None:
        first = with_chat_template(checkpoint, self.TEMPLATE, settings)
        assert with_chat_template(checkpoint, self.TEMPLATE, settings) == first
        change_json(checkpoint / "config.json", note="other")
        assert with_chat_template(checkpoint, self.TEMPLATE, settings) != first
        assert with_chat_template(checkpoint, "other", settings) != first
        assert list((settings.cache_dir / "work").iterdir()) == []


class TestKinds:
    @pytest.fixture
    def genai(self, tiny_checkpoint: Path, tmp_path: Path) -> Path:
        folder = tmp_path / "genai"
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny_checkpoint / name, folder / name)
        (folder / "model.onnx").write_bytes(EMPTY_GRAPH)
        model = {"type": "qwen2", "vocab_size": 512, "context_length": 1024, "decoder": {"filename": "model.onnx"}}
        (folder / "genai_config.json").write_text(json.dumps({"model": model}))
        return folder

    def test_a_genai_folder(self, genai: Path) -> None:
        found = inspect_checkpoint(genai)
        assert (found.kind, found.architecture, found.dtype) == ("genai", "qwen2", "onnx")
        assert (found.vocabulary_size, found.context_length) == (512, 1024)
        assert found.size_bytes == sum(path.stat().st_size for path in genai.iterdir())

    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"model": None},
            {"model": {"decoder": "model.onnx"}},
            {"model": {"decoder": {}}},
            {"model": {"decoder": {"filename": "other.onnx"}}},
            {"model": {"decoder": {"filename": "../genai/model.onnx"}}},
            {"model": {"decoder": {"filename": 7}}},
        ],
    )
    def test_a_genai_folder_without_its_model(self, config: dict[str, Any], genai: Path) -> None:
        (genai / "genai_config.json").write_text(json.dumps(config))
        with pytest.raises(BadInput, check=coded("genai-model-missing")):
            inspect_checkpoint(genai)

    def test_a_genai_folder_takes_a_given_chat_template(self, genai: Path) -> None:
        remove_chat_template(genai)
        with pytest.raises(BadInput, check=coded("chat-template-missing")):
            inspect_checkpoint(genai)
        assert inspect_checkpoint(genai, chat_template_given=True).kind == "genai"

    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        save_file({"lora_A": np.zeros((4, 64), np.float32)}, folder / "adapter_model.safetensors")
        return folder

    def test_an_adapter_folder(self, adapter: Path) -> None:
        found = inspect_checkpoint(adapter)
        assert (found.kind, found.architecture, found.parameters, found.dtype) == ("adapter", "LORA", 256, "F32")

    def test_an_adapter_with_truncated_weights(self, adapter: Path) -> None:
        weights = adapter / "adapter_model.safetensors"
        assert load_file(weights)
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(BadInput, check=coded("weights-damaged")):
            inspect_checkpoint(adapter)
        weights.rename(adapter / "adapter_model.bin")
        with pytest.raises(BadInput, check=coded("weights-pickled")):
            inspect_checkpoint(adapter)
        (adapter / "adapter_model.bin").unlink()
        with pytest.raises(BadInput, check=coded("adapter-without-weights", "adapter_model.safetensors")):
            inspect_checkpoint(adapter)

    def test_an_adapter_needs_a_complete_base(self, adapter: Path, tmp_path: Path, settings: Settings) -> None:
        with pytest.raises(BadInput, check=coded("adapter-base-unknown")):
            merge_into_base(adapter, None, settings, lambda *_: None)
        with pytest.raises(BadInput, check=coded("adapter-base-not-whole")):
            merge_into_base(adapter, str(adapter), settings, lambda *_: None)
        with pytest.raises(BadInput, check=coded("folder-missing")):
            merge_into_base(adapter, str(tmp_path / "gone"), settings, lambda *_: None)
        assert not settings.home_dir.exists()


def test_a_checkpoint_that_a_relative_path_named_is_found_in_another_folder(
    checkpoint: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    request = DeployRequest.of({"checkpoint": f"./{checkpoint.name}", "name": "home"})
    prepared = prepare_checkpoint.fn(request, settings)
    source = Source(digest=prepared.digest, origin=prepared.origin, architecture="Qwen2ForCausalLM", parameters=1)
    registry = open_registry(settings)
    manifest, _ = registry.commit("home", source, BUILDER, [stored_variant(registry, checkpoint)])
    assert manifest.source.origin == f"./{checkpoint.name}"  # others may read it: no folder of a user is in it
    monkeypatch.chdir(tmp_path.parent)
    assert prepare_source(manifest, settings).folder == checkpoint
    checkpoint.rename(tmp_path / "moved")
    with pytest.raises(BadInput, check=coded("checkpoint-gone", f"./{checkpoint.name}")):
        prepare_source(manifest, settings)
