"""Prompts with tools, calls and results, by the real templates and tokenizers of families: the same token ids in
transformers and onnxruntime-genai, whose template is mended."""

import json
import shutil
from pathlib import Path

import onnxruntime_genai as og
import pytest

from slmops.infra.checkpoints.folder import read_chat_template
from slmops.infra.errors import BadInput
from slmops.infra.genai.runtime import render_chat
from slmops.infra.genai.served_files import mend_files
from slmops.infra.reference.answers import Question
from slmops.infra.transformers.answers import render_question
from slmops.infra.transformers.tokenizer import load_tokenizer
from slmops.tasks.questions.tool_chats import tool_chats
from slmops.tasks.questions.tool_prompts import prompt_of
from tests.support.family_checkpoints import REAL_FAMILIES, is_left_out, save_real_tokenizer

GENAI_CONFIG = {"model": {"type": "llama", "context_length": 64, "vocab_size": 512, "decoder": {}}, "search": {}}


def families(*names: str) -> list[str]:
    return [name for name in names if not is_left_out(name)]


@pytest.mark.parametrize(
    "name", families("qwen3", "qwen2.5", "ministral-3", "smollm3", "llama-3.1", "phi-4-mini", "granite-3.3")
)
def test_prompts_with_tools_have_the_token_ids_of_transformers(name: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_real_tokenizer(REAL_FAMILIES[name], checkpoint)
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "genai_config.json").write_text(json.dumps(GENAI_CONFIG), "utf-8")
    mend_files(model, checkpoint)
    ours, theirs = og.Tokenizer(str(model)), load_tokenizer(checkpoint)
    compared = {}
    for title, row in tool_chats().items():
        messages, tools = prompt_of(row, read_chat_template(checkpoint))
        try:
            _, expected = render_question(theirs, Question(id=title, messages=messages, tools=tools))
        except BadInput:
            continue
        found = render_chat(ours, *prompt_of(row, read_chat_template(model)))
        compared[title] = [int(token) for token in ours.encode(found)] == expected
    refused = {"parallel calls"} if name == "llama-3.1" else set()  # its own template takes one call at a time
    assert compared == dict.fromkeys(tool_chats().keys() - refused, True)
