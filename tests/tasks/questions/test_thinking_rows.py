"""Evaluation rows that turn a model's thoughts on or off."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.errors import BadInput
from slmops.tasks.questions.evaluation_set import EvaluationRow, EvaluationSet, plain_rows, read_evaluation_file
from slmops.tasks.questions.tool_prompts import template_prefix_of
from tests.support.errors import coded
from tests.tasks.chat_templates import TEMPLATES

ROW: dict[str, Any] = {"id": 1, "messages": [{"role": "user", "content": "Light!"}], "expected": "on"}
QWEN3 = (TEMPLATES / "qwen3.jinja").read_text("utf-8")


def read(path: Path, *lines: dict[str, Any]) -> list[EvaluationRow]:
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return read_evaluation_file(path)


def test_a_line_switches_the_rows_behind_it_that_do_not_switch_themselves(tmp_path: Path) -> None:
    rows = read(
        tmp_path / "eval.jsonl",
        ROW,
        {"enable_thinking": False},
        {**ROW, "id": 2},
        {**ROW, "id": 3, "enable_thinking": True},
    )
    assert [row.enable_thinking for row in rows] == [None, False, True]
    assert [template_prefix_of(row, QWEN3) for row in rows] == [
        "",
        "{%- set enable_thinking = false -%}",
        "{%- set enable_thinking = true -%}",
    ]
    assert plain_rows(rows) == rows[:1]
    assert plain_rows(rows[1:])[0].model_dump(exclude_defaults=True) == {"id": 2, "messages": tuple(ROW["messages"])}
    assert "enable_thinking" not in rows[0].model_dump(mode="json")  # the digests of other rows stay


@pytest.mark.parametrize("line", [{"enable_thinking": "no"}, {**ROW, "enable_thinking": 0}])
def test_a_switch_that_is_neither_true_nor_false_is_refused(tmp_path: Path, line: dict[str, Any]) -> None:
    with pytest.raises(BadInput, check=coded("evaluation-row-not-valid", "`enable_thinking`")):
        read(tmp_path / "eval.jsonl", line, ROW)


def test_rows_are_asked_in_both_modes_or_in_one(tmp_path: Path) -> None:
    rows = tuple(read(tmp_path / "eval.jsonl", ROW, {**ROW, "id": "own", "enable_thinking": False}))
    asked = EvaluationSet(rows=rows, origin="x")
    assert asked.in_modes("default", 1) is asked

    def modes(thinking: Any, most: int = 9) -> list[tuple[object, object]]:
        return [(row.id, row.enable_thinking) for row in asked.in_modes(thinking, most).rows]

    assert modes("both") == [(1, True), ("1 (at once)", False), ("own", False)]
    assert modes("both", 2) == [(1, True), ("1 (at once)", False)]
    assert modes("on") == [(1, True), ("own", False)]
    assert modes("off") == [(1, False), ("own", False)]
    assert [row.id for row in plain_rows(asked.in_modes("both", 9).rows)] == [1]  # one question


def test_another_limit_of_thoughts_needs_a_model_that_thinks() -> None:
    rows = EvaluationSet(rows=(EvaluationRow.model_validate(ROW),), origin="x")
    assert rows.with_thoughts(9) == rows
    marks = {"start": "<think>", "end": "</think>"}
    thinking = EvaluationSet.model_validate(
        {**rows.model_dump(mode="json"), "decoding": {"thinking": {"marks": marks, "max_tokens": 64}}}
    )
    assert thinking.with_thoughts(None) == thinking
    changed = thinking.with_thoughts(9).decoding
    assert changed
    assert changed.thinking
    assert changed.thinking.max_tokens == 9
