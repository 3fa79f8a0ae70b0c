"""The tool demo's rows, and a checkpoint that is made of them."""

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from slmops.infra.settings import Settings
from slmops.infra.tool_calls.forms import form_of, takes_tools
from slmops.tasks.questions.evaluation_set import read_evaluation_file
from slmops.tasks.questions.tool_calls import category_of
from slmops.tasks.training import tool_demo
from slmops.tasks.training.demo import make_demo_checkpoint, smart_home_dataset

SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tool_demo.TOOLS}


@pytest.fixture(scope="module")
def rows() -> tuple[list[tool_demo.Row], list[tool_demo.Row]]:
    return tool_demo.tool_rows(*smart_home_dataset(0), random.Random(0))


def test_every_call_follows_its_tools_schema_and_is_the_written_one(rows: Any) -> None:
    form = form_of(tool_demo.CHAT_TEMPLATE)
    assert form
    for row in itertools.chain(*rows):
        expected = row.get("expected_tool_calls", [])
        found = form.parse(row["expected"], row["tools"])
        assert (found.malformed, [call.model_dump() for call in found.calls]) == (0, expected)
        for call in expected:
            Draft202012Validator(SCHEMAS[call["name"]]).validate(call["arguments"])


def test_no_single_command_of_the_held_out_rows_is_in_a_training_row(rows: Any) -> None:
    trained, held_out = ({_command(row) for row in part if row["category"] == "multiple"} for part in rows)
    assert held_out
    assert not trained & held_out


def _command(row: tool_demo.Row) -> str:
    text = re.sub(r"^(please|hey,|ok,) ", "", row["messages"][0]["content"].lower())
    return re.sub(r"( please| now|, thanks)?\.?$", "", text)


def test_the_evaluation_file_has_the_leaderboards_categories(rows: Any, tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text("\n".join(map(json.dumps, tool_demo.evaluation_lines(rows[1]))), "utf-8")
    read = read_evaluation_file(path)
    counts = {name: sum(row.category == name for row in read) for name in tool_demo.HELD_OUT_ROWS}
    assert counts == tool_demo.HELD_OUT_ROWS
    for row in read:
        if row.expected_tool_calls is not None:
            assert category_of(row.model_copy(update={"category": None})) == row.category
    assert not read[0].tools  # Foundry Local is asked without tools


@pytest.mark.usefixtures("tiny_training", "torch_stays")
def test_the_checkpoint_is_trained_from_the_demos_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_demo, "TRAIN_ROWS", 16)
    monkeypatch.setattr(tool_demo, "TRAINING", {**tool_demo.TRAINING, "min_exact_match": 0.0, "max_new_tokens": 2})
    place = Settings(home=tmp_path / "home")
    first = make_demo_checkpoint(place, tmp_path / "tools", 7, tools=True)
    assert first.training_s is not None
    assert first.eval_rows == sum(tool_demo.HELD_OUT_ROWS.values())
    template = (tmp_path / "tools/chat_template.jinja").read_text("utf-8")
    assert takes_tools(template)
    assert len(read_evaluation_file(tmp_path / "tools/eval.jsonl")) == first.eval_rows
    assert make_demo_checkpoint(place, tmp_path / "again", 7, tools=True).training_s is None
    base = make_demo_checkpoint(place, tmp_path / "base", 7)
    assert base.training_s is None  # it was made for the other
    vocabularies = [json.loads((tmp_path / name / "tokenizer.json").read_text("utf-8")) for name in ("base", "tools")]
    added = [{token["content"] for token in vocabulary["added_tokens"]} for vocabulary in vocabularies]
    assert added[1] - added[0] == {"<tool_call>", "</tool_call>"}
