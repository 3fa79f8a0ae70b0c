"""The evaluation set: the chats that a checkpoint and its variants answer, read from JSON Lines and checked."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from pydantic import Field, StrictBool, StrictStr, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import open_regular, text_of
from slmops.infra.records import Record, later_field
from slmops.infra.reference.answers import RowId
from slmops.infra.reference.decoding import PLAIN, Decoding
from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import digest_of as digest_of_json
from slmops.tasks.checkpoint.inspection import EVALUATION_FILE, OUTPUT_SCHEMA_FILE
from slmops.tasks.questions.messages import ToolMessage, check_turns, turns_without_calls
from slmops.tasks.questions.output_format import OutputFormat, parse_output_regex, read_output_schema
from slmops.tasks.questions.scoring import ExactMatch, Scorer, ScorerField, parse_scorer_text
from slmops.tasks.questions.strict_json import parse_json
from slmops.tasks.questions.tools import ExpectedCall, Tool, check_calls, check_expected, check_tools
from slmops.tasks.request.parameters import ThoughtModes
from slmops.tasks.runs.stage import stage

CHAT_PROMPTS_FILE = Path(__file__).parent / "evaluation" / "chat_prompts.jsonl"
BUILT_IN = "slmops' own chats"  # the origin of the built-in prompts
MAX_LINE_BYTES = 1_000_000


class EvaluationRow(Record):
    """A chat to answer, the expected answer if there is one, and its scorer.

    A system message may come first; then user and assistant alternate, and the last message is the user's. `scorer` is
    a name or an object of a name and options (see `slmops.tasks.questions.scoring`); `expected` must fit it.

    With `tools`, assistants' messages may call them, results follow in messages of the role tool, and the last message
    may be a result. `expected_tool_calls` stands in place of `expected`; empty: no tool may be called.

    `enable_thinking` sets the switch of the chat template; None: the template's default.
    """

    id: RowId
    messages: tuple[ToolMessage, ...] = Field(min_length=1)
    expected: StrictStr | None = None
    scorer: ScorerField = ExactMatch()
    category: StrictStr | None = None
    tools: tuple[Tool, ...] = later_field(())
    expected_tool_calls: tuple[ExpectedCall, ...] | None = later_field(None)
    enable_thinking: StrictBool | None = later_field(None)

    @model_validator(mode="before")
    @classmethod
    def _calls_have_their_scorer(cls, row: object) -> object:
        if isinstance(row, dict) and row.get("expected_tool_calls") is not None:
            return {"scorer": "tool_calls", **row}
        return row

    @model_validator(mode="after")
    def _turns_alternate(self) -> "EvaluationRow":
        check_tools(self.tools)
        check_calls(self.messages, self.tools)
        check_turns(turns_without_calls(self.messages), last="user")
        return self

    @model_validator(mode="after")
    def _can_be_scored(self) -> "EvaluationRow":
        if self.expected_tool_calls is not None:
            if self.expected is not None:
                raise ValueError("`expected` and `expected_tool_calls` exclude each other")
            if self.scorer.name != "tool_calls":
                raise ValueError(f"`expected_tool_calls` needs the scorer tool_calls, found {self.scorer.name}")
            check_expected(self.expected_tool_calls, self.tools)
        elif self.expected is not None:
            self.scorer.check(self.expected)
        return self


def plain_rows(rows: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    """Return the rows without tools and without a switched template, to ask runtimes that are given neither.

    If there are none, the first question of each row is returned once, without an expected answer.
    """
    plain = [row for row in rows if not row.tools and row.enable_thinking is None]
    if plain:
        return plain
    beginnings: dict[tuple[ToolMessage, ...], RowId] = {}
    for row in rows:
        has_system = row.messages[0].role == "system"
        beginnings.setdefault(tuple(turns_without_calls(row.messages)[: 1 + has_system]), row.id)
    return [EvaluationRow(id=row_id, messages=messages) for messages, row_id in beginnings.items()]


def read_evaluation_file(path: Path, scorer: Scorer | None = None) -> list[EvaluationRow]:
    """Read an evaluation file: JSON Lines in UTF-8, one row `{id, messages, expected, scorer?, category?}` per line.

    `scorer` applies to rows without one; default: exact_match, and tool_calls for rows with `expected_tool_calls`.
    A line that has only `tools`, `enable_thinking` or both gives those of the rows behind it that have none. Blank
    lines are skipped. Raises `BadInput` naming the first line that cannot be used and why.
    """
    rows = _read_rows(path, scorer)
    for number, row in rows:
        if row.expected is None and row.expected_tool_calls is None:
            raise _bad_line(path, number, "`expected` is missing")
    return [row for _, row in rows]


def chat_prompts() -> list[EvaluationRow]:
    """The built-in chats for a model that comes without an evaluation file; they have no expected answers."""
    return [row for _, row in _read_rows(CHAT_PROMPTS_FILE)]


def read_rows(
    evaluation_file: str | None,
    folder: Path | None,
    *,
    scorer: str | None = None,
    output_schema_file: str | None = None,
    output_regex: str | None = None,
) -> list[EvaluationRow]:
    """Return the rows of `read_evaluation_set`; raises `BadInput` as it does."""
    found = read_evaluation_set(
        evaluation_file, folder, scorer=scorer, output_schema_file=output_schema_file, output_regex=output_regex
    )
    return list(found.rows)


def digest_of(rows: Sequence[EvaluationRow]) -> str:
    """SHA-256 of the rows' canonical JSON, in hexadecimal: equal rows in the same order have the same digest."""
    return digest_of_json([row.model_dump(mode="json") for row in rows])


