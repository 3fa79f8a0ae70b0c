"""The dataset of a fine-tuning: chats with answers, read from JSON Lines and checked, and its fingerprint."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from slmops.infra.checkpoints.s3 import fetch_file_from_s3
from slmops.infra.errors import BadInput
from slmops.infra.hf_datasets.dataset import read_hf_dataset
from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import digest_of
from slmops.tasks.questions.evaluation_set import numbered_lines
from slmops.tasks.questions.strict_json import parse_json
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage

S3 = "s3://"
MAX_NAMED_FAULTS = 3


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Turn(_Record):
    """One turn of a training chat."""

    role: Literal["system", "user", "assistant"]
    content: StrictStr


class TrainingRow(_Record):
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
        roles = [turn.role for turn in self.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
            raise ValueError(
                "messages must alternate between user and assistant (after an optional system message) "
                f"and end with an assistant's turn, found {', '.join(roles)}"
            )
        return self


class Dataset(BaseModel):
    """The data of a fine-tuning; equal rows in the same order have the same fingerprint."""

    model_config = ConfigDict(frozen=True)

    origin: str
    rows: tuple[TrainingRow, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the rows' canonical JSON, in hexadecimal."""
        return digest_of([row.model_dump(mode="json") for row in self.rows])


@stage("read dataset", run_name="read-dataset")
def read_dataset_once(text: str, settings: Settings) -> Dataset:
    """See `read_dataset`."""
    with stage_progress("read dataset") as on_progress:
        on_progress(0, 1, f"reading {text}")
        return read_dataset(text, settings)


def read_dataset(text: str, settings: Settings) -> Dataset:
    """Read a local JSON Lines file, an `s3://` object, or a dataset of the `datasets` library (Hub id or folder).

    Raises `BadInput` for a dataset that is missing, has no rows or only one distinct row, or has lines that cannot be
    used; the message names the first few.
    """
    if text.startswith(S3):
        rows = _read_file(fetch_file_from_s3(text, settings, settings.cache_dir / "s3"), text)
    elif Path(text).expanduser().is_file():
        rows = _read_file(Path(text).expanduser(), text)
    else:
        rows = _parsed(text, "row", enumerate(read_hf_dataset(text, settings), 1))
    if len({row.model_dump_json() for row in rows}) < 2:
        raise BadInput(
            f"The dataset {text} has {len(rows)} rows and only one distinct example.",
            "A model would learn only that answer: give different examples.",
            code="dataset-one-example",
        )
    return Dataset(origin=text, rows=tuple(rows))


def _read_file(path: Path, text: str) -> list[TrainingRow]:
    try:
        with path.open("rb") as file:
            return _parsed(text, "line", list(numbered_lines(path, file)))
    except OSError as error:
        raise BadInput(
            f"The dataset {text} cannot be read: {error.strerror or error}.", "Name a readable file."
        ) from error


def _parsed(text: str, unit: str, found: Iterable[tuple[int, object]]) -> list[TrainingRow]:
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
        raise BadInput(f"The dataset {text} has no rows.", "Write at least two chats, one JSON object on a line.")
    return rows


NumberedRow = tuple[int, TrainingRow]


def split(rows: Sequence[TrainingRow], held_out_share: float) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """Return the rows to train on, and the held-out rows, whose loss decides when training stops.

    Rows are held out at equal distances; of a few rows, the last one. Each row comes with its number in the dataset,
    starting with 1. A row that also occurs in the training rows is not held out, because its loss would mean nothing.
    """
    every = min(len(rows), round(1 / held_out_share))
    train = [(number, row) for number, row in enumerate(rows, 1) if number % every]
    held_out = [(number, row) for number, row in enumerate(rows, 1) if not number % every]
    known = {row.model_dump_json() for _, row in train}
    return train, [(number, row) for number, row in held_out if row.model_dump_json() not in known]
