"""Scorers: what counts as right, what is refused, and what a user's pattern can cost."""

import json
import string
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slmops.infra.errors import BadInput
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.questions.patterns import MATCH_TIMEOUT_S, PROBE_TIMEOUT_S, compile_pattern, is_found
from slmops.tasks.questions.scoring import MAX_ROUGE_WORDS, SCORERS, parse_scorer, parse_scorer_text
from slmops.tasks.questions.strict_json import parse_json
from tests.support.errors import coded

MESSAGES = [{"role": "user", "content": "x"}]


def score(scorer: Any, answer: str, expected: str) -> float:
    row = EvaluationRow.model_validate({"id": 1, "messages": MESSAGES, "expected": expected, "scorer": scorer})
    assert row.expected is not None
    return row.scorer.score(answer, row.expected)


def refusal(scorer: Any, expected: str) -> str:
    with pytest.raises(ValidationError) as caught:
        EvaluationRow.model_validate({"id": "x", "messages": MESSAGES, "expected": expected, "scorer": scorer})
    assert {error["type"] for error in caught.value.errors()} == {"value_error"}
    return str(caught.value)


FENCED = '```json\n{"a": 1}\n```'


@pytest.mark.parametrize(
    ("scorer", "expected", "right", "wrong"),
    [
        ("exact_match", "on", ["on", " on\n"], ["On", "on.", "", "on on"]),
        (
            "normalized_match",
            "Turn the lights ON!",
            ["turn the lights on", "  turn\u00a0the  lights, on.", "TURN THE LIGHTS ON", "turn the lights on"],
            ["turn lights on", "turn the lights off", "turnthelightson", ""],
        ),
        ("normalized_match", "-5 degrees", ["\u22125 degrees", "-5, degrees"], ["5 degrees", "- 5 degrees"]),
        ("normalized_match", "STRASSE", ["Straße", "straße."], ["strase"]),
        ("normalized_match", "Ελλάς", ["ΕΛΛΆΣ"], ["ΕΛΛΑΣ"]),
        ("contains", " Paris ", ["It is Paris.", "Paris", "xParisx"], ["paris", "Par is", ""]),
        ({"name": "contains", "normalized": True}, "turn-on", ["Please TURN ON it"], ["turn", "turnon"]),
        ("regex", r"\b2[01] degrees\b", ["It is 21 degrees.", " 20 degrees "], ["121 degrees", "21 Degrees", ""]),
        ({"name": "regex", "whole_match": True}, "on|off", ["on", " off\n"], ["on off", "only", "On"]),
        ({"name": "regex", "ignore_case": True}, "^on$", ["ON", " on "], ["one"]),
        ("regex", r"^\p{Han}+$", ["東京"], ["Tokyo", "東 京"]),
        (
            "json_equality",
            '{"a": 1, "b": [true, null, "x"]}',
            ['{"b": [true, null, "x"], "a": 1.0}', ' {"a":1e0,"b":[true,null,"\\u0078"]}\n'],
            [
                '{"a": true, "b": [true, null, "x"]}',
                '{"a": 1, "b": [1, null, "x"]}',
                '{"a": 1, "b": [null, true, "x"]}',
                '{"a": 1, "b": [true, null, "x"], "c": 0}',
                '{"a": 1, "a": 1, "b": [true, null, "x"]}',
                '{"a": 1, "b": [true, null, "x"]} and more',
                "",
            ],
        ),
        ("json_equality", "0", ["0", "0.0", "-0"], ["false", "null", '"0"', "NaN", "[]", "[" * 100_000]),
        ("json_equality", "1e300", ["1e300"], ["1e999", "Infinity", "1" * 9999]),
        ("json_equality", "9007199254740993", ["9007199254740993"], ["9007199254740992", "9007199254740992.0"]),
        ("json_equality", '{"a": 1}', ['{"a": 1}'], [FENCED, "```\n{}\n```"]),
        (
            {"name": "json_equality", "allow_fence": True},
            '{"a": 1}',
            [FENCED, '{"a": 1}', '```\n{"a":1}\n```\n', '```JSON \n{"a":1}```'],
            [f"Here: {FENCED}", f"{FENCED}\n{FENCED}", '```python\n{"a":1}\n```'],
        ),
        (
            "numeric",
            "21",
            ["21", "It is 21.0 degrees", "21, or 22", "+21", "温度21度", "2.1e1"],
            ["22", "-21", "2 1", ""],
        ),
        ("numeric", "-5", ["-5", "\u22125 °C"], ["5", "COVID-5"]),
        ("numeric", "1,234.5", ["1234.5", "about 1,234.50 euros"], ["1.2345", "1,2345"]),
        ("numeric", ".5", ["0.5", "half: .5"], ["5", "1e400"]),
        ({"name": "numeric", "absolute_tolerance": 0.3}, "21", ["21.3", "20.7"], ["21.300001", "20.6"]),
        ({"name": "numeric", "relative_tolerance": 0.1}, "-200", ["-180", "-220"], ["-179", "-221", "200"]),
        ({"name": "numeric", "whole_answer": True}, "21", ["21", " 21.0\n"], ["21 degrees", "21\n22"]),
        ("rouge_l", "the cat sat", ["The cat sat!", "the-cat sat"], ["dog", "", "..."]),
        ("rouge_l", "東京タワー", ["東京タワー。"], ["Tokyo"]),
    ],
)
def test_what_is_right_and_what_is_wrong(scorer: Any, expected: str, right: list[str], wrong: list[str]) -> None:
    assert {answer: score(scorer, answer, expected) for answer in right} == dict.fromkeys(right, 1.0)
    assert {answer: score(scorer, answer, expected) for answer in wrong} == dict.fromkeys(wrong, 0.0)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # Lin 2004: "police kill the gunman" has 2 of 4 words in order of "police killed the gunman", and 3 when both match.
    assert score("rouge_l", "police kill the gunman", "police killed the gunman") == 0.75
    assert score("rouge_l", "the gunman kill police", "police killed the gunman") == 0.5
    assert score("rouge_l", "the cat", "the cat sat on") == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert score("rouge_l", "東京駅", "東京") == pytest.approx(0.8)
    assert score("rouge_l", "Übung", "übung macht") == pytest.approx(2 / 3)