def _read_rows(path: Path, scorer: Scorer | None = None) -> list[tuple[int, EvaluationRow]]:
    rows: list[tuple[int, EvaluationRow]] = []
    first_line_of: dict[str, int] = {}
    defaults: dict[str, object] = {}
    try:
        with open_regular(path) as file:
            for number, line in numbered_lines(path, file):
                content = _parse_line(path, number, line)
                if content and content.keys() <= {"tools", "enable_thinking"}:
                    defaults |= _parse_defaults(path, number, content)
                    continue
                row = _parse_row(path, number, _with_defaults(content, defaults, scorer))
                first = first_line_of.setdefault(str(row.id), number)
                if first != number:
                    raise _bad_line(path, number, f"the id {row.id!r} was already used in line {first}")
                rows.append((number, row))
    except OSError as error:
        raise BadInput(
            f"The evaluation file {path} cannot be read: {error.strerror or error}.",
            "Name a readable file.",
            code="evaluation-file-unreadable",
        ) from error
    if not rows:
        raise BadInput(
            f"The evaluation file {path} has no rows.",
            "Write at least one JSON object on a line.",
            code="evaluation-file-empty",
        )
    return rows


def numbered_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the lines that are not blank; raises `BadInput` for one that is too long or not UTF-8."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise _bad_line(path, number, f"it is longer than {MAX_LINE_BYTES:,} bytes")
        try:
            text = text_of(line).strip()
        except ValueError as error:
            raise _bad_line(path, number, str(error)) from None
        if text:
            yield number, text


