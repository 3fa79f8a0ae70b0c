"""The base of records: complete, of the declared types, and immutable."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

T = TypeVar("T")

Json = dict[str, JsonValue]  # an object of JSON whose fields another program defines
Untyped = Any  # an object of a library without types: models of torch, transformers and the builder
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]


class Record(BaseModel):
    """A record of declared fields and no others. JSON keeps figures that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


def later_field(default: T) -> T:
    """Return a field that is written only when it differs from its default.

    It is for fields that records on disk may lack: such a record stays the same when it is read and written again.
    """
    return Field(default, exclude_if=lambda value: bool(value == default))
