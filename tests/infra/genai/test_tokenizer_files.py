"""Corrected tokenizers: genai gives the tokens of the model's training, unlike transformers 5."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import pytest

from slmops.infra.checkpoints.tokenizer import trained_by_file
from slmops.infra.genai.served_files import MendedFile, mend_files
from slmops.infra.transformers.tokenizer import auto_tokenizer, file_tokenizer, load_tokenizer, rebuilt_parts
from slmops.tasks.questions.chats import CONVERSATIONS, NOTED_ONLY
from tests.support.real_models import real_model
from tests.tasks.chat_templates import TEMPLATES

JUDGED = [name for name in CONVERSATIONS if name not in NOTED_ONLY]


class Case:
    """A checkpoint with a real tokenizer, and the model builder's files for it."""

    def __init__(self, directory: Path, tokenizer: str, model_type: str, saved_by: str | None, **config: Any) -> None:
        self.checkpoint, self.model = directory / "checkpoint", directory / "model"
        shutil.copytree(real_model(f"tokenizers/{tokenizer}"), self.checkpoint)
        path = self.checkpoint / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | config), "utf-8")
        if tokenizer == "llama2":
            shutil.copyfile(TEMPLATES / "mistral-v0.1.jinja", self.checkpoint / "chat_template.jinja")
        saved = {"transformers_version": saved_by} if saved_by else {}
        (self.checkpoint / "config.json").write_text(json.dumps({"model_type": model_type} | saved), "utf-8")
        self.built = auto_tokenizer(self.checkpoint)
        self.built.save_pretrained(self.model)
        model = {"type": model_type, "context_length": 1024, "vocab_size": len(self.built), "eos_token_id": 2}
        config_file = {"model": {**model, "decoder": {"filename": "model.onnx"}}}
        (self.model / "genai_config.json").write_text(json.dumps(config_file), "utf-8")
        self.reference = load_tokenizer(self.checkpoint)

    def differing(self) -> list[str]:
        """Return the conversations of which genai's prompt has other tokens than the reference's."""
        genai = og.Tokenizer(str(self.model))
        found = []
        for name in JUDGED:
            chat = list(CONVERSATIONS[name])
            text = self.reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = self.reference(text, add_special_tokens=False)["input_ids"]
            rendered = genai.apply_chat_template(json.dumps(chat), add_generation_prompt=True)
            if [int(token) for token in genai.encode(rendered)] != ids:
                found.append(name)
        return found

    def answers(self) -> list[str]:
        """Return genai's streamed texts of the tokens of answers."""
        genai = og.Tokenizer(str(self.model))
        texts = []
        for messages in CONVERSATIONS.values():
            stream, ids = genai.create_stream(), self.reference(messages[-1]["content"], add_special_tokens=False)
            texts.append("".join(stream.decode(token) for token in ids["input_ids"]))
        return texts

    def mend(self) -> MendedFile:
        (mended,) = [file for file in mend_files(self.model, self.checkpoint) if file.file == "tokenizer.json"]
        return mended


@pytest.mark.parametrize(
    ("tokenizer", "model_type", "saved_by", "config", "mend", "before"),
    [
        # Llama 2's file puts a space before every text between control tokens; transformers 5's class before the first.
        ("llama2", "llama", "4.57.1", {"legacy": True}, "a space before every text", None),
        ("llama2", "llama", None, {"legacy": False}, "a space before every text", None),
        ("llama2", "llama", "5.1.0", {"legacy": False}, "the decoder's step Strip", JUDGED),
        # Qwen2's class normalizes and splits otherwise than DeepSeek's file.
        ("deepseek_v3", "qwen2", "4.48.0", {}, "the checkpoint's own normalizer", ["combining marks", "digits"]),
    ],
)
def test_genai_gives_the_tokens_of_the_training(
    tmp_path: Path, tokenizer: str, model_type: str, saved_by: str, config: Any, mend: str, before: list[str] | None
) -> None:
    case = Case(tmp_path, tokenizer, model_type, saved_by, **config)
    assert rebuilt_parts(case.built, case.checkpoint) == ("normalizer", "pre_tokenizer")
    assert type(case.reference) is (type(file_tokenizer(case.checkpoint)) if before != JUDGED else type(case.built))
    if before is not None:
        assert case.differing() == before, "this mend is no longer needed"
    told = case.answers()
    mended = case.mend()
    assert mended.mends[0].startswith(mend)
    assert mended.source_sha256 != mended.variant_sha256
    assert case.differing() == []
    assert case.answers() == told


def test_a_tokenizer_that_both_read_alike_stays_as_it_is(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama3", "llama", "4.40.0")
    assert rebuilt_parts(case.built, case.checkpoint) == ()
    assert mend_files(case.model, case.checkpoint) == ()


@pytest.mark.parametrize(
    ("saved_by", "tokenizer_class", "follows"),
    [
        ("4.57.1", "LlamaTokenizer", True),
        ("5.0.0", "LlamaTokenizer", False),
        ("5.23.0", "TokenizersBackend", True),  # saved by transformers 5 as a tokenizer that follows the file
        (None, "LlamaTokenizer", True),
    ],
)
def test_what_a_model_was_trained_by(tmp_path: Path, saved_by: str | None, tokenizer_class: str, follows: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"transformers_version": saved_by} if saved_by else {}), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}), "utf-8")
    assert trained_by_file(tmp_path) == follows
