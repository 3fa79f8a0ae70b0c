"""One set of end tokens from the four places that name them, and what generation_config.json says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.errors import BadInput
from slmops.infra.reference.decoding import PLAIN
from slmops.infra.reference.thinking import Thinking
from slmops.tasks.exams.decoding import read_end_tokens, settle_decoding
from tests.support.errors import coded
from tests.support.real_models import real_model

TURN, TEXT = "<|im_end|>", "<|endoftext|>"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


def ids_of(checkpoint: Path) -> dict[str, int]:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def end_by(checkpoint: Path, *, tokenizer: str, configs: object) -> None:
    edit(checkpoint / "tokenizer_config.json", eos_token=tokenizer)
    for name in ("config.json", "generation_config.json"):
        edit(checkpoint / name, eos_token_id=configs)


def test_files_that_agree_leave_transformers_as_it_is(checkpoint: Path) -> None:
    settled = settle_decoding(checkpoint, {})
    assert settled.end_token_ids == (ids_of(checkpoint)[TURN],)
    assert (settled.decoding, settled.warnings) == (PLAIN, ())


@pytest.mark.parametrize("tokenizer", [TURN, TEXT])
def test_the_end_of_a_turn_ends_an_answer_wherever_it_is_named(checkpoint: Path, tokenizer: str) -> None:
    """The base's end of text in the configs, as fine-tuning leaves it, in the tokenizer as well or not."""
    ids = ids_of(checkpoint)
    end_by(checkpoint, tokenizer=tokenizer, configs=ids[TEXT])
    settled = settle_decoding(checkpoint, {})
    assert set(settled.end_token_ids) == {ids[TURN], ids[TEXT]}
    assert settled.decoding.end_token_ids == settled.end_token_ids
    (warning,) = settled.warnings
    assert f"chat template: {TURN} ({ids[TURN]})" in warning
    assert f"config.json: {TEXT} ({ids[TEXT]})" in warning


def test_a_place_that_names_more_than_another_is_no_contradiction(checkpoint: Path) -> None:
    ids = ids_of(checkpoint)
    end_by(checkpoint, tokenizer=TURN, configs=[ids[TURN], ids[TEXT]])
    settled = settle_decoding(checkpoint, {})
    assert (settled.decoding, settled.warnings) == (PLAIN, ())
    assert len(settled.end_token_ids) == 2


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for message in messages %}{{ message['content'] }}\n{% endfor %}",  # it ends turns with plain text
        "{% for message in messages %}{{ message['content'] + '</think>' }}{% endfor %}",  # an added token that is text
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_without_an_end_of_its_own_names_none(checkpoint: Path, template: str | None) -> None:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "content": "</think>", "special": False})
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (checkpoint / "chat_template.jinja").unlink(missing_ok=True)
    edit(checkpoint / "tokenizer_config.json", chat_template=template)
    assert read_end_tokens(checkpoint).places["chat template"] == ()


@pytest.mark.parametrize("template", ["{% for", "{{ 'a' | shout }}"])  # the second is parsed, and not compiled
def test_a_template_that_is_not_jinja_is_refused(checkpoint: Path, template: str) -> None:
    (checkpoint / "chat_template.jinja").write_text(template, "utf-8")
    with pytest.raises(BadInput, check=coded("chat-template-not-jinja")):
        read_end_tokens(checkpoint)


def test_the_repetition_penalty_is_kept_and_sampling_reported(checkpoint: Path) -> None:
    path = checkpoint / "generation_config.json"
    edit(path, repetition_penalty=1.1, do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    settled = settle_decoding(checkpoint, {})
    assert settled.decoding.repetition_penalty == 1.1
    assert "temperature 0.7, top_p 0.8, top_k 20" in settled.warnings[0]
    given = settle_decoding(checkpoint, {"repetition_penalty": 1.0, "temperature": 0.0})
    assert (given.decoding, given.warnings) == (PLAIN, ())


@pytest.mark.parametrize("penalty", ["1.1", 0, -1, 2.5, True])
def test_an_invalid_repetition_penalty_is_left_out_and_reported(checkpoint: Path, penalty: object) -> None:
    edit(checkpoint / "generation_config.json", repetition_penalty=penalty)
    settled = settle_decoding(checkpoint, {})
    assert settled.decoding == PLAIN
    assert repr(penalty) in settled.warnings[0]


def test_a_built_model_has_its_own_penalty_and_end_tokens(tmp_path: Path) -> None:
    config = {"model": {"eos_token_id": 7}, "search": {"repetition_penalty": 1.2}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config), "utf-8")
    settled = settle_decoding(tmp_path, {})
    assert (settled.end_token_ids, settled.decoding.repetition_penalty) == ((), 1.2)


@pytest.mark.parametrize("is_onnx", [False, True])
def test_thoughts_are_found_by_the_template_or_the_vocabulary(tmp_path: Path, is_onnx: bool) -> None:
    qwen3 = real_model("tokenizers/qwen3")
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(qwen3, checkpoint)
    if is_onnx:
        (checkpoint / "genai_config.json").write_text("{}", "utf-8")
    settled = settle_decoding(checkpoint, {})
    assert settled.marks
    assert (settled.marks.end, settled.marks.shown_by) == ("</think>", "template")
    assert settled.decoding.thinking is None  # the key of a build does not depend on it
    assert settled.answering(99).thinking == Thinking(marks=settled.marks, max_tokens=99)
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    untold = settle_decoding(checkpoint, {}).marks
    assert untold
    assert (untold.end, untold.shown_by) == ("</think>", "vocabulary")
