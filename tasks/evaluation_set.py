"""The evaluation set: the chats that a checkpoint and its variants answer, read from JSON Lines and checked."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from prefect import task
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator

from infra.errors import BadInput
from infra.settings import Settings
from infra.storage.registry import digest_of as digest_of_json
from tasks.checkpoint import EVALUATION_FILE

CHAT_PROMPTS_FILE = Path(__file__).parent / "evaluation" / "chat_prompts.jsonl"
MAX_LINE_BYTES = 1_000_000


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


RowId = StrictInt | Annotated[StrictStr, Field(min_length=1)]


class Message(_Record):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: StrictStr


class EvaluationRow(_Record):
    """A chat to answer and, where there is one, the answer that is expected.

    A system message may come first; then user and assistant alternate, and the user has the last word.
    """

    id: RowId
    messages: tuple[Message, ...] = Field(min_length=1)
    expected: StrictStr | None = None
    scorer: Literal["exact_match"] = "exact_match"
    category: StrictStr | None = None

    @model_validator(mode="after")
    def _turns_alternate(self) -> "EvaluationRow":
        roles = [message.role for message in self.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        usual = ["user" if index % 2 == 0 else "assistant" for index in range(len(turns))]
        if turns != usual or not turns or turns[-1] != "user":
            raise ValueError(
                "messages must alternate between user and assistant (after an optional system message) "
                f"and end with a user's turn, found {', '.join(roles)}"
            )
        return self


def read_evaluation_file(path: Path) -> list[EvaluationRow]:
    """Read an evaluation file: JSON Lines in UTF-8, one row `{id, messages, expected, scorer?, category?}` a line.

    Blank lines are skipped. Raises `BadInput` naming the first line that cannot be used and why.
    """
    rows = _read_rows(path)
    for number, row in rows:
        if row.expected is None:
            raise _bad_line(path, number, "`expected` is missing")
    return [row for _, row in rows]


def chat_prompts() -> list[EvaluationRow]:
    """The built-in chats for a model that comes without an evaluation file; they have no expected answers."""
    return [row for _, row in _read_rows(CHAT_PROMPTS_FILE)]


def read_rows(evaluation_file: str | None, folder: Path | None) -> list[EvaluationRow]:
    """Return the named file's rows, else those of the checkpoint folder's `eval.jsonl`, else the built-in chats."""
    if evaluation_file:
        return read_evaluation_file(Path(evaluation_file).expanduser())
    if folder is not None and (folder / EVALUATION_FILE).is_file():
        return read_evaluation_file(folder / EVALUATION_FILE)
    return chat_prompts()


def digest_of(rows: Sequence[EvaluationRow]) -> str:
    """SHA-256 of the rows' canonical JSON, in hexadecimal: same rows in the same order, same digest."""
    return digest_of_json([row.model_dump(mode="json") for row in rows])


def _read_rows(path: Path) -> list[tuple[int, EvaluationRow]]:
    rows: list[tuple[int, EvaluationRow]] = []
    first_line_of: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for number, line in _lines(path, file):
                row = _parse_row(path, number, line)
                first = first_line_of.setdefault(str(row.id), number)
                if first != number:
                    raise _bad_line(path, number, f"the id {row.id!r} was already used in line {first}")
                rows.append((number, row))
    except OSError as error:
        raise BadInput(
            f"The evaluation file {path} cannot be read: {error.strerror or error}.", "Name a readable file."
        ) from error
    if not rows:
        raise BadInput(f"The evaluation file {path} has no rows.", "Write at least one JSON object on a line.")
    return rows


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise _bad_line(path, number, f"it is longer than {MAX_LINE_BYTES:,} bytes")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise _bad_line(path, number, f"it is not UTF-8 at byte {error.start + 1}") from None
        if text:
            yield number, text


def _parse_row(path: Path, number: int, line: str) -> EvaluationRow:
    try:
        content = json.loads(line)
    except RecursionError:
        raise _bad_line(path, number, "its JSON is nested too deep") from None
    except json.JSONDecodeError as error:
        raise _bad_line(path, number, f"it is not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise _bad_line(path, number, f"it cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise _bad_line(path, number, f"it must be an object, found {type(content).__name__}")
    try:
        row = EvaluationRow.model_validate(content)
        row.model_dump_json().encode()
    except ValidationError as error:
        raise _bad_line(path, number, "; ".join(_fault(fault) for fault in error.errors()[:3])) from None
    except (UnicodeError, ValueError):  # JSON can spell half a surrogate pair, which is no text
        raise _bad_line(path, number, "it holds an unpaired surrogate, which is not text") from None
    return row


def _fault(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"] if part not in {"int", "str", "constrained-str"})
    if fault["type"] == "missing":
        return f"`{where}` is missing"
    if fault["type"] == "extra_forbidden":
        return f"unknown key `{where}`"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    found = repr(fault["input"])
    return f"`{where}`: {fault['msg']}, found {found if len(found) <= 60 else found[:57] + '...'}"


def _bad_line(path: Path, number: int, fault: str) -> BadInput:
    return BadInput(f"Line {number} of the evaluation file {path} cannot be used: {fault}.", "Correct that line.")


class EvaluationSet(_Record):
    """The rows of one deploy and where they are from."""

    rows: tuple[EvaluationRow, ...]
    origin: str

    @property
    def summary(self) -> str:
        """What the report says the variants were judged on."""
        return f"{len(self.rows)} rows of {self.origin}"


@task(name="read evaluation", task_run_name="read-evaluation", tags=["slmops"])
def read_evaluation(evaluation_file: str | None, folder: Path | None, settings: Settings) -> EvaluationSet:
    """Read the rows that the variants are judged on, the first `evaluation.max_rows` of them."""
    rows = read_rows(evaluation_file, folder)[: settings.evaluation.max_rows]
    built_in = rows[0].expected is None
    return EvaluationSet(
        rows=tuple(rows), origin="slmops' own chats" if built_in else evaluation_file or EVALUATION_FILE
    )
