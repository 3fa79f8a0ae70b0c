"""The smart-home data and the demo checkpoint."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.tasks.training import demo as train
from slmops.tasks.training.demo import (
    HELD_OUT_ROWS,
    TRAIN_ROWS,
    make_demo_checkpoint,
    output_schema,
    smart_home_dataset,
)
from tests.support.errors import coded


def _command(row: train.Row) -> str:
    """What is asked, without the way of speaking."""
    text = row["messages"][0]["content"].lower()
    text = re.sub(r"^(please|hey,|ok,) ", "", text)
    return re.sub(r"( please| now|, thanks)?\.?$", "", text)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32))
def test_no_command_is_in_both_parts_and_the_seed_decides(seed: int) -> None:
    rows, held_out = smart_home_dataset(seed)
    assert (rows, held_out) == smart_home_dataset(seed)
    assert (rows, held_out) != smart_home_dataset(seed + 1)
    assert not {_command(row) for row in rows} & {_command(row) for row in held_out}
    assert len(rows) == TRAIN_ROWS
    assert len({_command(row) for row in held_out}) == len(held_out) == HELD_OUT_ROWS
    assert len({row["id"] for row in rows + held_out}) == TRAIN_ROWS + HELD_OUT_ROWS


def test_held_out_rows_request_new_actions_too_and_cover_every_category() -> None:
    rows, held_out = smart_home_dataset(0)
    seen = {row["expected"] for row in rows}
    assert sum(row["expected"] not in seen for row in held_out) > 0.3 * HELD_OUT_ROWS
    assert {row["category"] for row in held_out} == {row["category"] for row in rows}


def test_rows_are_short_commands_with_compact_json_answers() -> None:
    for row in itertools.chain(*smart_home_dataset(0)):
        assert set(row) == {"id", "messages", "expected", "category"}
        (message,) = row["messages"]
        assert message["role"] == "user"
        assert 5 < len(message["content"]) < 80
        assert "{" not in message["content"]
        action = json.loads(row["expected"])
        assert json.dumps(action, separators=(",", ":")) == row["expected"]
        for value in action.values():
            said = re.sub(r"[\s]", "_", message["content"].lower())
            fixed = isinstance(value, str) and "{" not in value and value in _FIXED_VALUES
            assert fixed or str(value) in said, row


def test_every_answer_conforms_to_the_schema() -> None:
    schema = Draft202012Validator(output_schema())
    for row in itertools.chain(*smart_home_dataset(0)):
        schema.validate(json.loads(row["expected"]))
    assert not schema.is_valid({"device": "light", "room": "moon", "action": "on"})
    assert not schema.is_valid({"device": "light", "room": "kitchen", "action": "on", "color": "red"})


_FIXED_VALUES = {value for intent in train.INTENTS for value in intent.action.values()}


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.usefixtures("tiny_training", "torch_stays")
def test_the_second_checkpoint_comes_from_the_cache(tmp_path: Path) -> None:
    place = Settings(home=tmp_path / "home")
    seen: list[Any] = []
    first = make_demo_checkpoint(place, tmp_path / "first", 7, lambda *step: seen.append(step))
    assert first.training_s is not None
    assert seen
    second = make_demo_checkpoint(place, tmp_path / "second", 7)
    assert second.training_s is None
    assert (second.exact_match, second.parameters) == (first.exact_match, first.parameters)
    assert _contents(tmp_path / "first") == _contents(tmp_path / "second")
    assert len(_contents(tmp_path / "first")["eval.jsonl"].splitlines()) == 20
    assert make_demo_checkpoint(Settings(home=tmp_path / "other"), tmp_path / "second", 7) == second
    assert {path.name for path in tmp_path.iterdir()} == {"home", "first", "second"}


@pytest.mark.usefixtures("tiny_training", "torch_stays")
def test_a_damaged_cache_is_made_again_and_a_changed_checkpoint_is_refused(tmp_path: Path) -> None:
    place = Settings(home=tmp_path / "home")
    make_demo_checkpoint(place, tmp_path / "first", 7)
    (weights,) = place.cache_dir.glob("demo/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert make_demo_checkpoint(place, tmp_path / "second", 7).training_s is not None
    assert _contents(tmp_path / "first") == _contents(tmp_path / "second")
    (tmp_path / "first" / "config.json").write_text("{}")
    with pytest.raises(BadInput, check=coded("output-is-other-demo", "seed 7")):
        make_demo_checkpoint(place, tmp_path / "first", 7)


@pytest.mark.usefixtures("tiny_training", "torch_stays")
def test_another_demo_checkpoint_is_replaced_on_request(tmp_path: Path) -> None:
    place = Settings(home=tmp_path / "home")
    make_demo_checkpoint(place, tmp_path / "demo", 7)
    with pytest.raises(BadInput, check=coded("output-is-other-demo", "seed 8")):
        make_demo_checkpoint(place, tmp_path / "demo", 8)
    make_demo_checkpoint(place, tmp_path / "demo", 8, replace=True)
    assert make_demo_checkpoint(place, tmp_path / "demo", 8).seed == 8


def test_a_folder_or_file_of_the_user_s_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for occupied in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(BadInput, check=coded("output-is-other-demo")):
            make_demo_checkpoint(Settings(home=tmp_path / "home"), occupied, 7, replace=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_the_full_recipe_answers_95_percent_of_the_held_out_commands(demo_home: Path, tmp_path: Path) -> None:
    demo = make_demo_checkpoint(Settings(home=demo_home), tmp_path / "demo", 0)
    assert demo.exact_match >= 0.95
    assert demo.eval_rows == 200
    assert 3_000_000 <= demo.parameters <= 5_000_000
