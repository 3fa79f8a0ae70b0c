"""The dataset of a fine-tuning: what is read, what is refused, and what has the same fingerprint."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.tasks.questions.training_rows import TrainingRow
from slmops.tasks.training.dataset import Dataset, read_dataset, split
from tests.support.errors import coded

USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "good morning"}
CHAT = {"messages": [USER, ANSWER]}
OTHER = {"messages": [USER, {"role": "assistant", "content": "good evening"}]}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def written(folder: Path, *rows: Any) -> str:
    path = folder / "chats.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def test_chats_and_evaluation_rows_are_the_same_rows(tmp_path: Path, settings: Settings) -> None:
    chats = read_dataset(written(tmp_path, CHAT, "", OTHER), settings)
    rows = [
        {"id": index, "messages": [USER], "expected": row["messages"][1]["content"]}
        for index, row in enumerate((CHAT, OTHER))
    ]
    assert read_dataset(written(tmp_path, *rows), settings).fingerprint == chats.fingerprint
    assert read_dataset(written(tmp_path, OTHER, CHAT), settings).fingerprint != chats.fingerprint


@pytest.mark.parametrize(
    ("rows", "refused"),
    [
        ([], coded("dataset-empty")),
        ([CHAT, "{", OTHER], coded("dataset-row-not-valid", "line 2: it is not JSON")),
        (
            [CHAT, {"messages": [ANSWER, USER]}],
            coded("dataset-row-not-valid", "line 2: messages must alternate", "found assistant, user"),
        ),
        ([CHAT, {"messages": [USER, USER, ANSWER]}], coded("dataset-row-not-valid", "found user, user, assistant")),
        ([CHAT, {"messages": [USER]}], coded("dataset-row-not-valid", "line 2")),
        ([CHAT, {"chat": []}], coded("dataset-row-not-valid", "line 2: messages: Field required")),
        (
            [CHAT, {"messages": [{"role": "tool", "content": ""}, ANSWER]}],
            coded("dataset-row-not-valid", "line 2: messages.0.role"),
        ),
        ([CHAT, {"messages": [USER], "expected": 7}], coded("dataset-row-not-valid", "line 2: messages.1.content")),
        ([CHAT, CHAT, CHAT], coded("dataset-one-example", "3 rows")),
        ([CHAT, "[1]", "7", "x", "y"], coded("dataset-row-not-valid", "line 4: ", "; and 1 more")),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    rows: list[Any], refused: coded, tmp_path: Path, settings: Settings
) -> None:
    with pytest.raises(BadInput, check=refused) as caught:
        read_dataset(written(tmp_path, *rows), settings)
    assert caught.value.what_to_do
    assert not settings.home_dir.exists()


def test_a_folder_of_the_datasets_library_is_read(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder", CHAT, OTHER)
    found = read_dataset(str(tmp_path / "folder"), settings)
    assert found.fingerprint == read_dataset(written(tmp_path, CHAT, OTHER), settings).fingerprint


def test_a_missing_dataset_is_named(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, check=coded("dataset-missing", "empty")):
        read_dataset(str(tmp_path / "empty"), settings)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=200))
def test_no_row_is_lost_and_none_held_out_is_trained_on(numbers: list[int]) -> None:
    rows = tuple(TrainingRow.model_validate({"messages": [USER], "expected": str(number)}) for number in numbers)
    train, held_out = split(Dataset(origin="", rows=rows).rows, 0.1)
    assert train
    assert {row for _, row in (*train, *held_out)} == {*rows}
    assert not {row for _, row in train} & {row for _, row in held_out}
    assert all(rows[number - 1] == row for number, row in (*train, *held_out))
