"""Evaluation rows with tools: what is read, what is refused, and how calls are scored."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.errors import BadInput
from slmops.infra.tool_calls.call import AnsweredCalls, ToolCall
from slmops.tasks.questions.evaluation_set import EvaluationRow, plain_rows, read_evaluation_file
from slmops.tasks.questions.scoring import parse_scorer
from slmops.tasks.questions.tool_calls import category_of, compare_calls
from slmops.tasks.questions.tool_chats import tool_chats
from slmops.tasks.questions.tool_prompts import form_for, prompt_of
from tests.support.errors import coded
from tests.tasks.chat_templates import TEMPLATES

SCHEMA = {"type": "object", "properties": {"room": {"type": "string"}, "level": {"type": "number"}}}
LIGHT: dict[str, Any] = {"type": "function", "function": {"name": "set_light", "parameters": SCHEMA}}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
USER = {"role": "user", "content": "Light!"}
CALL = {"id": "c1", "type": "function", "function": {"name": "set_light", "arguments": '{"room": "hall"}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "ok"}
ASSISTANT = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ROW: dict[str, Any] = {"id": 1, "messages": [USER], "tools": [LIGHT], "expected_tool_calls": []}
BAD_SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"type": "thing"}}}
OTHER = {**CALL, "function": {"name": "open_door", "arguments": {}}}


def read(path: Path, *lines: dict[str, Any]) -> list[EvaluationRow]:
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return read_evaluation_file(path)


def test_tools_of_a_file_are_those_of_rows_without_any(tmp_path: Path) -> None:
    row = {"id": 1, "messages": [USER], "expected_tool_calls": [{"name": "get_time", "arguments": {}}]}
    plain = {"id": 3, "messages": [USER], "expected": "x", "tools": []}
    rows = read(tmp_path / "eval.jsonl", {"tools": [CLOCK]}, row, {**ROW, "id": 2}, plain)
    assert [[tool.function.name for tool in row.tools] for row in rows] == [["get_time"], ["set_light"], []]
    assert [row.scorer.name for row in rows] == ["tool_calls", "tool_calls", "exact_match"]
    assert [row.id for row in plain_rows(rows)] == [3]
    assert plain_rows(rows[:2])[0].model_dump(exclude_defaults=True) == {"id": 1, "messages": (USER,)}
    assert EvaluationRow.model_validate(rows[0].model_dump(mode="json")) == rows[0]


def test_calls_and_results_are_given_to_the_template(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "eval.jsonl", {**ROW, "messages": [USER, ASSISTANT, RESULT]})
    messages, tools = prompt_of(row, "{{ tools }}")
    assert messages[1]["tool_calls"][0]["function"] == {"name": "set_light", "arguments": {"room": "hall"}}
    assert (messages[1]["content"], messages[2], tools) == ("", RESULT, (LIGHT,))
    messages, tools = prompt_of(row, "{{ message['tools'] }}<|tool|>")  # Phi-4-mini
    assert (messages[0], tools) == ({"role": "system", "content": "", "tools": json.dumps([LIGHT])}, ())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tools": [BAD_SCHEMA]}, "`tools.0.function.parameters`: at #/type: 'thing' is not valid"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "`tools.0.function.name`"),
        ({"tools": [LIGHT, LIGHT]}, "two tools have the name 'set_light'"),
        ({"tools": []}, "`expected_tool_calls` needs `tools`"),
        (
            {"expected_tool_calls": [{"name": "f", "arguments": {}}]},
            "the tool 'f' is called, and `tools` offers set_li",
        ),
        (
            {"expected_tool_calls": [{"name": "set_light", "arguments": {"level": "x"}}]},
            "does not fit the tool's schema",
        ),
        ({"expected": "x"}, "exclude each other"),
        ({"scorer": "numeric"}, "needs the scorer tool_calls, found numeric"),
        ({"expected_tool_calls": None, "expected": "x", "scorer": "tool_calls"}, "in place of `expected`"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [OTHER]}, RESULT]}, "the tool 'open_door' is called"),
        ({"messages": [USER, RESULT]}, "the role tool has no call before it"),
        ({"messages": [USER, ASSISTANT, {**RESULT, "tool_call_id": "c2"}]}, "answers the call 'c2', which is none"),
        ({"messages": [USER, ASSISTANT, USER]}, "has no result: a message of the role tool must follow"),
        ({"messages": [USER, ASSISTANT]}, "the last call has no result"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "only an assistant's message has `tool_calls`"),
    ],
)
def test_a_row_is_refused_with_its_fault(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadInput, check=coded("evaluation-row-not-valid", "Line 1", fault)):
        read(tmp_path / "eval.jsonl", {**ROW, **change})


def test_the_tools_of_a_file_are_checked(tmp_path: Path) -> None:
    for tools, fault in (([LIGHT, LIGHT], "two tools"), ("f", "Input should be"), ([BAD_SCHEMA], "#/type")):
        with pytest.raises(BadInput, check=coded("evaluation-row-not-valid", "Line 1", fault)):
            read(tmp_path / "eval.jsonl", {"tools": tools}, ROW)


def test_a_template_that_reads_no_tools_or_writes_no_known_call_is_refused() -> None:
    rows = [EvaluationRow.model_validate(ROW)]
    plain = (TEMPLATES / "chatml.jinja").read_text("utf-8")
    with pytest.raises(BadInput, check=coded("template-without-tools", "Row 1")):
        form_for(plain, rows)
    with pytest.raises(BadInput, check=coded("tool-calls-of-unknown-form", "hermes")):
        form_for("{{ tools | tojson }}", rows)
    assert form_for(plain, ()) is None


def made(*calls: tuple[str, dict[str, Any]], malformed: int = 0) -> AnsweredCalls:
    return AnsweredCalls(calls=tuple(ToolCall(name=n, arguments=a) for n, a in calls), malformed=malformed)


@pytest.mark.parametrize(
    ("found", "figures"),  # right, changed, lost, invented
    [
        (made(("g", {}), ("f", {"b": [True], "a": 1.0})), (2, 0, 0, 0)),
        (made(("f", {"a": 1, "b": [1]}), ("g", {})), (1, 1, 0, 0)),
        (made(("g", {}), ("g", {})), (1, 0, 1, 1)),
        (made(("h", {}), malformed=1), (0, 0, 2, 2)),
    ],
)
def test_calls_are_compared_as_a_multiset(found: AnsweredCalls, figures: tuple[int, ...]) -> None:
    scorer: Any = parse_scorer("tool_calls")
    compared = compare_calls(scorer, found, made(("f", {"a": 1, "b": [True]}), ("g", {})).calls)
    assert (compared.right, compared.changed, compared.lost, compared.invented) == figures
    assert compared.score == (figures == (2, 0, 0, 0))


def test_free_text_is_compared_leniently_and_no_call_can_be_right() -> None:
    scorer: Any = parse_scorer({"name": "tool_calls", "free_text": ["text"]})
    due = made(("note", {"text": "Buy milk."})).calls
    assert compare_calls(scorer, made(("note", {"text": "buy milk"})), due).score == 1
    assert compare_calls(scorer, made(), ()).score == 1
    assert compare_calls(scorer, made(malformed=1), ()).score == 0


def test_categories_are_those_of_the_leaderboard() -> None:
    two = [{"name": "set_light", "arguments": {"room": room}} for room in ("hall", "bath")]
    changes = (
        {}, {"expected_tool_calls": two[:1]}, {"expected_tool_calls": two}, {"category": "own"},
        {"tools": [LIGHT, CLOCK], "expected_tool_calls": two[:1]}, {"messages": [USER, ASSISTANT, RESULT]},
    )  # fmt: skip
    found = [category_of(EvaluationRow.model_validate(ROW | change)) for change in changes]
    assert found == ["irrelevance", "simple", "parallel", "own", "multiple", "multi_turn"]
    assert len(tool_chats()) == 5