def _parse_line(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        content = parse_json(line)
    except ValueError as error:
        raise _bad_line(path, number, str(error)) from None
    if not isinstance(content, dict):
        raise _bad_line(path, number, f"it must be an object, found {type(content).__name__}")
    return content


def _with_defaults(content: dict[str, object], defaults: dict[str, object], scorer: Scorer | None) -> dict[str, object]:
    if scorer is not None and content.get("expected_tool_calls") is None:
        defaults = {**defaults, "scorer": scorer}
    return {**defaults, **content}


def _parse_defaults(path: Path, number: int, content: dict[str, object]) -> dict[str, object]:
    switched = content.get("enable_thinking")
    if not isinstance(switched, bool | None):
        raise _bad_line(path, number, f"`enable_thinking` must be true or false, found {switched!r}")
    return content | ({"tools": _parse_tools(path, number, content["tools"])} if "tools" in content else {})


def _parse_tools(path: Path, number: int, content: object) -> list[object]:
    try:
        tools = TypeAdapter(tuple[Tool, ...]).validate_python(content)
        check_tools(tools)
    except ValidationError as error:
        raise _bad_line(path, number, "; ".join(_fault(fault) for fault in error.errors()[:3])) from None
    except ValueError as error:
        raise _bad_line(path, number, str(error)) from None
    return [tool.model_dump() for tool in tools]


def _parse_row(path: Path, number: int, content: dict[str, object]) -> EvaluationRow:
    try:
        row = EvaluationRow.model_validate(content)
        row.model_dump_json().encode()
    except ValidationError as error:
        raise _bad_line(path, number, "; ".join(_fault(fault) for fault in error.errors()[:3])) from None
    except (UnicodeError, ValueError):  # JSON can express half a surrogate pair, which is not text
        raise _bad_line(path, number, "it holds an unpaired surrogate, which is not text") from None
    return row


def _fault(fault: ErrorDetails) -> str:
    where = ".".join(str(part) for part in fault["loc"] if part not in {"int", "str", "constrained-str"})
    if fault["type"] == "missing":
        return f"`{where}` is missing"
    if fault["type"] == "extra_forbidden":
        return f"unknown key `{where}`"
    if fault["type"] == "value_error":
        said = str(fault["ctx"]["error"])
        return f"`{where}`: {said}" if "parameters" in fault["loc"] else said
    found = repr(fault["input"])
    return f"`{where}`: {fault['msg']}, found {found if len(found) <= 60 else found[:57] + '...'}"


def _bad_line(path: Path, number: int, fault: str) -> BadInput:
    return BadInput(
        f"Line {number} of the evaluation file {path} cannot be used: {fault}.",
        "Correct that line.",
        code="evaluation-row-not-valid",
    )


class EvaluationSet(Record):
    """The rows of one deploy, their origin, and the required format of every answer, if any.

    `decoding` is that of the answers; None: greedy, with transformers' end tokens.
    """

    rows: tuple[EvaluationRow, ...]
    origin: str
    output_format: OutputFormat | None = None
    decoding: Decoding | None = None

    def with_thoughts(self, max_tokens: int | None) -> "EvaluationSet":
        """Return the same rows with another limit of thoughts, where the model has any."""
        if max_tokens is None or self.decoding is None or self.decoding.thinking is None:
            return self
        thinking = self.decoding.thinking.model_copy(update={"max_tokens": max_tokens})
        return self.decoded_by(self.decoding.model_copy(update={"thinking": thinking}))

    def in_modes(self, thinking: ThoughtModes, most_rows: int) -> "EvaluationSet":
        """Return the rows with their thoughts on, off, or both; a row's own `enable_thinking` has priority.

        A question in both modes is two rows, of which the second has ` (at once)` behind its id. There are at most
        `most_rows`.
        """
        if thinking == "default":
            return self
        rows = tuple(mode for row in self.rows for mode in _modes(row, thinking))
        return self.model_copy(update={"rows": rows[:most_rows]})

    def decoded_by(self, decoding: Decoding | None) -> "EvaluationSet":
        """Return the same rows with another decoding."""
        return self.model_copy(update={"decoding": None if decoding == PLAIN else decoding})

    @property
    def proof_row(self) -> EvaluationRow:
        """The row that proves a registered model (see `plain_rows`)."""
        return plain_rows(self.rows)[0]

    @property
    def summary(self) -> str:
        """The report's description of the evaluated rows."""
        return f"{len(self.rows)} rows of {self.origin}"


def _modes(row: EvaluationRow, thinking: ThoughtModes) -> Iterator[EvaluationRow]:
    if row.enable_thinking is not None:
        yield row
        return
    if thinking != "off":
        yield row.model_copy(update={"enable_thinking": True})
    if thinking != "on":
        yield row.model_copy(
            update={"enable_thinking": False, "id": f"{row.id} (at once)" if thinking == "both" else row.id}
        )


def read_evaluation_set(
    evaluation_file: str | None,
    folder: Path | None,
    *,
    scorer: str | None = None,
    output_schema_file: str | None = None,
    output_regex: str | None = None,
) -> EvaluationSet:
    """Read the named file's rows, else those of the checkpoint folder's `eval.jsonl`, else use the built-in chats.

    `scorer` is a scorer's name or a JSON object of its name and options, for the rows that name none. The output format
    is a JSON Schema file or a pattern. If neither is named and the folder's `eval.jsonl` is used, an
    `output_schema.json` in the folder is used too. Raises `BadInput` for any of these that is not valid.
    """
    default = None if scorer is None else parse_scorer_text(scorer)
    output_format = _named_format(output_schema_file, output_regex)
    if evaluation_file:
        rows, origin = read_evaluation_file(Path(evaluation_file).expanduser(), default), evaluation_file
    elif folder is not None and (folder / EVALUATION_FILE).is_file():
        rows, origin = read_evaluation_file(folder / EVALUATION_FILE, default), EVALUATION_FILE
        if output_format is None and (folder / OUTPUT_SCHEMA_FILE).is_file():
            output_format = read_output_schema(folder / OUTPUT_SCHEMA_FILE)
    else:
        rows, origin = chat_prompts(), BUILT_IN
    return EvaluationSet(rows=tuple(rows), origin=origin, output_format=output_format)


def _named_format(output_schema_file: str | None, output_regex: str | None) -> OutputFormat | None:
    if output_schema_file is not None and output_regex is not None:
        raise BadInput(
            "Both an output schema and an output regex are named.", "Name one of them.", code="output-format-twice"
        )
    if output_schema_file is not None:
        return read_output_schema(Path(output_schema_file).expanduser())
    return None if output_regex is None else parse_output_regex(output_regex)


@stage("read evaluation", run_name="read-evaluation")
def read_evaluation(
    evaluation_file: str | None,
    folder: Path | None,
    settings: Settings,
    *,
    scorer: str | None = None,
    output_schema_file: str | None = None,
    output_regex: str | None = None,
) -> EvaluationSet:
    """Read the evaluation set of the variants, with the first `evaluation.max_rows` rows."""
    found = read_evaluation_set(
        evaluation_file, folder, scorer=scorer, output_schema_file=output_schema_file, output_regex=output_regex
    )
    return found.model_copy(update={"rows": found.rows[: settings.evaluation.max_rows]})
