"""Calls of tools and thoughts through `slmops serve`, by a tiny model that has learned Qwen3's form of calls."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from slmops.infra.checkpoints.folder import read_chat_template
from slmops.infra.foundry.abilities import abilities_of
from slmops.infra.foundry.model_process import ModelProcess
from slmops.infra.genai.served_files import mend_files
from slmops.infra.genai.template_files import mend_template
from slmops.infra.reference.answers import Question
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.transformers.answers import render_question
from slmops.infra.transformers.tokenizer import load_tokenizer
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.questions.tool_prompts import prompt_of
from tests.support.family_checkpoints import REAL_FAMILIES, is_left_out, save_real_tokenizer
from tests.support.genai_models import build_genai_model
from tests.support.served_models import RunningServer, serving, store_model
from tests.support.tool_caller import HEAT, TOOLS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("caller")]

ASKED: dict[str, Any] = {"model": "caller", "tools": TOOLS, "max_tokens": 64}
LIGHT: list[Any] = [{"role": "user", "content": "Turn on the light in the garage."}]
NO_SCHEMA: Any = {"type": "function", "function": {"name": "f", "parameters": {"properties": ["a"]}}}
LIGHT_CALL = ("set_light", {"room": "garage", "on": True})


@pytest.fixture(scope="module")
def model_dir(tool_caller: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as onnxruntime-genai runs it."""
    model = build_genai_model(tool_caller, tmp_path_factory.mktemp("caller-model") / "model")
    mend_files(model, tool_caller)
    return model


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of that model."""
    home = tmp_path_factory.mktemp("caller-home") / "home"
    store_model(ModelRegistry(LocalObjectStore(home / "store")), model_dir, home / "in", name="caller")
    with serving(home) as running:
        yield running


def called(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def test_a_call_is_answered_and_the_final_text_comes(server: RunningServer) -> None:
    create = server.client().chat.completions.create
    (choice,) = create(messages=LIGHT, **ASKED).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert called(choice.message) == [LIGHT_CALL]
    assert choice.message.tool_calls
    result: Any = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "set"}
    (final,) = create(messages=[*LIGHT, choice.message, result], **ASKED).choices
    assert (final.finish_reason, final.message.content, final.message.tool_calls) == ("stop", "Done.", None)


def test_a_streamed_call_and_a_streamed_text(server: RunningServer) -> None:
    with server.client().chat.completions.stream(messages=LIGHT, **ASKED) as stream:
        (choice,) = stream.get_final_completion().choices
    assert (choice.finish_reason, called(choice.message)) == ("tool_calls", [LIGHT_CALL])
    (call,) = choice.message.tool_calls or ()
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "set"}
    sent = choice.message.model_dump()  # with what the client has read: parsed_arguments and the call's index
    assert {"parsed_arguments"} <= sent["tool_calls"][0]["function"].keys()
    history: Any = [*LIGHT, sent, result]
    chunks = list(server.client().chat.completions.create(messages=history, stream=True, **ASKED))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Done."
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_agent_of_pydantic_ai_calls_two_tools_in_three_turns(server: RunningServer) -> None:
    """An agent library's own loop: it calls tools until the model answers with text, and keeps the history."""
    from pydantic_ai import Agent, Tool
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    done = list[tuple[str, dict[str, Any]]]()

    def set_light(**arguments: Any) -> str:
        done.append(("set_light", arguments))
        return "set"

    def get_heat(**arguments: Any) -> str:
        done.append(("get_heat", arguments))
        return str(HEAT)

    functions = {"set_light": set_light, "get_heat": get_heat}
    described = [tool["function"] for tool in TOOLS]
    tools = [Tool.from_schema(functions[d["name"]], d["name"], d["description"], d["parameters"]) for d in described]
    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    agent = Agent(OpenAIChatModel("caller", provider=provider), tools=tools)
    answers, history = list[str](), list[Any]()
    for question in ("What is the heat in the kitchen?", str(LIGHT[0]["content"]), "What is the heat in the garage?"):
        turn = agent.run_sync(question, message_history=history)
        answers.append(turn.output)
        history = turn.all_messages()
    assert answers == [f"It is {HEAT}.", "Done.", f"It is {HEAT}."]
    assert done == [("get_heat", {"room": "kitchen"}), LIGHT_CALL, ("get_heat", {"room": "garage"})]


