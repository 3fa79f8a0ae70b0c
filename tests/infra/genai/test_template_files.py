"""Corrected chat templates: genai and transformers render them as transformers renders the checkpoint's."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from slmops.infra.errors import BadInput
from slmops.infra.genai.template_files import mend_template
from slmops.tasks.questions.chats import CONVERSATIONS
from tests.support.errors import coded
from tests.support.family_tokenizers import FAMILIES, save_tokenizer
from tests.support.real_models import real_model

QUESTION = {"role": "user", "content": "Hello abc def"}
THOUGHTFUL = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}
CHAT = [QUESTION, THOUGHTFUL, {"role": "user", "content": "And?"}]
CALL = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"x": "a<b", "n": 1}}}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "string", "description": "é"}}, "required": ["x"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "description": "Does <f>.", "parameters": PARAMETERS}}
]
CALLED = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
RESULT = {"role": "tool", "content": '{"a": 1}', "tool_call_id": "call00001", "name": "f"}
# What a runtime renders: a conversation and the tools that the client offers.
Chat = tuple[Sequence[dict[str, Any]], list[dict[str, Any]] | None]
CHATS: dict[str, Chat] = {
    **{name: (CONVERSATIONS[name], None) for name in ("several turns with system", "white space around", "code")},
    "thoughts in the history": (CHAT, None),
    "thoughts apart": ([QUESTION, {**THOUGHTFUL, "content": "Yes", "reasoning_content": "hm"}, CHAT[2]], None),
}
WITH_TOOLS: dict[str, Chat] = {
    "tools": ([QUESTION], TOOLS),
    "tools and system": ([{"role": "system", "content": "You call functions."}, QUESTION], TOOLS),
    "a call in the history": ([*CALLED, RESULT, QUESTION], TOOLS),
    "a tool's result": ([*CALLED, RESULT], TOOLS),
}

# Each is another text in genai as it stands: what no longer is may go.
MENDED = [
    "{% if true %}\na{% endif %}\nb\n\n{% if true %}\n  {% if true %}\n    c\n  {% endif %}\n{% endif %}",
    "a{# comment #}\nb",
    "  {% if true %}a{% endif %}\n  {{ 'b' }}",
    "{% if true %}a{% endif %}\n\nb",
    "a\n  {%+ if true %}b{% endif %}",
    "{% raw %}{{ x }}{% endraw %}",
    "\ufeff{{ messages[0].content.count('a') }}",
    "{{ messages[0].content.replace('a', 'b') }}",
    "{{ messages[0].content.replace('a', 'b').replace('b', '').strip() + '!' }}",
    "{{ messages|length|replace('3', 'three') }}",
    "{{ '</think>' in messages[1].content }}{{ 'x' not in messages[1]['content'] }}",
    "{{ (messages|first).role }}{{ messages[0].content|first }}",
    "{{ (messages|selectattr('role', 'equalto', 'assistant')|first).content }}",
    "{{ messages[0].content[-1] }}{{ messages[0].content[0] }}{{ messages[0].content|last }}",
    "{% for m in messages|reverse %}{{ m.role }}{% endfor %}",
    "{{ tools is defined }}{{ tools is not none }}",
    "{{ documents is defined }}",
    "{{ 'aB'.lower() }}{{ 'ab cd'|title }}{{ 'ab cd'|capitalize }}",
    "{{ 'a-b-c'.split('-', 1)[1] }}{{ 'a-b-c'.split('-', 1)[0] }}{{ 'a-b'.split('+', 1)[-1] }}",
    "{% for key in {'a': 1}.keys() %}{{ key }}{% endfor %}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{{ {'a': 'é'}|tojson(ensure_ascii=False) }}",
    '{{ "\\u00e9\\x41" }}',
    "{{ 'abc'.startswith(('a', 'd')) }}",
    "{{ 'a' is equalto 'a' }}{{ 'a' is in 'abc' }}",
    "{{ 1 < 2 < 3 }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f('abc').endswith('c') }}",
]


@pytest.fixture(scope="module")
def genai(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Chat], str]:
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), FAMILIES["qwen3"])
    model = {"type": "qwen3", "context_length": 1024, "vocab_size": 512, "decoder": {"filename": "model.onnx"}}
    (folder / "genai_config.json").write_text(json.dumps({"model": {**model, "eos_token_id": 2}}), "utf-8")
    tokenizer = og.Tokenizer(str(folder))

    def render(template: str, chat: Chat) -> str:
        offered = {"tools": json.dumps(chat[1])} if chat[1] else {}
        try:
            return str(
                tokenizer.apply_chat_template(
                    json.dumps(list(chat[0])), template_str=template, add_generation_prompt=True, **offered
                )
            )
        except Exception as error:  # the binding raises bare exceptions
            return f"error: {error}"

    return render


def transformers(template: str, chat: Chat) -> str | None:
    """Return transformers' rendering, None for a conversation that the template refuses."""
    tokens = {"bos_token": "", "eos_token": "<|im_end|>"}
    try:
        rendered, _ = render_jinja_template(
            [list(chat[0])], tools=chat[1], chat_template=template, add_generation_prompt=True, **tokens
        )
    except Exception:  # a template may raise anything
        return None
    return str(rendered[0])


