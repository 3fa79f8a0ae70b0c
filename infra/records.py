"""The base of records: complete, of the declared types, and immutable."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue

Json = dict[str, JsonValue]  # an object of JSON whose fields another program defines
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]


class Record(BaseModel):
    """A record of declared fields and no others. JSON keeps figures that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")