ASCII = st.text(string.ascii_letters + string.digits + " .,'-\n", max_size=60)


@given(ASCII, ASCII.filter(lambda text: any(character.isalnum() for character in text)))
def test_rouge_l_of_plain_ascii_is_the_librarys_own(answer: str, expected: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes a second

    own = RougeScorer(["rougeL"]).score(expected, answer)["rougeL"].fmeasure
    assert score("rouge_l", answer, expected) == pytest.approx(own)


@given(st.sampled_from(sorted(SCORERS)), st.text(max_size=40), st.text(max_size=40))
def test_every_score_is_between_0_and_1_and_reproducible(name: str, answer: str, expected: str) -> None:
    try:
        row = EvaluationRow.model_validate({"id": 1, "messages": MESSAGES, "expected": expected, "scorer": name})
    except ValueError:
        return
    found = row.scorer.score(answer, expected)
    assert isinstance(found, float)
    assert 0 <= found <= 1
    assert row.scorer.score(answer, expected) == found
    if name != "regex":
        assert row.scorer.score(f"\n{expected} ", expected) == pytest.approx(1)


NUMBERS = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)


@given(NUMBERS, st.floats(0, 1e6))
def test_a_number_is_found_again_however_it_is_written(number: float, tolerance: float) -> None:
    scorer = {"name": "numeric", "absolute_tolerance": tolerance}
    for text in (repr(number), f"The value is {number!r}.", f"{number!r}, not 3"):
        assert score(scorer, text, repr(number)) == 1
    if isinstance(number, int):
        assert score("numeric", f"= {number:,} items", str(number)) == 1


JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_json_is_equal_to_itself_in_any_spelling_and_to_nothing_else(one: Any, other: Any) -> None:
    text = json.dumps(one)
    assert score("json_equality", json.dumps(one, indent=3, sort_keys=True, ensure_ascii=False), text) == 1
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    if not same and one != other:
        assert score("json_equality", json.dumps(other), text) == 0


@given(st.text(max_size=60))
def test_any_text_is_parsed_as_json_or_refused_in_words(text: str) -> None:
    try:
        assert json.dumps(parse_json(text), allow_nan=False)
    except ValueError as error:
        assert type(error) is not json.JSONDecodeError
        assert str(error)


