"""Checkpoints whose files disagree or carry marks of Windows editors: what is built is what transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.checkpoints.dequantization import PACKED
from slmops.infra.checkpoints.folder import read_json
from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.tasks.checkpoint.inspection import inspect_checkpoint
from slmops.tasks.checkpoint.preparation import as_loaded, fetch_checkpoint
from slmops.tasks.exams.statements import statements_of
from tests.infra.checkpoints.test_text_part import make_whole
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.quantized_checkpoints import quantized_as

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an lm_head of its own; read only."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("untied") / "checkpoint", tied=False)


def copy_of(checkpoint: Path, target: Path, **changes: Any) -> Path:
    folder = Path(shutil.copytree(checkpoint, target))
    config = json.loads((folder / "config.json").read_text("utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def change_tensors(folder: Path, *, drop: str = "", same: bool = False) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop(drop, None)
    if same:
        tensors[LM_HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def matrices(folder: Path) -> tuple[Any, Any]:
    """The embedding and the lm_head of the model that transformers loads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def fetched(folder: Path, settings: Settings) -> Path:
    return fetch_checkpoint(str(folder), None, settings, lambda done, total, what: None)


def test_an_lm_head_of_its_own_is_built_though_config_json_ties_it(
    untied: Path, settings: Settings, tmp_path: Path
) -> None:
    folder = copy_of(untied, tmp_path / "checkpoint", tie_word_embeddings=True)
    embedding, lm_head = matrices(folder)
    assert not embedding.equal(lm_head)  # transformers does not tie them
    found = inspect_checkpoint(folder)
    assert (found.own_lm_head, found.tied_embeddings) == (True, False)
    assert "lm_head that differs" in found.warnings[0]
    said = next(said for said in statements_of(folder, found) if said.name == "embedding and lm_head")
    assert (said.value, said.used[:17]) == ("tie_word_embeddings: true", "separate matrices")
    built = as_loaded(folder, found, settings)
    assert read_json(built / "config.json")["tie_word_embeddings"] is False
    assert [one.equal(other) for one, other in zip(matrices(built), (embedding, lm_head), strict=True)] == [True, True]
    assert not inspect_checkpoint(built).own_lm_head
    assert read_json(folder / "config.json")["tie_word_embeddings"] is True


def test_an_lm_head_that_is_the_embedding_saved_twice_stays_tied(untied: Path, tmp_path: Path) -> None:
    folder = copy_of(untied, tmp_path / "checkpoint", tie_word_embeddings=True)
    change_tensors(folder, same=True)
    found = inspect_checkpoint(folder)
    assert (found.own_lm_head, found.tied_embeddings, found.warnings) == (False, True, ())


def test_one_matrix_under_the_name_of_lm_head_is_the_embedding_too(untied: Path, tmp_path: Path) -> None:
    folder = copy_of(untied, tmp_path / "checkpoint", tie_word_embeddings=True)
    change_tensors(folder, drop=EMBEDDING)
    embedding, lm_head = matrices(folder)
    assert embedding is lm_head
    assert inspect_checkpoint(folder).tied_embeddings


def test_a_model_type_that_is_not_tied_by_itself_needs_an_lm_head(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path / "checkpoint")
    config = read_json(folder / "config.json")
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(BadInput, check=coded("tensor-missing", LM_HEAD)):
        inspect_checkpoint(folder)


def test_the_text_part_of_a_multi_modal_checkpoint_keeps_its_own_lm_head(
    tiny_checkpoint: Path, settings: Settings, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    whole = make_whole(tmp_path / "whole", "google/gemma-3-4b-it (text)")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_checkpoint / name, whole / name)
    index = read_json(whole / "model.safetensors.index.json")
    save_file({LM_HEAD: torch.ones(512, 64)}, whole / "head.safetensors", metadata={"format": "pt"})
    index["weight_map"][LM_HEAD] = "head.safetensors"
    (whole / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    found = inspect_checkpoint(whole)
    assert (found.own_lm_head, found.multimodal) == (True, True)
    embedding, lm_head = matrices(as_loaded(whole, found, settings))
    assert bool((lm_head == 1).all()) and not embedding.equal(lm_head)


def test_a_quantized_checkpoint_keeps_its_own_lm_head(untied: Path, settings: Settings, tmp_path: Path) -> None:
    folder = copy_of(quantized_as("gptq", untied, tmp_path / "quantized"), tmp_path / "both", tie_word_embeddings=True)
    assert inspect_checkpoint(folder).own_lm_head
    numbers = fetched(folder, settings)
    built = as_loaded(numbers, inspect_checkpoint(numbers), settings)
    assert matrices(built)[1].equal(matrices(numbers)[1])
    for config in ("config.json", f"{PACKED}/config.json"):  # the packed weights are what is built
        assert read_json(built / config)["tie_word_embeddings"] is False
    assert "quantization_config" in read_json(built / PACKED / "config.json")


def test_a_template_in_another_encoding_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path / "checkpoint")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-16-le")
    with pytest.raises(BadInput, check=coded("file-not-utf8", "chat_template.jinja", "UTF-16")):
        inspect_checkpoint(folder)


def test_json_of_windows_editors_is_read_as_what_it_says(
    tiny_checkpoint: Path, settings: Settings, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = copy_of(tiny_checkpoint, tmp_path / "checkpoint")
    for path in folder.glob("*.json"):
        path.write_bytes(BYTE_ORDER_MARK + path.read_bytes().replace(b"\n", b"\r\n"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert inspect_checkpoint(folder) == inspect_checkpoint(tiny_checkpoint)
    readable = fetched(folder, settings)
    for load in (AutoConfig.from_pretrained, GenerationConfig.from_pretrained):
        assert load(readable).to_diff_dict() == load(tiny_checkpoint).to_diff_dict()
    text = [{"role": "user", "content": "Turn on the lights, naïve café."}]
    assert AutoTokenizer.from_pretrained(readable).apply_chat_template(text) == AutoTokenizer.from_pretrained(
        tiny_checkpoint
    ).apply_chat_template(text)
    assert (readable / "model.safetensors").samefile(folder / "model.safetensors")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert fetched(tiny_checkpoint, settings) == tiny_checkpoint  # nothing to rewrite


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_json_in_another_encoding_is_refused_by_its_name(encoding: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path / "checkpoint")
    (folder / "config.json").write_text((folder / "config.json").read_text("utf-8"), encoding)
    with pytest.raises(BadInput, check=coded("file-not-json", "config.json", "UTF-16 and not UTF-8")):
        inspect_checkpoint(folder)


def test_new_rows_beside_a_rewritten_checkpoint_are_seen(
    tiny_checkpoint: Path, settings: Settings, tmp_path: Path
) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path / "checkpoint")
    config = folder / "config.json"
    config.write_bytes(BYTE_ORDER_MARK + config.read_bytes())
    for rows in ("first", "second"):
        (folder / "eval.jsonl").unlink(missing_ok=True)  # as an editor that replaces the file
        (folder / "eval.jsonl").write_text(rows, "utf-8")
        assert (fetched(folder, settings) / "eval.jsonl").read_text("utf-8") == rows
