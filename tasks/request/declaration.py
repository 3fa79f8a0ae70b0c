"""The declaration of parameters in a record, and their use by a flow: each parameter is declared once."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from typing import Annotated, TypeVar, get_args, get_type_hints

from slmops.tasks.request.values import ANY_VALUE, FormField, Values

Record = TypeVar("Record")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Parameter:
    """The purpose of a parameter, and its form on the command line.

    `description` is shown by Prefect's form and API; `help` by the command, which has less room (default: the same).
    `option` is the option's name (default: the parameter's own); a `positional` parameter is an argument. A `key` is
    given as KEY=VALUE to an option that it shares with other keys. `switch` is the value that a flag sets. Values that
    are `not_offered` are of the right type but always fail, so help, completion and form leave them out. `values` are
    the bounds of the others. The form shows the parameters of a `group` under its name.
    """

    description: str
    help: str = ""
    option: str = ""
    metavar: str | None = None
    positional: bool = False
    key: bool = False
    switch: str | None = None
    not_offered: tuple[str, ...] = ()
    values: Values = ANY_VALUE
    group: str = ""


@dataclass(frozen=True)
class Declared:
    """A field of a record: its type, its default (`MISSING` if it is required), and its description."""

    name: str
    type: object
    default: object
    parameter: Parameter


def declared(record: type) -> Iterator[Declared]:
    """Yield the parameters that a record declares, in order."""
    types = get_type_hints(record, include_extras=True)
    for field in fields(record):
        bare, parameter = get_args(types[field.name])
        yield Declared(field.name, bare, field.default, parameter)


def takes(
    record: type[Record], choices: Mapping[str, Sequence[str]] | None = None
) -> Callable[[Callable[[Record], Result]], Callable[..., Result]]:
    """Give a function of one record a parameter for each of the record's fields.

    Prefect builds a flow's form from its signature and the section `Args` of its docstring; both come from the record.
    `choices` lists, by a parameter's name, the values to choose from, which are known only to later stages.
    """
    parameters = list(declared(record))

    def decorate(function: Callable[[Record], Result]) -> Callable[..., Result]:
        @wraps(function)
        def flat(*args: object, **kwargs: object) -> Result:
            return function(record(**signature.bind(*args, **kwargs).arguments))

        signature = inspect.signature(function).replace(
            parameters=[_in_signature(field, choices or {}) for field in parameters]
        )
        flat.__signature__ = signature  # type: ignore[attr-defined]
        flat.__annotations__ = {field.name: field.type for field in parameters}
        flat.__doc__ = _with_arguments(inspect.getdoc(function) or "", parameters)
        return flat

    return decorate


def _in_signature(field: Declared, choices: Mapping[str, Sequence[str]]) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    kind, said = inspect.Parameter.POSITIONAL_OR_KEYWORD, field.parameter
    shown = FormField(said.values, tuple(choices.get(field.name, ())), said.not_offered, said.group)
    return inspect.Parameter(field.name, kind, default=default, annotation=Annotated[field.type, shown])


def _with_arguments(text: str, parameters: list[Declared]) -> str:
    purpose, title, result = text.partition("Returns:")
    arguments = "\n".join(f"    {field.name}: {field.parameter.description}" for field in parameters)
    return f"{purpose.rstrip()}\n\nArgs:\n{arguments}\n\n{title}{result}".rstrip()
