"""A call of a child process: a record of the request, with the type of the answer."""

import importlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, get_type_hints

from pydantic import JsonValue, TypeAdapter

from slmops.infra.records import Record

R = TypeVar("R")

OnProgress = Callable[[float, float, str], None]


class Progress(Protocol):
    """Report `done` of `total` steps and the current activity. It is cheap enough to be called in a loop."""

    def __call__(self, done: float, total: float, what: str) -> None: ...


class Call(Record, Generic[R]):
    """A request to a child process; `R` is the type of its answer.

    A call and its answer cross between the processes as JSON and are validated on both sides. Both import the module of
    a call, so heavy packages are imported within `perform`. A relative path would name another file in the child, so
    path fields are of type `slmops.infra.records.AbsolutePath`.
    """

    @abstractmethod
    def perform(self, progress: Progress) -> R:
        """Perform the call in this process; raises the errors of `slmops.infra.errors`."""

    @classmethod
    def target(cls) -> str:
        """MODULE:CLASS, which names the class to the child process, and the child in a list of processes."""
        return f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def answer_type(cls) -> TypeAdapter[R]:
        """The type of the answer, as `perform` declares it."""
        return TypeAdapter(get_type_hints(cls.perform)["return"])


@dataclass(frozen=True)
class ChildResult(Generic[R]):
    """A child's answer, its wall time in s, and the peak resident memory of its process tree in bytes."""

    value: R
    wall_s: float
    peak_rss_bytes: int


def perform(target: str, request: JsonValue, progress: Progress) -> JsonValue:
    """Perform a call that came from another process, and return its answer as JSON.

    Raises `pydantic.ValidationError` for a request or an answer that is not of the call's type, `TypeError` for a
    target that is not a call, and what the call raises.
    """
    module, _, name = target.partition(":")
    kind = getattr(importlib.import_module(module), name)
    if not (isinstance(kind, type) and issubclass(kind, Call)):
        raise TypeError(f"{target} is not a call")
    answer_type = kind.answer_type()
    answer = answer_type.validate_python(kind.model_validate(request).perform(progress))
    sent: JsonValue = answer_type.dump_python(answer, mode="json")
    return sent
