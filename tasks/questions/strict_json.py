"""JSON without ambiguities: documents that parsers read differently are refused."""

import json
import math
from typing import Any, NoReturn


def parse_json(text: str) -> Any:
    """Parse a JSON document; raises `ValueError` saying in words why it cannot be read.

    It also refuses duplicate keys, NaN and Infinity, numbers beyond float64 or with thousands of digits, and nesting
    that is too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite_float)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise ValueError(f"it is not JSON: {error.msg} at {line}column {error.colno}") from None
    except _RefusedError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"it cannot be read: {error}") from None


class _RefusedError(ValueError):
    pass


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RefusedError(f"the key {shorten(repr(twice), 60)} occurs twice in one object")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _RefusedError(f"the number {shorten(text, 60)} is too large")
    return number


def shorten(text: str, length: int) -> str:
    """Return a text of at most `length` characters, with an ellipsis if it was cut."""
    return text if len(text) <= length else text[: length - 3] + "..."
