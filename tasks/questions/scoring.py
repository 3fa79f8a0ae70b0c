"""Scorers: they rate from 0 to 1 how well an answer matches the expected one.

White space at both ends of an answer is ignored. A score depends only on the two texts.
"""

import math
import unicodedata
from abc import ABC, abstractmethod
from decimal import Context, Decimal, localcontext
from functools import lru_cache
from typing import Annotated, Any, Literal

import regex
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PlainSerializer,
    ValidationError,
    field_validator,
)

from slmops.infra.errors import BadInput
from slmops.infra.reference.answers import matches
from slmops.tasks.questions.patterns import compile_pattern, is_found
from slmops.tasks.questions.strict_json import parse_json, shorten

# The longest common subsequence takes the product of both lengths, in time and in memory.
MAX_ROUGE_WORDS = 2000

# Punctuation and white space, except for the sign of a number.
_BETWEEN_WORDS = regex.compile(r"(?:(?!(?<!\w)-\d)[\p{P}\s])+")
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"(?V1)[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+")
_NUMBER = regex.compile(r"(?:(?<!\w)[+-])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)\.?|\.\d)\d*(?:[eE][+-]?\d+)?")
_FENCE = regex.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", regex.DOTALL | regex.IGNORECASE)
_EXACT = Context(prec=400)


class _Scorer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str

    def check(self, expected: str) -> None:
        """Raise `ValueError`, which says why, if this scorer cannot use an expected answer."""


class _TextScorer(_Scorer, ABC):
    @abstractmethod
    def score(self, answer: str, expected: str) -> float:
        """Return the score; raises `TimeoutError` when a pattern takes too long."""


class ExactMatch(_TextScorer):
    """1 for an answer that equals the expected one in every character."""

    name: Literal["exact_match"] = "exact_match"

    def score(self, answer: str, expected: str) -> float:
        """1 or 0."""
        return float(bool(matches(answer, expected)))


class NormalizedMatch(_TextScorer):
    """1 for an answer that equals the expected one but for case, punctuation, white space and compatible characters."""

    name: Literal["normalized_match"] = "normalized_match"

    def check(self, expected: str) -> None:
        """Refuse an expected answer that is empty after normalization."""
        _check_normalized(expected)

    def score(self, answer: str, expected: str) -> float:
        """1 or 0."""
        return float(normalized(answer) == normalized(expected))


class Contains(_TextScorer):
    """1 for an answer in which the expected text occurs; with `normalized`, both as normalized_match compares them."""

    name: Literal["contains"] = "contains"
    normalized: bool = False

    def check(self, expected: str) -> None:
        """Refuse a text that every answer contains."""
        if self.normalized:
            _check_normalized(expected)
        elif not expected.strip():
            raise ValueError("`expected` is empty, so that every answer contains it")

    def score(self, answer: str, expected: str) -> float:
        """1 or 0."""
        if self.normalized:
            return float(normalized(expected) in normalized(answer))
        return float(expected.strip() in answer)


class Regex(_TextScorer):
    """1 for an answer in which the expected pattern is found, or that it matches as a whole with `whole_match`."""

    name: Literal["regex"] = "regex"
    whole_match: bool = False
    ignore_case: bool = False

    def check(self, expected: str) -> None:
        """Refuse a pattern that is not valid or backtracks without end."""
        if not expected:
            raise ValueError("`expected` is the empty pattern, which is found in every answer")
        compile_pattern(expected, ignore_case=self.ignore_case)

    def score(self, answer: str, expected: str) -> float:
        """1 or 0."""
        return float(is_found(expected, answer.strip(), whole=self.whole_match, ignore_case=self.ignore_case))


class JsonEquality(_TextScorer):
    """1 for an answer that is the same JSON value: 1 is 1.0, and the order of keys does not count.

    `allow_fence` accepts an answer inside a Markdown fence (``` or ```json) that is all of it.
    """

    name: Literal["json_equality"] = "json_equality"
    allow_fence: bool = False

    def check(self, expected: str) -> None:
        """Refuse an expected answer that is not JSON."""
        try:
            parse_json(expected)
        except ValueError as error:
            raise ValueError(f"`expected` is for the scorer json_equality, and {error}") from None

    def score(self, answer: str, expected: str) -> float:
        """1 or 0."""
        text = answer.strip()
        fenced = _FENCE.fullmatch(text) if self.allow_fence else None
        try:
            found = parse_json(fenced[1] if fenced else text)
        except ValueError:
            return 0.0
        return float(is_same_json(found, parse_json(expected)))


class RougeL(_TextScorer):
    """F-measure of ROUGE-L (Lin 2004): the longest common subsequence of words; case does not count.

    A word is a run of letters, marks and digits of any script; in scripts without spaces between words (Chinese,
    Japanese, Thai, Lao, Khmer, Burmese) it is one character.
    """

    name: Literal["rouge_l"] = "rouge_l"

    def check(self, expected: str) -> None:
        """Refuse a text without words, or with too many."""
        count = len(words(expected))
        if not 1 <= count <= MAX_ROUGE_WORDS:
            raise ValueError(
                f"`expected` has {count:,} words, and the scorer rouge_l takes from 1 to {MAX_ROUGE_WORDS:,}"
            )

    def score(self, answer: str, expected: str) -> float:
        """The F-measure."""
        return float(_rouge_scorer().score(expected, answer)["rougeL"].fmeasure)


