"""Evaluation files: every good row is read, every bad one is named, whatever the bytes."""

import json
import re
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.errors import BadInput
from slmops.infra.settings import EvaluationSettings, Settings
from slmops.tasks.questions.evaluation_set import (
    EvaluationRow,
    EvaluationSet,
    chat_prompts,
    digest_of,
    read_evaluation,
    read_evaluation_file,
    read_evaluation_set,
    read_rows,
)
from slmops.tasks.questions.output_format import read_output_schema
from slmops.tasks.questions.scoring import SCORERS, ToolCalls, parse_scorer
from tests.support.errors import coded

DOCUMENT = Path(__file__).parents[3] / "docs" / "evaluation.md"

TEXT = st.text(max_size=40)
WRITTEN_SCORERS = st.sampled_from(
    [
        "exact_match",
        "normalized_match",
        "contains",
        "regex",
        "json_equality",
        "rouge_l",
        {"name": "numeric", "absolute_tolerance": 0.5},
    ]
)
USER = {"role": "user", "content": "Turn on the lights in the kitchen, please."}
ROW = {"id": "a", "messages": [USER], "expected": "{}"}


@st.composite
def evaluation_rows(draw):
    turns = draw(st.integers(0, 2))
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(turns):
        messages += [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(TEXT)}]
    row = {"messages": [*messages, {"role": "user", "content": draw(TEXT)}], "expected": draw(TEXT)}
    row |= draw(st.fixed_dictionaries({}, optional={"category": TEXT, "scorer": WRITTEN_SCORERS}))
    if row.get("scorer") == "normalized_match":
        row["expected"] += "x"
    elif row.get("scorer") not in (None, "exact_match"):
        row["expected"] = str(draw(st.integers()))
    return row


@given(
    st.dictionaries(st.integers() | st.text(min_size=1), evaluation_rows(), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.booleans(),
)
def test_every_good_file_is_read_as_written(tmp_path_factory, rows, ascii_only, line_end, byte_order_mark):
    rows = {key: row for key, row in rows.items() if isinstance(key, int) or not key.lstrip("-").isdecimal()}
    if not rows:
        return
    written = [{"id": key, **row} for key, row in rows.items()]
    path = tmp_path_factory.getbasetemp() / "good.jsonl"
    text = line_end.join(json.dumps(row, ensure_ascii=ascii_only) for row in written)
    path.write_bytes(text.encode("utf-8-sig" if byte_order_mark else "utf-8"))
    read = read_evaluation_file(path)
    assert [row.model_dump(mode="json", exclude_unset=True) for row in read] == written
    assert digest_of(read) == digest_of([EvaluationRow.model_validate_json(row.model_dump_json()) for row in read])


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_in_words(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    try:
        assert read_evaluation_file(path)
    except BadInput as error:
        assert error.what_to_do
        assert "any.jsonl" in error.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["id", "messages", "expected", "scorer", "category", "more"]), JSON)
