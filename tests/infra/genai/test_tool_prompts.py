"""Prompts with tools, calls and results, by the real templates and tokenizers of families: the same token ids in
transformers and onnxruntime-genai, or what genai does in another way."""

import json
import shutil
from collections.abc import Callable, Iterator
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
OFFERED, WITH_SYSTEM, RESULT, PARALLEL, AFTER = tool_chats()
# What genai 0.18 writes in place of the template's text, and the conversations in which it does. A deploy whose rows
# have tools refuses such a model (the check template_parity).
OTHERWISE = {
    # Tools without OpenAI's wrapping; a result that is JSON is an object, not a text.
    "llama-3.1": ('\n\n{\n    "name": "', (OFFERED, WITH_SYSTEM, RESULT, AFTER)),
    # Tools in another schema, of which required, enum and bounds are missing.
    "phi-4-mini": ('<|tool|>[{"name": "', (OFFERED, WITH_SYSTEM, RESULT, PARALLEL, AFTER)),
    # An empty object has a line break in it where JSON is indented.
    "granite-3.3": ('"properties": {\n                    \n', (WITH_SYSTEM, RESULT, PARALLEL, AFTER)),
}


def families(*names: str) -> list[str]:
    return [name for name in names if not is_left_out(name)]


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[[str], Iterator[tuple[str, str, bool]]]:
    """Yields, for a family, each conversation that its template takes, genai's prompt, and whether its ids agree."""

    def compared(name: str) -> Iterator[tuple[str, str, bool]]:
        checkpoint = tmp_path / "checkpoint"
        checkpoint.mkdir()
        save_real_tokenizer(REAL_FAMILIES[name], checkpoint)
        model = shutil.copytree(checkpoint, tmp_path / "model")
        (model / "genai_config.json").write_text(json.dumps(GENAI_CONFIG), "utf-8")
        mend_files(model, checkpoint)
        ours, theirs, template = og.Tokenizer(str(model)), load_tokenizer(checkpoint), read_chat_template(checkpoint)
        for title, row in tool_chats().items():
            messages, tools = prompt_of(row, template)
            try:
                _, ids = render_question(theirs, Question(id=title, messages=messages, tools=tools))
            except BadInput:  # the template refuses it: Llama 3.1's takes no parallel calls
                continue
            found = render_chat(ours, messages, tools)
            yield title, found, [int(token) for token in ours.encode(found)] == ids

    return compared


@pytest.mark.parametrize("name", families("qwen3", "qwen2.5", "ministral-3", "smollm3"))
def test_prompts_with_tools_have_the_token_ids_of_transformers(
    name: str, prompts: Callable[[str], Iterator[tuple[str, str, bool]]]
) -> None:
    assert {title: agrees for title, _, agrees in prompts(name)} == dict.fromkeys(tool_chats(), True)


@pytest.mark.parametrize("name", families(*OTHERWISE))
def test_genai_writes_some_tools_otherwise(
    name: str, prompts: Callable[[str], Iterator[tuple[str, str, bool]]]
) -> None:
    written, titles = OTHERWISE[name]
    found = [(title, text) for title, text, agrees in prompts(name) if not agrees]
    assert tuple(title for title, _ in found) == titles
    assert all(written in text for _, text in found)
