"""Output formats: which raw answers follow a schema or a pattern, and which schemas and patterns are refused."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from slmops.infra.errors import BadInput
from slmops.tasks.questions.output_format import OutputFormat, output_faults, parse_output_regex, read_output_schema
from slmops.tasks.questions.patterns import MATCH_TIMEOUT_S
from tests.support.errors import coded

ACTION = {
    "type": "object",
    "properties": {"action": {"enum": ["on", "off"]}, "room": {"type": "string", "pattern": "^[a-z]+$"}},
    "required": ["action"],
    "additionalProperties": False,
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "schema.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ('{"action": "on"}', None),
        (' \n{"room": "kitchen", "action": "off"}\n', None),
        ("", "it is not JSON: Expecting value at column 1"),
        ('```json\n{"action": "on"}\n```', "it is not JSON"),
        ('Sure! {"action": "on"}', "it is not JSON"),
        ('{"action": "on"', "it is not JSON"),
        ('{"action": "on", "action": "off"}', "the key 'action' occurs twice"),
        ('{"action": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "its JSON is nested too deep"),
        ("{}", "$: 'action' is a required property"),
        ('{"action": "dim"}', "$.action: 'dim' is not one of ['on', 'off']"),
        ('{"action": "on", "room": 5}', "$.room: 5 is not of type 'string'"),
        ('{"action": "on", "room": "Küche"}', "$.room: 'Küche' does not match '^[a-z]+$'"),
        ('{"action": "on", "colour": "red"}', "$: the property 'colour' is not allowed"),
    ],
)
def test_an_answer_conforms_to_the_schema_or_its_fault_is_reported(answer: str, fault: str | None) -> None:
    (found,) = output_faults(OutputFormat(json_schema=ACTION), [answer])
    assert found == fault if fault is None else found and found.startswith(fault)


def test_a_fault_is_short_whatever_the_answer() -> None:
    (fault,) = output_faults(OutputFormat(json_schema={"type": "object"}), [json.dumps("x" * 5000)])
    assert fault
    assert len(fault) <= 200


def test_a_pattern_has_to_match_the_whole_answer() -> None:
    answers = ["on", " off\n", "on and off", "On", ""]
    found = output_faults(parse_output_regex("on|off"), answers)
    assert [fault is None for fault in found] == [True, True, False, False, False]
    assert found[2] == "the pattern does not match it as a whole"


def test_patterns_for_property_names_are_searched_for() -> None:
    schema = {"patternProperties": {"^n_": {"type": "number"}}, "additionalProperties": {"type": "string"}}
    answers = ['{"n_a": 1, "b": "x"}', '{"n_a": "x"}', '{"b": 1}']
    assert [fault is None for fault in output_faults(OutputFormat(json_schema=schema), answers)] == [True, False, False]


NAMES = st.sampled_from(["a", "ab", "b", "ba", "", "a\nb", "0"])
INSTANCES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "ab", "b0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
SCHEMAS = st.recursive(
    st.sampled_from([True, False, {"type": "integer"}, {"pattern": "^a"}, {"pattern": ""}, {"minimum": 1}, {}]),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "properties": st.dictionaries(NAMES, inner, max_size=2),
            "patternProperties": st.dictionaries(st.sampled_from(["^a", "b$", "0", ""]), inner, max_size=2),
            "additionalProperties": inner,
            "items": inner,
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "not": inner,
        },
    ),
    max_leaves=6,
)


@given(SCHEMAS, INSTANCES)
def test_schemas_mean_what_they_mean_to_the_library(schema: Any, instance: Any) -> None:
    (fault,) = output_faults(OutputFormat(json_schema=schema), [json.dumps(instance)])
    assert (fault is None) == Draft202012Validator(schema).is_valid(instance)


def test_the_draft_is_the_one_that_the_schema_names() -> None:
    both = {"properties": {"a": {"$ref": "#/definitions/n", "minimum": 5}}, "definitions": {"n": {"type": "number"}}}
    answer = '{"a": 1}'
    assert output_faults(OutputFormat(json_schema=both), [answer]) != [None]
    draft7 = {"$schema": "http://json-schema.org/draft-07/schema#", **both}  # there, $ref stands alone
    assert output_faults(OutputFormat(json_schema=draft7), [answer]) == [None]


@pytest.mark.parametrize(
    "draft", ["https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-04/schema#"]
)
def test_a_recursive_schema_is_followed(draft: str) -> None:
    tree = {"$schema": draft, "type": "object", "properties": {"child": {"$ref": "#"}}, "additionalProperties": False}
    answers = ['{"child": {"child": {}}}', '{"child": {"child": 1}}', '{"child": {"leaf": 1}}']
    assert [fault is None for fault in output_faults(OutputFormat(json_schema=tree), answers)] == [True, False, False]
    (deep,) = output_faults(OutputFormat(json_schema=tree), ['{"child":' * 900 + "{}" + "}" * 900])
    assert deep is None or "too large for a check" in deep


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "it is not JSON: Expecting value at column 1"),
        (b'{\n"type": }', "it is not JSON: Expecting value at line 2 column 9"),
        (b"\xff\xfe{}", "it is UTF-16 and not UTF-8; save it as UTF-8"),
        (b"[" * 100_000, "its JSON is nested too deep"),
        (b'{"type": "object", "type": "array"}', "the key 'type' occurs twice"),
        (b" " * 1_000_001, "it is longer than 1,000,000 bytes"),
        ([], "it must be an object, found list"),
        ("x", "it must be an object, found str"),
        ({"type": "objekt"}, "at #/type: 'objekt' is not valid"),
        ({"properties": {"a": {"minLength": -1}}}, "at #/properties/a/minLength: -1 is less than the minimum of 0"),
        ({"$schema": "http://example.com/mine"}, "the `$schema` 'http://example.com/mine' is not a known draft"),
        ({"$schema": "http://["}, "the `$schema` 'http://[' is not a known draft"),
        ({"$schema": 7}, "the `$schema` 7 is not a known draft"),
        ({"$defs": {"a": {"$schema": "http://json-schema.org/draft-07/schema#"}}}, "at #/$defs/a/$schema: it is only"),
        ({"$ref": "http://127.0.0.1:1/schema.json"}, "at #/$ref: 'http://127.0.0.1:1/schema.json' is not in this file"),
        ({"items": {"$ref": "file:///etc/passwd"}}, "at #/items/$ref: 'file:///etc/passwd' is not in this file"),
        ({"anyOf": [{"$ref": "#/$defs/none"}]}, "at #/anyOf/0/$ref: '#/$defs/none' is not in this file"),
        ({"$dynamicRef": "#nowhere"}, "at #/$dynamicRef: '#nowhere' is not in this file"),
        ({"$ref": "#"}, "it is nested too deep, or refers to itself without end"),
        ({"$id": "http://[", "$defs": {"a": {"$id": "x"}}}, "at #: Invalid IPv6 URL"),
        ({"pattern": "("}, "at #/pattern: the pattern '(' is not valid"),
        (
            {"properties": {"a/b": {"pattern": "(a|a)*$"}}},
            "at #/properties/a~1b/pattern: the pattern '(a|a)*$' backtracks",
        ),
        ({"patternProperties": {"(a|aa)+$": {}}}, "at #/patternProperties: the pattern '(a|aa)+$' backtracks"),
        ({"$ref": "#/mine", "mine": {"pattern": "(a|a)*$"}}, "at #/mine/pattern: the pattern '(a|a)*$' backtracks"),
        (
            {"allOf": [{"patternProperties": {"^a": {}}}], "unevaluatedProperties": False},
            "at #/unevaluatedProperties: it cannot be used together with the patternProperties at #/allOf/0",
        ),
    ],
)
def test_a_schema_that_cannot_be_used_is_named_with_place_and_fault(tmp_path: Path, content: Any, fault: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(BadInput) as caught:
        read_output_schema(path)
    assert caught.value.message.startswith(f"The output schema {path} cannot be used: {fault}")
    assert caught.value.what_to_do
    assert len(caught.value.message) < 500 + len(str(path))


def test_a_missing_schema_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(BadInput, check=coded("output-schema-unreadable")):
            read_output_schema(path)


def test_nothing_is_fetched(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        with pytest.raises(BadInput):
            read_output_schema(written(tmp_path, {"properties": {"a": {"$ref": url}}}))
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("pattern", ["", "(", "(a|a)*$", "(?R)?a"])
def test_a_pattern_that_cannot_be_used_is_refused(pattern: str) -> None:
    with pytest.raises(BadInput, check=coded("output-regex-not-valid")):
        parse_output_regex(pattern)


@pytest.mark.parametrize("given", [{"regex": "^foo(a|aa)+$"}, {"json_schema": {"pattern": "^foo(a|aa)+$"}}])
def test_a_pattern_that_is_not_done_in_time_is_a_fault(given: dict[str, Any]) -> None:
    answer = "foo" + "a" * 100 + "!"
    started = time.process_time()
    (fault,) = output_faults(OutputFormat(**given), [answer if "regex" in given else json.dumps(answer)])
    assert fault
    assert "did not finish with it after 1 s" in fault
    assert time.process_time() - started < 3 * MATCH_TIMEOUT_S


@pytest.mark.parametrize("given", [{}, {"regex": "a", "json_schema": {}}, {"json_schema": {"type": 5}}, {"regex": "("}])
def test_a_record_that_cannot_be_used_is_not_made(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OutputFormat(**given)


@pytest.mark.parametrize("output_format", [OutputFormat(json_schema=ACTION), OutputFormat(json_schema=True)])
def test_a_record_is_read_back_as_written(output_format: OutputFormat) -> None:
    assert OutputFormat.model_validate_json(output_format.model_dump_json()) == output_format


@given(st.binary(max_size=200) | INSTANCES.map(lambda content: json.dumps(content).encode()))
def test_any_file_is_read_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = written(tmp_path_factory.getbasetemp(), content)
    try:
        assert output_faults(read_output_schema(path), ["{}"])
    except BadInput as error:
        assert str(path) in error.message
