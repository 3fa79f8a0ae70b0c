"""Chats with their answers, for fine-tuning and for the calibration of a quantization."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import open_regular
from slmops.infra.records import Record
from slmops.tasks.questions.evaluation_set import numbered_lines
from slmops.tasks.questions.messages import Message, check_turns
from slmops.tasks.questions.strict_json import parse_json

MAX_NAMED_FAULTS = 3


class Turn(Message, extra="ignore"):
    """One turn of a training chat."""

    role: Literal["system", "user", "assistant"]


class TrainingRow(Record, extra="ignore"):
    """A chat that ends with the answer to be learned.

    A system message may come first; then user and assistant alternate. A row in the form of an evaluation file, with
    the user's turn last and the answer in `expected`, is accepted too; other keys of a row are ignored.
    """

    messages: tuple[Turn, ...] = Field(min_length=2)

    @model_validator(mode="before")
    @classmethod
    def _expected_is_the_answer(cls, row: object) -> object:
        if isinstance(row, dict) and "expected" in row and isinstance(row.get("messages"), list):
            return {"messages": [*row["messages"], {"role": "assistant", "content": row["expected"]}]}
        return row

    @model_validator(mode="after")
    def _turns_alternate(self) -> "TrainingRow":
        check_turns(self.messages, last="assistant")
        return self


def read_rows_file(path: Path, text: str) -> list[TrainingRow]:
    """Read a JSON Lines file, which messages call `text`; raises `BadInput` as `parse_rows` does."""
    try:
        with open_regular(path) as file:
            return parse_rows(text, "line", list(numbered_lines(path, file)))
    except OSError as error:
        raise BadInput(
            f"The dataset {text} cannot be read: {error.strerror or error}.", "Name a readable file."
        ) from error


def parse_rows(text: str, unit: str, found: Iterable[tuple[int, object]]) -> list[TrainingRow]:
    """Return the rows of a dataset; `found` are numbers and lines of JSON, or numbers and objects.

    Raises `BadInput` for a dataset without rows, or with rows that cannot be used; the message names the first few.
    """
    rows: list[TrainingRow] = []
    faults: list[str] = []
    for number, value in found:
        try:
            rows.append(TrainingRow.model_validate(parse_json(value) if isinstance(value, str) else value))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            faults.append(
                f"{unit} {number}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
            )
        except ValueError as error:
            faults.append(f"{unit} {number}: {error}")
    if faults:
        more = f"; and {len(faults) - MAX_NAMED_FAULTS} more" if len(faults) > MAX_NAMED_FAULTS else ""
        raise BadInput(
            f"The dataset {text} cannot be used: {'; '.join(faults[:MAX_NAMED_FAULTS])}{more}.",
            'Write one chat per row: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}.',
            code="dataset-row-not-valid",
        )
    if not rows:
        raise BadInput(
            f"The dataset {text} has no rows.",
            "Write at least two chats, one JSON object on a line.",
            code="dataset-empty",
        )
    return rows
