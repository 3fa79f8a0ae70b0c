"""A deploy's request, checked before anything is written."""

import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ConfigDict, TypeAdapter, ValidationError

from slmops.infra.checkpoints.chat_template import parse_chat_template
from slmops.infra.checkpoints.folder import LONGEST_TEMPLATE
from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import read_text
from slmops.infra.storage.names import LONGEST_TRAINING_RUN, check_new_name
from slmops.tasks.request.budget import parse_budget
from slmops.tasks.request.declaration import declared
from slmops.tasks.request.parameters import PRECISIONS, DeployParameters, Device, Precision
from slmops.tasks.request.values import Values

DEVICE_OF_PROVIDER: dict[str, Device] = {"cpu": "cpu", "cuda": "gpu", "dml": "gpu", "webgpu": "gpu"}


@dataclass(frozen=True)
class DeployRequest(DeployParameters):
    """A deploy's request, with checked types."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    @classmethod
    def of(cls, parameters: Mapping[str, object]) -> "DeployRequest":
        """Return the request that parameters make; raises `BadInput` for one that is unknown or of a wrong type."""
        try:
            return REQUEST.validate_python(parameters)
        except ValidationError as error:
            fault = error.errors()[0]
            raise BadInput(
                f"{fault['loc'][0]}: {fault['msg']}, found {fault['input']!r}.",
                "Correct it.",
                code="parameter-not-valid",
            ) from None

    def given(self, names: Set[str]) -> dict[str, object]:
        """Return the named parameters that differ from their defaults, as JSON values."""
        found: dict[str, object] = REQUEST.dump_python(self, mode="json", include=set(names), exclude_defaults=True)
        return found

    def checked(self) -> "DeployRequest":
        """Return the request with duplicates removed; raises `BadInput` for a request that no deploy can fulfil."""
        if not self.checkpoint.strip():
            raise BadInput(
                "No checkpoint is named.",
                "Name a folder, a Hub id, or an s3:// or store:// address, in an event too.",
                code="checkpoint-not-named",
            )
        check_new_name(self.name)
        if not self.precisions:
            raise BadInput(
                "No precision is named.", f"Name at least one of {', '.join(PRECISIONS)}.", code="precision-not-named"
            )
        if DEVICE_OF_PROVIDER[self.execution_provider] != self.device and self.device != "npu":
            raise BadInput(
                f"The execution provider {self.execution_provider!r} does not run on the device {self.device!r}.",
                f"Use --device {DEVICE_OF_PROVIDER[self.execution_provider]} with it.",
                code="provider-of-other-device",
            )
        if self.device == "npu":
            raise BadInput("There is no recipe for NPUs yet.", "Use --device cpu or gpu.", code="no-recipe-for-npu")
        judging = [name for name in ("quick", "search", "promote") if getattr(self, name)]
        if self.build_only and judging:
            raise BadInput(
                f"--build-only judges nothing, and --{judging[0]} needs a judgement.",
                "Leave one of them out.",
                code="build-only-asks-for-more",
            )
        for field in declared(DeployParameters):
            _check_range(field.name, getattr(self, field.name), field.parameter.values)
        parse_budget(self.budget)
        if self.olive_config_file and (self.recipes or self.search):
            raise BadInput(
                f"An Olive configuration leaves no {'recipe to name' if self.recipes else 'recipes to search'}.",
                "Leave one of the two out.",
                code="recipe-beside-olive-config",
            )
        if self.training_run is not None and not 0 < len(self.training_run) <= LONGEST_TRAINING_RUN:
            raise BadInput(
                f"The training run has {len(self.training_run)} characters.",
                f"Give 1 to {LONGEST_TRAINING_RUN}.",
                code="training-run-length",
            )
        if self.training_run and (urlsplit(self.training_run).username or urlsplit(self.training_run).password):
            raise BadInput(
                "The training run's address contains a user or a password.",
                "Leave them out.",
                code="training-run-with-password",
            )
        if self.chat_template_file:
            read_chat_template_file(Path(self.chat_template_file))
        if self.output:
            check_output(Path(self.output))
        return replace(
            self,
            precisions=tuple(dict.fromkeys(self.precisions)),
            recipes=tuple(dict.fromkeys(self.recipes)),
            no_climb=self.no_climb or self.build_only,  # a climb follows a judgement
        )

    @property
    def generation_defaults(self) -> dict[str, float]:
        """The generation parameters that were given, under genai's names."""
        values = {
            "max_length": self.max_length,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return {name: value for name, value in values.items() if value is not None}


REQUEST = TypeAdapter(DeployRequest)


def check_precisions(names: Sequence[str]) -> tuple[Precision, ...]:
    """Return the named precisions; raises `BadInput` naming the first that is unknown."""
    for name in names:
        if name not in PRECISIONS:
            raise BadInput(
                f"The precision {name!r} is unknown.",
                f"slmops builds {', '.join(PRECISIONS)}.",
                code="precision-unknown",
            )
    return tuple(name for name in names if name in PRECISIONS)


def read_chat_template_file(path: Path) -> str:
    """Return a chat template's text; raises `BadInput` if the file is missing or not valid Jinja."""
    try:
        text = read_text(path.expanduser())
    except OSError as error:
        raise BadInput(
            f"The chat template {path} cannot be read: {error.strerror}.",
            "Name a Jinja file.",
            code="chat-template-unreadable",
        ) from None
    except ValueError as error:
        raise BadInput(
            f"The chat template {path} cannot be read: {error}.", "Name a Jinja file.", code="chat-template-not-utf8"
        ) from None
    if len(text) > LONGEST_TEMPLATE:
        raise BadInput(
            f"The chat template {path} has {len(text):,} characters, more than {LONGEST_TEMPLATE:,}.",
            "Name the template that the model was trained with.",
            code="chat-template-too-long",
        )
    if not text.strip():
        raise BadInput(f"The chat template {path} is empty.", "Name a Jinja file.", code="chat-template-empty")
    parse_chat_template(text, f"The chat template {path}")
    return text


def check_output(path: Path) -> None:
    """Raise `BadInput` when a plain copy cannot be written to a folder: it must be new or empty."""
    nearest = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), path)
    if not nearest.is_dir():
        raise BadInput(
            f"The output {path} cannot be a folder: {nearest} is a file.", "Name a new folder.", code="output-is-file"
        )
    if nearest == path and any(path.iterdir()):
        raise BadInput(
            f"The output {path} exists and is not an empty folder.", "Name a new folder.", code="output-not-empty"
        )


def _check_range(name: str, value: float | None, values: Values) -> None:
    if value is None or values.minimum is None:
        return
    lowest, highest = values.minimum, sys.float_info.max if values.maximum is None else values.maximum
    if not lowest <= value <= highest:
        raise BadInput(
            f"{name} is {value}.", f"It must be between {lowest} and {highest}.", code="parameter-out-of-range"
        )