def test_any_value_of_a_key_is_read_or_refused_with_its_line(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "value.jsonl"
    path.write_text(json.dumps({**ROW, "id": 1}) + "\n" + json.dumps({**ROW, "id": 2, key: value}) + "\n")
    try:
        assert len(read_evaluation_file(path)) == 2
    except BadInput as error:
        assert error.message.startswith("Line 2 of")


def chat(*roles):
    return {**ROW, "messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"id": 1,', "it is not JSON: Expecting property name"),
        (b"[]", "it must be an object, found list"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"id": ' + b"1" * 5000 + b"}", "it cannot be read"),
        (b"\xff\xfe", "it is UTF-16 and not UTF-8; save it as UTF-8"),
        (json.dumps({"id": 1, "messages": [USER]}).encode(), "`expected` is missing"),
        (json.dumps({**ROW, "expected": None}).encode(), "`expected` is missing"),
        (json.dumps({"id": 1, "expected": ""}).encode(), "`messages` is missing"),
        (json.dumps({"messages": [USER], "expected": ""}).encode(), "`id` is missing"),
        (json.dumps({**ROW, "id": ""}).encode(), "`id`"),
        (json.dumps({**ROW, "id": True}).encode(), "`id`"),
        (json.dumps({**ROW, "expected": 5}).encode(), "`expected`: Input should be a valid string, found 5"),
        (json.dumps({**ROW, "scorer": "bleu"}).encode(), "the scorer 'bleu' is unknown; there are exact_match, norm"),
        (json.dumps({**ROW, "scorer": {"name": "numeric", "x": 1}}).encode(), "the scorer numeric has no option `x`"),
        (json.dumps({**ROW, "scorer": None}).encode(), "`scorer` must be a name or an object"),
        (json.dumps({**ROW, "scorer": "numeric"}).encode(), "`expected` is for the scorer numeric and not a number"),
        (
            json.dumps({**ROW, "scorer": "json_equality", "expected": "{"}).encode(),
            "scorer json_equality, and it is not",
        ),
        (json.dumps({**ROW, "scorer": "regex", "expected": "("}).encode(), "the pattern '(' is not valid: missing )"),
        (json.dumps({**ROW, "scorer": "regex", "expected": "(a|a)*$"}).encode(), "backtracks without end"),
        (json.dumps(ROW).encode()[:-1] + b', "expected": "y"}', "the key 'expected' occurs twice"),
        (json.dumps({**ROW, "answer": "x"}).encode(), "unknown key `answer`"),
        (json.dumps({**ROW, "id": "first"}).encode(), "the id 'first' was already used in line 1"),
        (json.dumps({**ROW, "messages": []}).encode(), "`messages`"),
        (json.dumps({**ROW, "messages": "hi"}).encode(), "`messages`"),
        (json.dumps({**ROW, "messages": [{"role": "user"}]}).encode(), "`messages.0.content` is missing"),
        (json.dumps(chat("critic")).encode(), "`messages.0.role`"),
        (json.dumps(chat("tool")).encode(), "the role tool has no call before it"),
        (json.dumps(chat("system")).encode(), "end with a user's turn, found system"),
        (json.dumps(chat("user", "assistant")).encode(), "found user, assistant"),
        (json.dumps(chat("user", "user")).encode(), "must alternate"),
        (json.dumps(chat("assistant", "user")).encode(), "must alternate"),
        (json.dumps(chat("user", "system", "user")).encode(), "must alternate"),
        (json.dumps({**ROW, "expected": "\ud800"}).encode(), "unpaired surrogate"),
        (json.dumps({**ROW, "expected": "x" * 1_000_000}).encode(), "longer than 1,000,000 bytes"),
    ],
)
def test_a_bad_line_is_named_with_its_fault(tmp_path, line, fault):
    path = tmp_path / "eval.jsonl"
    path.write_bytes(json.dumps({**ROW, "id": "first"}).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(BadInput) as caught:
        read_evaluation_file(path)
    assert caught.value.message.startswith(f"Line 3 of the evaluation file {path} cannot be used: ")
    assert fault in caught.value.message
    assert len(caught.value.message) < 500 + len(str(path))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "eval.jsonl").write_bytes(content)
    with pytest.raises(BadInput, check=coded("evaluation-file-empty")):
        read_evaluation_file(tmp_path / "eval.jsonl")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(BadInput, check=coded("evaluation-file-unreadable")):
            read_evaluation_file(path)


def test_the_built_in_chats_fit_every_template():
    rows = chat_prompts()
    assert 20 <= len(rows) <= 30
    assert len({row.category for row in rows}) >= 8
    assert all(row.expected is None for row in rows)
    assert not any(message.role == "system" for row in rows for message in row.messages)


def test_the_digest_depends_on_rows_and_their_order():
    one, two = EvaluationRow(**ROW), EvaluationRow(**{**ROW, "id": 2})
    digests = [digest_of(rows) for rows in ([one], [two], [one, two], [two, one])]
    assert len(set(digests)) == 4


def test_a_line_of_50_mb_is_refused_quickly_and_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    with path.open("wb") as file:
        file.write(b'{"id": 1, "expected": "')
        for _ in range(50):
            file.write(b"x" * 1_000_000)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(BadInput, check=coded("evaluation-row-not-valid", "Line 1", "1,000,000")):
        read_evaluation_file(path)
    assert time.process_time() - started < 10  # a hang, not a slow machine, fails here
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps({**ROW, "id": number, **row}) + "\n" for number, row in enumerate(rows)))
    return str(path)