class Numeric(_TextScorer):
    """1 for a number within `absolute_tolerance`, or within `relative_tolerance` times the expected one.

    It is the first number of the answer, or with `whole_answer` the answer must be only a number. Numbers have a
    decimal point; commas may stand between groups of three digits.
    """

    name: Literal["numeric"] = "numeric"
    absolute_tolerance: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    relative_tolerance: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    whole_answer: bool = False

    def check(self, expected: str) -> None:
        """Refuse an expected answer that is not a number."""
        if _number(expected, whole=True) is None:
            raise ValueError(f"`expected` is for the scorer numeric and not a number, found {shorten(expected, 60)!r}")

    def score(self, answer: str, expected: str) -> float:
        """1 or 0."""
        found, aim = _number(answer, whole=self.whole_answer), _number(expected, whole=True)
        if found is None or aim is None:
            return 0.0
        # Decimal, so that 21.3 is not more than 0.3 away from 21.
        with localcontext(_EXACT):
            relative = Decimal(repr(self.relative_tolerance)) * abs(aim)
            return float(abs(found - aim) <= max(Decimal(repr(self.absolute_tolerance)), relative))


class ToolCalls(_Scorer):
    """1 for an answer whose calls of tools are the expected ones (see `slmops.tasks.questions.tool_calls`).

    `free_text` names arguments, of any tool, that are compared as normalized_match compares texts.
    """

    name: Literal["tool_calls"] = "tool_calls"
    free_text: tuple[str, ...] = ()

    @field_validator("free_text", mode="before")
    @classmethod
    def _of_json(cls, names: object) -> object:
        return tuple(names) if isinstance(names, list) else names

    def check(self, expected: str) -> None:
        """Refuse every expected text."""
        raise ValueError("the scorer tool_calls needs `expected_tool_calls` in place of `expected`")


Scorer = ExactMatch | NormalizedMatch | Contains | Regex | JsonEquality | RougeL | Numeric | ToolCalls
SCORERS: dict[str, type[Scorer]] = {
    "exact_match": ExactMatch,
    "normalized_match": NormalizedMatch,
    "contains": Contains,
    "regex": Regex,
    "json_equality": JsonEquality,
    "rouge_l": RougeL,
    "numeric": Numeric,
    "tool_calls": ToolCalls,
}


def parse_scorer(value: object) -> Scorer:
    """Return the scorer that a name, or an object of its name and options, denotes.

    Raises `ValueError` for an unknown scorer, an unknown option or an option's value that is not valid.
    """
    if isinstance(value, Scorer):
        return value
    options = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        found = shorten(repr(value), 60)
        raise ValueError(f"`scorer` must be a name or an object with a `name`, found {found}")  # noqa: TRY004
    name = options["name"]
    if name not in SCORERS:
        raise ValueError(f"the scorer {shorten(name, 60)!r} is unknown; there are {', '.join(SCORERS)}")
    kind = SCORERS[name]
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        fault = error.errors()[0]
        option = shorten(".".join(str(part) for part in fault["loc"]), 60)
        if fault["type"] == "extra_forbidden":
            known = ", ".join(option for option in kind.model_fields if option != "name") or "none"
            raise ValueError(f"the scorer {name} has no option `{option}`; its options: {known}") from None
        found = shorten(repr(fault["input"]), 60)
        raise ValueError(f"the scorer {name}'s option `{option}`: {fault['msg']}, found {found}") from None


def parse_scorer_text(text: str) -> Scorer:
    """Return the scorer that a parameter names: a name, or a JSON object of name and options; raises `BadInput`."""
    try:
        return parse_scorer(parse_json(text) if text.lstrip().startswith("{") else text.strip())
    except ValueError as error:
        raise BadInput(
            f"The scorer {shorten(text, 100)!r} cannot be used: {error}.",
            'Write a name, such as json_equality, or JSON: {"name": "numeric", "absolute_tolerance": 0.5}.',
            code="scorer-not-valid",
        ) from None


def _dump_scorer(scorer: Scorer) -> str | dict[str, object]:
    """Only the name if all options have their defaults, so that equal scorers have one form."""
    options = scorer.model_dump(exclude_defaults=True)
    return {"name": scorer.name, **options} if options else scorer.name


ScorerField = Annotated[Scorer, BeforeValidator(parse_scorer), PlainSerializer(_dump_scorer)]


def normalized(text: str) -> str:
    """A text's form for lenient comparison: Unicode NFKC, case-folded, punctuation and white space as one space.

    The minus sign of a number stays.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("\u2212", "-")
    return _BETWEEN_WORDS.sub(" ", folded).strip()


def words(text: str) -> list[str]:
    """The words that ROUGE-L compares, in order."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _check_normalized(expected: str) -> None:
    if not normalized(expected):
        raise ValueError("`expected` has only punctuation and white space, which are not compared")


def is_same_json(first: object, second: object) -> bool:
    """Whether two JSON values are equal: 1 is 1.0, true is not 1, and the order of keys does not count."""
    waiting = [(first, second)]
    while waiting:
        left, right = waiting.pop()
        if isinstance(left, dict) and isinstance(right, dict):
            if left.keys() != right.keys():
                return False
            waiting += [(value, right[key]) for key, value in left.items()]
        elif isinstance(left, list) and isinstance(right, list):
            if len(left) != len(right):
                return False
            waiting += zip(left, right, strict=True)
        elif isinstance(left, bool) != isinstance(right, bool) or left != right:  # in Python, True equals 1
            return False
    return True


def _number(text: str, *, whole: bool) -> Decimal | None:
    text = text.strip().replace("\u2212", "-")
    match = _NUMBER.fullmatch(text) if whole else _NUMBER.search(text)
    if match is None:
        return None
    digits = match[0].replace(",", "")
    return Decimal(digits) if math.isfinite(float(digits)) else None


class _Words:
    """The tokenizer for rouge-score, because its own one drops every script except Latin."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes two seconds

    return RougeScorer(["rougeL"], tokenizer=_Words())