def test_a_required_call_is_made_by_the_schema(server: RunningServer) -> None:
    create = server.client().chat.completions.create
    parameters = {"properties": {"a": {"const": 7}}, "required": ["a"], "additionalProperties": False}
    other: Any = {"type": "function", "function": {"name": "stop", "parameters": parameters}}
    asked = {**ASKED, "tools": [*TOOLS, other], "parallel_tool_calls": False}
    forced = create(messages=LIGHT, tool_choice={"type": "function", "function": {"name": "stop"}}, **asked).choices[0]
    assert (forced.finish_reason, called(forced.message)) == ("tool_calls", [("stop", {"a": 7})])
    (required,) = create(messages=LIGHT, tool_choice="required", **{**ASKED, "parallel_tool_calls": False}).choices
    assert called(required.message) == [LIGHT_CALL]
    (without,) = create(messages=LIGHT, tool_choice="none", **ASKED).choices
    assert without.message.tool_calls is None


def test_prompts_with_tools_have_the_templates_tokens(server: RunningServer, tool_caller: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tool_caller)
    function = {"name": "set_light", "arguments": {"room": "garage", "on": True}}
    calls = [{"id": f"call0000{n}", "type": "function", "function": function} for n in (1, 2)]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "if a < b: # é"} for call in calls]
    thinking = {"role": "assistant", "content": "Done.", "reasoning_content": "The user wants light."}
    histories = {
        "tools": LIGHT,
        "results of parallel calls": [*LIGHT, {"role": "assistant", "content": "", "tool_calls": calls}, *results],
        "old thoughts": [*LIGHT, thinking, *LIGHT],
    }
    for told, messages in histories.items():
        expected = tokenizer.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, return_dict=False)
        sent: Any = [
            {**message, "tool_calls": [_as_openai(call) for call in message["tool_calls"]]}
            if "tool_calls" in message
            else message
            for message in messages
        ]
        usage = server.client().chat.completions.create(messages=sent, **{**ASKED, "max_tokens": 1}).usage
        assert usage
        assert (told, usage.prompt_tokens) == (told, len(expected))
    assert "wants light" not in tokenizer.apply_chat_template(histories["old thoughts"], tokenize=False)


def _as_openai(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}


def test_thoughts_are_turned_off_for_one_request(server: RunningServer) -> None:
    create = server.client().chat.completions.create
    counts = [
        create(model="caller", messages=LIGHT, max_tokens=1, extra_body=more).usage.prompt_tokens  # type: ignore[union-attr]
        for more in ({}, {"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"})
    ]
    assert counts[1] == counts[2] > counts[0]  # an empty block of thoughts


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [NO_SCHEMA]}, "tools[0].function.parameters"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [*LIGHT, {"role": "tool", "tool_call_id": "call00001", "content": "set"}]}, "messages"),
    ],
)
def test_bad_input_is_refused(server: RunningServer, more: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client().chat.completions.create(**{**ASKED, "messages": LIGHT, **more})
    assert refused.value.param == param


def test_a_schema_that_no_grammar_expresses_is_refused(server: RunningServer) -> None:
    parameters = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError, match="schema is not supported") as refused:
        server.client().chat.completions.create(
            **{**ASKED, "messages": LIGHT, "tools": [tool], "tool_choice": "required"}
        )
    assert refused.value.param == "tools"


