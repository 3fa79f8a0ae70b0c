"""The base of records: complete, of the declared types, and immutable."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

T = TypeVar("T")

Json = dict[str, JsonValue]  # an object of JSON whose fields another program defines
Untyped = Any  # what a library without types has made: torch's and transformers' models, the builder's
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]


class Record(BaseModel):
    """A record of declared fields and no others. JSON keeps figures that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


def later_field(default: T) -> T:
    """Return a field that is written only when it differs from its default.

    It is for fields that records on disk may lack: such a record, read and written anew, stays the same.
    """
    return Field(default, exclude_if=lambda value: bool(value == default))