def test_a_row_without_a_scorer_has_that_of_the_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "e.jsonl", {"expected": "5"}, {"expected": "5 apples", "scorer": "rouge_l"})
    assert [row.scorer.name for row in read_rows(path, None)] == ["exact_match", "rouge_l"]
    assert [row.scorer.name for row in read_rows(path, None, scorer="numeric")] == ["numeric", "rouge_l"]
    option = '{"name": "numeric", "absolute_tolerance": 0.5}'
    first = read_rows(path, None, scorer=option)[0]
    assert first.scorer == parse_scorer({"name": "numeric", "absolute_tolerance": 0.5})
    digests = {digest_of(read_rows(path, None, scorer=name)) for name in (None, "exact_match", "numeric", option)}
    assert len(digests) == 3
    with pytest.raises(BadInput, check=coded("scorer-not-valid", "'bleu'")):
        read_rows(path, None, scorer="bleu")
    write_rows(tmp_path / "e.jsonl", {"expected": "5"}, {"expected": "five"})
    with pytest.raises(BadInput, check=coded("evaluation-row-not-valid", "Line 2", "'five'")):
        read_rows(path, None, scorer="numeric")


def test_the_output_format_is_the_named_one_or_that_of_the_checkpoints_folder(tmp_path: Path) -> None:
    named = tmp_path / "named.json"
    named.write_text('{"type": "array"}')
    other = write_rows(tmp_path / "other.jsonl", {})
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "output_schema.json").write_text('{"type": "object"}')
    built_in = read_evaluation_set(None, folder)
    assert (built_in.origin, built_in.output_format) == ("slmops' own chats", None)
    write_rows(folder / "eval.jsonl", {})

    def schema_of(found: EvaluationSet) -> object:
        return found.output_format and found.output_format.json_schema

    assert schema_of(read_evaluation_set(None, folder)) == {"type": "object"}
    assert schema_of(read_evaluation_set(other, folder)) is None
    assert schema_of(read_evaluation_set(None, folder, output_schema_file=str(named))) == {"type": "array"}
    by_regex = read_evaluation_set(other, folder, output_regex="a+")
    assert by_regex.output_format
    assert by_regex.output_format.regex == "a+"
    assert EvaluationSet.model_validate_json(by_regex.model_dump_json()) == by_regex

    with pytest.raises(BadInput, check=coded("output-format-twice")):
        read_evaluation_set(None, folder, output_schema_file=str(named), output_regex="a")
    with pytest.raises(BadInput, check=coded("output-regex-not-valid")):
        read_rows(None, folder, output_regex="(a|a)*$")
    (folder / "output_schema.json").write_text("{")
    with pytest.raises(BadInput, check=coded("output-schema-not-valid", "output_schema.json")):
        read_rows(None, folder)


def test_only_as_many_rows_are_used_as_the_settings_say(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "e.jsonl", {}, {}, {})
    settings = Settings(home=tmp_path, evaluation=EvaluationSettings(max_rows=2))
    found = read_evaluation.fn(path, None, settings, output_regex="x")
    assert [row.id for row in found.rows] == [0, 1]
    assert found.output_format
    assert found.summary == f"2 rows of {path}"
    write_rows(tmp_path / "e.jsonl", {}, {}, {"scorer": "bleu"})
    with pytest.raises(BadInput, check=coded("evaluation-row-not-valid", "Line 3")):
        read_evaluation.fn(path, None, settings)


def test_the_examples_of_the_documentation_are_read_and_score_1(tmp_path: Path) -> None:
    blocks = re.findall(r"^```(jsonl?)\n(.*?)^```", DOCUMENT.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    rows = []
    for number, (kind, block) in enumerate(blocks):
        path = tmp_path / f"{number}.{kind}"
        path.write_text(block, "utf-8")
        if kind == "json":
            assert read_output_schema(path)
        else:
            rows += read_evaluation_file(path)
    answered = [row for row in rows if ": " in str(row.id)]
    assert {row.scorer.name for row in answered} == set(SCORERS) - {"exact_match", "tool_calls"}
    for row in answered:
        assert not isinstance(row.scorer, ToolCalls)
        assert row.scorer.score(str(row.id).partition(": ")[2], row.expected or "") == 1
