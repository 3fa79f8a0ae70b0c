"""The output format: a JSON Schema or a pattern that every raw answer has to follow."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from jsonschema.validators import extend, validator_for
from pydantic import StrictStr, model_validator
from referencing.exceptions import Unresolvable
from referencing.jsonschema import EMPTY_REGISTRY, specification_with

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import read_beginning, text_of
from slmops.infra.records import Record
from slmops.tasks.questions.patterns import MATCH_TIMEOUT_S, compile_pattern, is_found
from slmops.tasks.questions.strict_json import parse_json, shorten

MAX_SCHEMA_BYTES = 1_000_000
MAX_FAULT_CHARACTERS = 200
# Validating one of these exposes a schema that refers to itself without end.
_PROBES: tuple[object, ...] = ({}, [], "", 0, True, None)


class OutputFormat(Record):
    """The required form of every answer: JSON that a schema allows, or text that a pattern matches as a whole.

    Exactly one of the two is given. Making one raises pydantic's `ValidationError` for a schema that is not valid,
    refers to anything outside itself, or has a pattern that cannot be used, and for such a pattern.
    """

    json_schema: dict[str, Any] | bool | None = None
    regex: StrictStr | None = None

    @model_validator(mode="after")
    def _can_be_used(self) -> "OutputFormat":
        if (self.json_schema is None) == (self.regex is None):
            raise ValueError("exactly one of json_schema and regex must be given")
        if self.regex is not None:
            _check_output_regex(self.regex)
        else:
            check_schema(self.json_schema)
        return self

    @property
    def summary(self) -> str:
        """The format in a few words."""
        return "JSON of the given schema" if self.regex is None else f"text that {shorten(self.regex, 60)!r} matches"


def read_output_schema(path: Path) -> OutputFormat:
    """Read a JSON Schema from a UTF-8 file, Draft 2020-12 or the draft that its `$schema` names.

    Raises `BadInput` naming the file, the place in it and the fault.
    """
    try:
        content = read_beginning(path, MAX_SCHEMA_BYTES + 1)
    except OSError as error:
        raise BadInput(
            f"The output schema {path} cannot be read: {error.strerror or error}.",
            "Name a readable JSON Schema file.",
            code="output-schema-unreadable",
        ) from error
    try:
        if len(content) > MAX_SCHEMA_BYTES:
            raise ValueError(f"it is longer than {MAX_SCHEMA_BYTES:,} bytes")
        schema = parse_json(text_of(content))
        if not isinstance(schema, dict | bool):
            raise ValueError(f"it must be an object, found {type(schema).__name__}")  # noqa: TRY004
        check_schema(schema)
        return OutputFormat(json_schema=schema)
    except ValueError as error:
        raise BadInput(
            f"The output schema {path} cannot be used: {error}.", "Correct the file.", code="output-schema-not-valid"
        ) from None


def parse_output_regex(pattern: str) -> OutputFormat:
    """Return the format of a pattern; raises `BadInput` when it cannot be used."""
    try:
        _check_output_regex(pattern)
    except ValueError as error:
        raise BadInput(
            f"The output regex cannot be used: {error}.", "Correct the pattern.", code="output-regex-not-valid"
        ) from None
    return OutputFormat(regex=pattern)


def _check_output_regex(pattern: str) -> None:
    if not pattern:
        raise ValueError("it is empty, so that only an empty answer would match it")
    compile_pattern(pattern)


def output_faults(output_format: OutputFormat, answers: Sequence[str]) -> list[str | None]:
    """Return what is wrong with the form of each answer, None if nothing is wrong.

    Only white space at both ends of an answer is ignored. A check that takes longer than a second counts as a fault.
    """
    fault_of = _pattern_check(output_format.regex) if output_format.regex is not None else _schema_check(output_format)
    return [fault_of(answer.strip()) for answer in answers]


def _pattern_check(pattern: str) -> Callable[[str], str | None]:
    def fault_of(answer: str) -> str | None:
        try:
            return None if is_found(pattern, answer, whole=True) else "the pattern does not match it as a whole"
        except TimeoutError:
            return f"the pattern did not finish with it after {MATCH_TIMEOUT_S:g} s"

    return fault_of


def _schema_check(output_format: OutputFormat) -> Callable[[str], str | None]:
    validator = _validator(output_format.json_schema)

    def fault_of(answer: str) -> str | None:
        try:
            fault = best_match(validator.iter_errors(parse_json(answer)))
        except TimeoutError:
            return f"a pattern of the schema did not finish with it after {MATCH_TIMEOUT_S:g} s"
        except (RecursionError, OverflowError):
            return "its nesting is too deep or its numbers are too large for a check against the schema"
        except ValueError as error:
            return str(error)
        return None if fault is None else shorten(f"{fault.json_path}: {fault.message}", MAX_FAULT_CHARACTERS)

    return fault_of


# The library evaluates patterns with `re`, which no timeout can stop. It does so in these three keywords and in
# `unevaluatedProperties` together with `patternProperties`, which is refused.


def _pattern(validator: Any, pattern: str, instance: Any, schema: object) -> Iterator[ValidationError]:
    if validator.is_type(instance, "string") and not is_found(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: object) -> Iterator[ValidationError]:
    if validator.is_type(instance, "object"):
        for pattern, subschema in patterns.items():
            for key, value in instance.items():
                if is_found(pattern, key):
                    yield from validator.descend(value, subschema, path=key, schema_path=pattern)


def _additional_properties(validator: Any, allowed: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for key, value in instance.items():
        if key in named or any(is_found(pattern, key) for pattern in patterns):
            continue
        if allowed is False:
            yield ValidationError(f"the property {key!r} is not allowed")
        else:
            yield from validator.descend(value, allowed, path=key)


_KEYWORDS = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
}


class _Validator(Protocol):
    def iter_errors(self, instance: object) -> Iterator[ValidationError]: ...


def _draft(schema: object) -> Any:
    """The validator class of the draft that a schema is written in."""
    named = schema.get("$schema") if isinstance(schema, dict) else None
    if named is None:
        return Draft202012Validator
    found = None
    with contextlib.suppress(ValueError):  # a name that is not a URI
        found = validator_for(schema, default=None) if isinstance(named, str) else None  # type: ignore[arg-type]
    if found is None:
        raise ValueError(f"the `$schema` {shorten(repr(named), 100)} is not a known draft of JSON Schema")
    return found


def _validator(schema: object) -> _Validator:
    draft = _draft(schema)
    # With `$schema`, the library would use the draft's own class, with its own keywords.
    bare = {key: value for key, value in schema.items() if key != "$schema"} if isinstance(schema, dict) else schema
    validator: _Validator = extend(draft, _KEYWORDS)(bare, registry=EMPTY_REGISTRY)  # type: ignore[no-untyped-call]
    return validator


def check_schema(schema: object) -> None:
    """Raise `ValueError` naming the place in a schema that cannot be used, and why."""
    draft = _draft(schema)
    try:
        draft.check_schema(schema, format_checker=FormatChecker(formats=()))
        bare = copy.deepcopy(schema)
        if isinstance(bare, dict):
            bare.pop("$schema", None)
            _check_subschemas(bare, specification_with(draft.META_SCHEMA["$schema"]))
        validator = _validator(schema)
        for probe in _PROBES:
            for _ in validator.iter_errors(probe):
                pass
    except SchemaError as error:
        place = "".join(f"/{part}" for part in error.absolute_path)
        raise ValueError(f"at #{place}: {shorten(error.message, MAX_FAULT_CHARACTERS)}") from None
    except RecursionError:
        raise ValueError("it is nested too deep, or refers to itself without end") from None


def _check_subschemas(document: dict[str, Any], specification: Any) -> None:
    own = dict(_places(document))
    patterns: dict[int, str] = {}
    unevaluated: str | None = None
    root = specification.create_resource(document)
    waiting = [(root, EMPTY_REGISTRY.resolver_with_root(root))]
    seen: set[int] = set()
    while waiting:
        resource, resolver = waiting.pop()
        schema = resource.contents
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        place = own[id(schema)]
        if "$schema" in schema:
            raise ValueError(f"at #{place}/$schema: it is only allowed at the top")
        if isinstance(schema.get("pattern"), str):
            _check_pattern(schema["pattern"], f"{place}/pattern")
        for pattern in schema.get("patternProperties", {}):
            patterns[id(schema)] = place
            _check_pattern(pattern, f"{place}/patternProperties")
        if "unevaluatedProperties" in schema:
            unevaluated = place
        for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
            if isinstance(schema.get(keyword), str):
                found = _look_up(resolver, schema[keyword], f"{place}/{keyword}")
                waiting.append((specification.create_resource(found.contents), found.resolver))
        try:
            waiting += [(subresource, resolver.in_subresource(subresource)) for subresource in resource.subresources()]
        except ValueError as error:  # an `$id` that is not a URI
            raise ValueError(f"at #{place}: {error}") from None
    if patterns and unevaluated is not None:
        raise ValueError(
            f"at #{unevaluated}/unevaluatedProperties: it cannot be used together with the patternProperties at "
            f"#{next(iter(patterns.values()))}; use additionalProperties"
        )


def _check_pattern(pattern: str, place: str) -> None:
    try:
        compile_pattern(pattern)
    except ValueError as error:
        raise ValueError(f"at #{place}: {error}") from None


def _look_up(resolver: Any, reference: str, place: str) -> Any:
    try:
        return resolver.lookup(reference)
    except (Unresolvable, ValueError):
        raise ValueError(
            f"at #{place}: {shorten(repr(reference), 100)} is not in this file, and other files are not read"
        ) from None


def _places(node: object, place: str = "") -> Iterator[tuple[int, str]]:
    """The JSON pointer of every object of a document, by its id()."""
    children: Any = ()
    if isinstance(node, dict):
        yield id(node), place
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    for key, child in children:
        yield from _places(child, f"{place}/{str(key).replace('~', '~0').replace('/', '~1')}")