@pytest.mark.parametrize(
    ("scorer", "expected", "fault"),
    [
        ("bleu", "x", "the scorer 'bleu' is unknown; there are exact_match, normalized_match"),
        ({"name": "bleu"}, "x", "the scorer 'bleu' is unknown"),
        ({"tolerance": 1}, "x", "`scorer` must be a name or an object with a `name`"),
        (7, "x", "`scorer` must be a name"),
        (None, "x", "`scorer` must be a name"),
        ({"name": "numeric", "tolerance": 1}, "5", "no option `tolerance`; its options: absolute_tolerance, relative"),
        ({"name": "exact_match", "x": 1}, "5", "the scorer exact_match has no option `x`; its options: none"),
        ({"name": "numeric", "absolute_tolerance": -1}, "5", "`absolute_tolerance`: Input should be greater than"),
        ({"name": "numeric", "absolute_tolerance": "1"}, "5", "`absolute_tolerance`: Input should be a valid number"),
        ({"name": "numeric", "absolute_tolerance": float("nan")}, "5", "`absolute_tolerance`"),
        ({"name": "regex", "whole_match": 1}, "5", "`whole_match`: Input should be a valid boolean, found 1"),
        ("numeric", "five", "scorer numeric and not a number, found 'five'"),
        ("numeric", "5 degrees", "scorer numeric and not a number"),
        ("numeric", "1e999", "scorer numeric and not a number"),
        ("numeric", "", "scorer numeric and not a number"),
        ("json_equality", "{'a': 1}", "scorer json_equality, and it is not JSON: Expecting property name"),
        ("json_equality", '{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ("json_equality", "[NaN]", "NaN is not JSON"),
        ("json_equality", "1e999", "the number 1e999 is too large"),
        ("json_equality", "[" * 100_000, "nested too deep"),
        ("json_equality", "", "it is not JSON"),
        ("normalized_match", " -?! ", "only punctuation"),
        ({"name": "contains", "normalized": True}, "...", "only punctuation"),
        ("contains", " \n", "every answer contains it"),
        ("rouge_l", "?!", "has 0 words"),
        ("rouge_l", "a " * (MAX_ROUGE_WORDS + 1), "has 2,001 words, and the scorer rouge_l takes from 1 to 2,000"),
        ("regex", "", "the empty pattern"),
        ("regex", "(", "the pattern '(' is not valid: missing )"),
        ("regex", r"\L<names>", "undefined named list"),
        ("regex", "(" * 3000 + ")" * 3000, "nested too deep"),
        ("regex", "a" * 10_001, "longer than 10,000 characters"),
        ("regex", "(?R)?a(?R)?b", "refers to itself"),
        ("regex", "(a(?1)?b)", "refers to itself"),
        ("regex", "(?:(?:a{1000}){1000}){1000}", "repeats more than 100,000 parts"),
        ("regex", "a{1,999999999999999999}", "repeats more than 100,000 parts"),
    ],
)
def test_what_cannot_be_scored_with_is_named(scorer: Any, expected: str, fault: str) -> None:
    assert fault in refusal(scorer, expected)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a|a)*$",
        "(a|aa)+$",
        r"^(\w|\w\w)+$",
        r"(?:(a|b|ab)*)*$",
        "^x(y|yy)*$",
        "^(é|éé)+$",
        r"(\d|\d\d)*;$",
        "(ab|a|b)*$",
    ],
)
def test_a_pattern_that_backtracks_for_ever_is_refused_soon(pattern: str) -> None:
    started = time.process_time()
    assert "backtracks without end" in refusal("regex", pattern)
    assert time.process_time() - started < 3 * PROBE_TIMEOUT_S


@pytest.mark.parametrize(
    "pattern",
    [
        r"^\{.*\}$",
        r".*temperature.*21.*degrees.*",
        r"\d{4}-\d{2}-\d{2}",
        r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        r"(?i)(yes|no)\b",
        r"^(\s*\w+\s*,)*\s*\w+$",
        r"(?s)```json\n.*\n```",
        r"(?<year>\d+)\s(?P=year)",
        r"[^()]{1,500}",
    ],
)
def test_usual_patterns_are_taken(pattern: str) -> None:
    assert compile_pattern(pattern).pattern == pattern


def test_a_pattern_that_hides_its_backtracking_ends_at_its_timeout() -> None:
    hidden = "^foo(a|aa)+$"
    assert score("regex", "foo" + "a" * 100, hidden) == 1
    started = time.process_time()
    with pytest.raises(TimeoutError):
        score("regex", "foo" + "a" * 100 + "!", hidden)
    assert time.process_time() - started < 3 * MATCH_TIMEOUT_S


@given(
    st.text(alphabet="ab0()[]{}|*+?\\.^$<>=!:,-wdR&P \u00e9", max_size=24), st.text(alphabet="ab0 -\u00e9", max_size=24)
)
def test_any_pattern_is_used_or_refused_in_words(pattern: str, text: str) -> None:
    try:
        assert is_found(pattern, text) in (True, False)
    except TimeoutError:
        pass
    except ValueError as error:
        assert str(error).startswith("the pattern ")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("exact_match", "exact_match"),
        ({"name": "contains"}, "contains"),
        ({"name": "contains", "normalized": False}, "contains"),
        ({"name": "numeric", "absolute_tolerance": 1}, {"name": "numeric", "absolute_tolerance": 1.0}),
    ],
)
def test_what_means_the_same_is_written_the_same(written: Any, expected: Any) -> None:
    row = EvaluationRow.model_validate({"id": 1, "messages": MESSAGES, "expected": "5", "scorer": written})
    dumped = row.model_dump(mode="json")
    assert dumped["scorer"] == expected
    assert EvaluationRow.model_validate(dumped) == EvaluationRow.model_validate_json(row.model_dump_json()) == row


def test_a_parameter_names_a_scorer_or_writes_it_as_json() -> None:
    assert parse_scorer_text(" rouge_l ") == parse_scorer("rouge_l")
    text = '{"name": "numeric", "absolute_tolerance": 0.5}'
    assert parse_scorer_text(text) == parse_scorer({"name": "numeric", "absolute_tolerance": 0.5})
    for wrong in (
        "bleu",
        "",
        "{",
        '{"name": "numeric", "tolerance": 1}',
        '["numeric"]',
        '{"name": "regex", "name": "x"}',
    ):
        with pytest.raises(BadInput, check=coded("scorer-not-valid")) as caught:
            parse_scorer_text(wrong)
        assert "absolute_tolerance" in caught.value.what_to_do
