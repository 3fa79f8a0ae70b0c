"""The values of a parameter: their bounds, in the schema of a flow's form and in the checks of a request."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Values:
    """Bounds of a parameter's value, or of each element of a list: inclusive, `above` exclusive.

    `pattern` is found somewhere in a text; it works in Python and JavaScript. A list has at least `elements`.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    pattern: str | None = None
    longest: int | None = None
    elements: int | None = None

    @property
    def schema(self) -> dict[str, object]:
        """JSON Schema's keywords for one value."""
        keywords = {
            "minimum": self.minimum,
            "maximum": self.maximum,
            "exclusiveMinimum": self.above,
            "pattern": self.pattern,
            "maxLength": self.longest,
        }
        return {keyword: bound for keyword, bound in keywords.items() if bound is not None}


ANY_VALUE = Values()
GROUP = "x-group"  # the keyword of a parameter's group in the schema of a flow's form
NOT_BLANK = r"\S"


@dataclass(frozen=True)
class FormField:
    """Adds bounds, choices and a group to an annotated type's JSON Schema, and changes nothing in its validation.

    Prefect's form and API refuse other values before a run is made. The flow itself refuses them too, with its own
    message. Text that is none of the `choices` is allowed only by a `pattern`.
    """

    values: Values
    choices: tuple[str, ...] = ()
    not_offered: tuple[str, ...] = ()
    group: str = ""

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Return the schema that pydantic makes, with the bounds of each type but null."""
        schema: dict[str, Any] = handler(core_schema)
        grouped = {GROUP: self.group} if self.group else {}
        if "anyOf" not in schema:
            return {**self._bounded(schema), **grouped}
        kinds = [option if option == {"type": "null"} else self._bounded(option) for option in schema["anyOf"]]
        return {**schema, "anyOf": [part for kind in kinds for part in kind.get("anyOf", [kind])], **grouped}

    def _bounded(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        if schema.get("type") == "array":
            least = {} if self.values.elements is None else {"minItems": self.values.elements}
            return {**schema, "items": self._bounded(schema["items"]), **least}
        if self.choices and self.values.pattern:
            named = {"title": "Name", "type": "string", "enum": list(self.choices)}
            return {"anyOf": [named, {"title": "JSON", "type": "string", **self.values.schema}]}
        if self.choices:
            return {**schema, "enum": list(self.choices)}
        offered = (
            {"enum": [value for value in schema["enum"] if value not in self.not_offered]} if self.not_offered else {}
        )
        return {**schema, **offered, **self.values.schema}