@pytest.mark.parametrize("template", MENDED)
def test_what_genai_renders_differently_is_corrected(template: str, genai: Callable[[str, Chat], str]) -> None:
    chat: Chat = (CHAT, None)
    expected = transformers(template, chat)
    assert expected is not None
    assert genai(template, chat) != expected, "this mend is no longer needed"
    mended = mend_template(template)
    assert mended.mends and not mended.left
    assert genai(mended.text, chat) == transformers(mended.text, chat) == expected


@pytest.mark.parametrize("template", ["{{- 'a' -}} b {%- if true -%} c {%- endif %}d", "{{ messages[-1]['content'] }}"])
def test_a_template_that_genai_renders_alike_stays_as_it_is(template: str) -> None:
    assert mend_template(template).text == template


def test_what_cannot_be_rewritten_is_reported() -> None:
    mended = mend_template("{{ 'a'|upper }}{{ 3 / 2 }}{{ 'a'.format() }}")
    assert mended.mends == ()
    assert sorted(mended.left) == [
        "division of whole numbers is truncated",
        "there is no filter upper",
        "there is no method format",
    ]
    with pytest.raises(BadInput, check=coded("chat-template-not-jinja", "line 2")):
        mend_template("a\n{% if %}")


# Of llama.cpp's collection of templates, with the conversations of which tools are part where those agree too. What
# genai makes of tools is not the template's matter: it takes them out of OpenAI's wrapping for some templates.
REAL = {
    "HuggingFaceTB-SmolLM3-3B": True, "Qwen-Qwen2.5-7B-Instruct": True, "Qwen-Qwen3-0.6B": True, "Qwen3.5-4B": True,
    "Qwen3-Coder": True, "LFM2-8B-A1B": True, "LFM2.5-Instruct": True, "ibm-granite-granite-3.3-2B-Instruct": True,
    "ibm-granite-granite-4.0": True, "microsoft-Phi-3.5-mini-instruct": True, "google-gemma-2-2b-it": True,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": True, "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": True,
    "mistralai-Ministral-3-14B-Reasoning-2512": True, "Mistral-Small-3.2-24B-Instruct-2506": True,
    "NVIDIA-Nemotron-Nano-v2": True, "openai-gpt-oss-120b": True, "GLM-4.7-Flash": True, "MiniMax-M2": True,
    "ByteDance-Seed-OSS": True, "Kimi-K2-Instruct": True, "Bielik-11B-v3.0-Instruct": True, "GLM-4.6": True,
    "meta-llama-Llama-3.1-8B-Instruct": False, "meta-llama-Llama-3.2-3B-Instruct": False, "unsloth-Apriel-1.5": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def templates() -> Path:
    return real_model("llama-cpp-models") / "templates"


def test_real_templates_are_rendered_as_by_transformers(templates: Path, genai: Callable[[str, Chat], str]) -> None:
    differing, compared, mended_ones = [], 0, 0
    for name, with_tools in REAL.items():
        template = (templates / f"{name}.jinja").read_text("utf-8")
        mended = mend_template(template)
        mended_ones += bool(mended.mends)
        for title, chat in (CHATS | (WITH_TOOLS if with_tools else {})).items():
            expected = transformers(template, chat)
            if expected is None:
                continue
            compared += 1
            found = {"genai": genai(mended.text, chat), "transformers": transformers(mended.text, chat)}
            differing += [(name, title, runtime) for runtime, text in found.items() if text != expected]
    assert differing == []
    assert compared > 200
    assert mended_ones > 15


def test_any_template_stays_the_same_in_transformers(templates: Path) -> None:
    differing = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted(templates.glob("*.jinja")):
            template = path.read_text("utf-8")
            mended = mend_template(template).text
            for title, chat in (CHATS | WITH_TOOLS).items():
                if transformers(mended, chat) != transformers(template, chat):
                    differing.append((path.name, title))
    assert differing == []