def test_what_foundrys_own_service_does_with_the_same_model(model_dir: Path, tmp_path: Path) -> None:
    """Its protocol of calls is another one; it takes thoughts apart by the marks that its catalog publishes."""
    folder = tmp_path / "cache/models/custom/caller/v1"
    shutil.copytree(model_dir, folder)
    (folder / "inference_model.json").write_text(json.dumps({"Name": "caller:1"}), "utf-8")
    asked = {"model": "caller:1", "messages": LIGHT, "tools": TOOLS, "temperature": 0, "max_tokens": 64}
    thinking = {"type": "lark_grammar", "lark_grammar": 'start: "<think>\\nLight.\\n</think>\\n\\nDone."'}
    as_text = {**asked, "tool_choice": "none"}
    thinking_aloud = {**as_text, "response_format": thinking}
    bodies = (asked, as_text, thinking_aloud, {**thinking_aloud, "max_tokens": 4})

    async def answers() -> list[httpx.Response]:
        cache, marks = tmp_path / "cache", abilities_of(folder).simple_marks
        process = await ModelProcess.start(cache, "caller:1", 1, marks=marks, deadline_s=120, log_path=tmp_path / "log")
        async with httpx.AsyncClient(timeout=60) as client:
            found = [await client.post(f"{process.url}/v1/chat/completions", json=body) for body in bodies]
        await process.stop()
        return found

    called_itself, text, thoughts, cut = asyncio.run(answers())
    assert '"tool_calls"' not in called_itself.text  # docs/serving.md has its error; a runtime that calls needs no text
    assert text.json()["choices"][0]["message"]["content"].startswith('<tool_call>\n{"name": "set_light"')
    message = thoughts.json()["choices"][0]["message"]
    assert (message["reasoning_content"].strip(), message["content"].strip()) == ("Light.", "Done.")
    (choice,) = cut.json()["choices"]  # in the middle of its thoughts
    assert (choice["finish_reason"], choice["message"]["content"] or "") == ("length", "")
    assert "Light.".startswith(choice["message"]["reasoning_content"].strip())


@pytest.mark.parametrize("family", [name for name in ("granite-3.3", "phi-4-mini") if not is_left_out(name)])
def test_foundry_puts_tools_where_a_real_template_reads_them(
    family: str, model_dir: Path, tool_caller: Path, tmp_path: Path
) -> None:
    """In transformers, Phi-4-mini's system message has them. Another family's model stands for the weights."""
    tool = {**TOOLS[0]["function"], "parameters": {"type": "object", "properties": {"on": {"type": "object"}}}}
    row = EvaluationRow.model_validate({"id": 1, "messages": LIGHT, "tools": [{"type": "function", "function": tool}]})
    (tmp_path / "real").mkdir()
    save_real_tokenizer(REAL_FAMILIES[family], tmp_path / "real")
    template = read_chat_template(tmp_path / "real") or ""
    reference, folder = tmp_path / "reference", tmp_path / "cache/models/custom/caller/v1"
    for source, target, text in (
        (tool_caller, reference, template),
        (model_dir, folder, mend_template(template).text),
    ):
        shutil.copytree(source, target)
        (target / "chat_template.jinja").write_text(text, "utf-8")
    (folder / "inference_model.json").write_text(json.dumps({"Name": "caller:1"}), "utf-8")
    messages, tools = prompt_of(row, template)
    _, expected = render_question(load_tokenizer(reference), Question(id=1, messages=messages, tools=tools))
    offered = [offer.model_dump(mode="json") for offer in row.tools]
    body = {"model": "caller:1", "messages": LIGHT, "tools": offered, "tool_choice": "none", "max_tokens": 1}

    async def usage() -> dict[str, int]:
        log = tmp_path / "log"
        process = await ModelProcess.start(tmp_path / "cache", "caller:1", 1, deadline_s=120, log_path=log)
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.post(f"{process.url}/v1/chat/completions", json=body)
        await process.stop()
        return dict(answer.json()["usage"])

    assert asyncio.run(usage())["prompt_tokens"] == len(expected)
