"""Regular expressions that a user wrote: compiled within bounds, and matched with a timeout.

The dialect is that of the library `regex`. A pattern may need exponential time on some texts. The probes below find
many such patterns, which are refused when they are read. For the others, every match ends after `MATCH_TIMEOUT_S`.
"""

import itertools
import time
from collections.abc import Iterator
from functools import lru_cache

import regex

MATCH_TIMEOUT_S = 1.0
MAX_PATTERN_CHARACTERS = 10_000
# `regex` expands counted repetitions when it compiles: this many parts take some 30 MB.
MAX_PATTERN_PARTS = 100_000
PROBE_TIMEOUT_S = 0.5
# Exponential patterns do not finish on a text of this length, polynomial ones are fast.
PROBE_CHARACTERS = 64
MAX_PROBE_LETTERS = 8
PROBE_LETTERS = "a0 "

_TOKEN = regex.compile(
    r"(?P<escaped>\\.)|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|\{(?P<least>\d*)(?P<most>,\d*)?\}|(?P<other>.)", regex.DOTALL
)
_RECURSION = regex.compile(r"\(\?(?:R|[+-]?\d+|&\w+|P>\w+)\)")


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str, *, ignore_case: bool = False) -> regex.Pattern[str]:
    """Compile a pattern; raises `ValueError` saying in words why it cannot be used.

    Refused are patterns that are not valid, too long, that refer to themselves (their memory has no bound), whose
    counts multiply beyond `MAX_PATTERN_PARTS`, or that backtrack without end on a probe.
    """
    shown = repr(pattern if len(pattern) <= 60 else pattern[:57] + "...")
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise ValueError(f"the pattern {shown} is longer than {MAX_PATTERN_CHARACTERS:,} characters")
    if _RECURSION.search(pattern):
        raise ValueError(f"the pattern {shown} refers to itself, and its memory has no bound")
    if _parts(pattern) > MAX_PATTERN_PARTS:
        raise ValueError(f"the pattern {shown} repeats more than {MAX_PATTERN_PARTS:,} parts")
    try:
        compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
    except regex.error as error:
        raise ValueError(f"the pattern {shown} is not valid: {error}") from None
    except RecursionError:
        raise ValueError(f"the pattern {shown} is nested too deep") from None
    except (OverflowError, KeyError, IndexError) as error:
        raise ValueError(f"the pattern {shown} is not valid: {type(error).__name__} {error}") from None
    deadline = time.process_time() + PROBE_TIMEOUT_S
    for probe in _probes(pattern):
        try:
            compiled.search(probe, timeout=max(0.001, deadline - time.process_time()))
        except TimeoutError:
            raise ValueError(
                f"the pattern {shown} backtracks without end: it did not finish with a text of "
                f"{len(probe)} characters after {PROBE_TIMEOUT_S:g} s"
            ) from None
    return compiled


def is_found(pattern: str, text: str, *, whole: bool = False, ignore_case: bool = False) -> bool:
    """Whether a pattern matches a part of a text, or with `whole` all of it.

    Raises `TimeoutError` after `MATCH_TIMEOUT_S` and `ValueError` for a pattern that cannot be used.
    """
    compiled = compile_pattern(pattern, ignore_case=ignore_case)
    match = compiled.fullmatch if whole else compiled.search
    return match(text, timeout=MATCH_TIMEOUT_S) is not None


def _parts(pattern: str) -> int:
    """Roughly the number of parts of a pattern after its counted repetitions are expanded."""
    sizes = [0]
    last = 0
    for token in _TOKEN.finditer(pattern):
        character = token["other"]
        if token["least"] is not None:
            # Thirteen digits are already too many, and numbers with thousands of digits are slow to parse.
            count = max(int(text[:13] or 0) for text in (token["least"], (token["most"] or ",")[1:]))
            sizes[-1] += last * max(0, count - 1)
            last *= max(1, count)
        elif character == "(":
            sizes.append(0)
        elif character == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif character is None or not character.isspace():  # a verbose pattern may have white space before its count
            last = 1
            sizes[-1] += 1
    return sum(sizes)


def _probes(pattern: str) -> Iterator[str]:
    """Texts of few letters, including the pattern's own, with an ending that hardly any pattern matches."""
    own = dict.fromkeys(character for character in pattern if character.isalnum() or character in "_-.,:;\"'/ ")
    letters = [*itertools.islice(own, MAX_PROBE_LETTERS), *(letter for letter in PROBE_LETTERS if letter not in own)]
    pairs = dict.fromkeys(
        letter + next_letter
        for letter, next_letter in itertools.pairwise(pattern)
        if {letter, next_letter} <= set(letters)
    )
    for text in (*letters, *itertools.islice(pairs, MAX_PROBE_LETTERS), *(a + b for a, b in itertools.pairwise(own))):
        yield text * (PROBE_CHARACTERS // len(text)) + "\0"
    for first, second in itertools.permutations(letters, 2):
        yield first + second * PROBE_CHARACTERS + "\0"
        yield second * PROBE_CHARACTERS + first + "\0"
