"""The options that commands share, and those that are generated from a record of a run's parameters."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from functools import wraps
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from slmops.deployments.cli import completion
from slmops.infra.errors import BadInput
from slmops.tasks.request.declaration import Declared, declared

LEVELS = ("debug", "info", "warning", "error")


def known_level(level: str | None) -> str | None:
    if level and level.lower() not in LEVELS:
        raise BadInput(
            f"The log level {level!r} is unknown.", "Use debug, info, warning or error.", code="log-level-unknown"
        )
    return level


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
LogLevel = Annotated[
    str | None, typer.Option(help="Show the run's log: debug, info, warning or error.", callback=known_level)
]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the model.", autocompletion=completion.names)]
Reference = Annotated[
    str,
    typer.Argument(
        metavar="NAME[@VERSION]",
        help="Model, or one version (or alias) of it.",
        autocompletion=completion.references,
    ),
]
VersionReference = Annotated[
    str,
    typer.Argument(metavar="NAME@VERSION", help="One version of a model.", autocompletion=completion.references),
]
Reason = Annotated[str, typer.Option(help="Reason; kept in the history.")]

Pairs = Sequence[str] | None


def asks_for(record: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a record, before its own.

    The command's first parameter is the user's request as the flow's parameters; omitted ones have the record's
    default.
    """
    fields = list(declared(record))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [_by_name(option) for option in list(inspect.signature(command).parameters.values())[1:]]

        @wraps(command)
        def with_options(**values: object) -> None:
            command(_parameters(fields, values), **{option.name: values[option.name] for option in own})

        options = [*_options(fields), *own]
        with_options.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        with_options.__annotations__ = {option.name: option.annotation for option in options}
        return with_options

    return decorate


def _by_name(option: inspect.Parameter) -> inspect.Parameter:
    return option.replace(kind=inspect.Parameter.KEYWORD_ONLY)


def _options(fields: Sequence[Declared]) -> Iterator[inspect.Parameter]:
    shared = {field.parameter.option: _keys(fields, field.parameter.option) for field in fields if field.parameter.key}
    for field in fields:
        if not field.parameter.key:
            yield _option(field)
        elif keys := shared.pop(field.parameter.option, None):
            names = ", ".join(key.name for key in keys)
            info = typer.Option(field.parameter.option, metavar="KEY=VALUE", help=f"{names}; repeatable.")
            yield _in_signature(_variable(field.parameter.option), list[str] | None, info, None)


def _option(field: Declared) -> inspect.Parameter:
    said = field.parameter
    text = said.help or said.description
    kind, default = _type_of(field)
    choices = () if said.switch is not None else _choices(field)
    metavar = said.metavar or (f"[{'|'.join(choices)}]" if choices else None)
    complete = completion.one_of(choices) if choices else completion.OF_PARAMETERS.get(field.name)
    if said.positional:
        argument = typer.Argument(metavar=metavar, help=text, autocompletion=complete)
        return _in_signature(field.name, kind, argument, default)
    name = said.option or f"--{field.name.replace('_', '-')}"
    return _in_signature(
        field.name, kind, typer.Option(name, metavar=metavar, help=text, autocompletion=complete), default
    )


def _choices(field: Declared) -> tuple[str, ...]:
    """Return the values to choose from, of a parameter or of its elements."""
    kinds = [kind for each in (field.type, *get_args(field.type)) for kind in (each, *get_args(each))]
    values = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    return tuple(value for value in values if value not in field.parameter.not_offered)


def _type_of(field: Declared) -> tuple[object, object]:
    """Return an option's type and default. Choices are strings here; the request refuses an unknown one."""
    if field.parameter.switch is not None:
        return bool, False
    if any(get_origin(kind) is tuple for kind in (field.type, *get_args(field.type))):
        return list[str] | None, None
    return str if get_origin(field.type) is Literal else field.type, field.default


def _in_signature(name: str, kind: object, info: object, default: object) -> inspect.Parameter:
    given = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=given, annotation=Annotated[kind, info])


def _parameters(fields: Sequence[Declared], values: Mapping[str, Any]) -> dict[str, object]:
    """Return the flow's parameters from the options' values."""
    found: dict[str, object] = {}
    for field in fields:
        said = field.parameter
        if said.key:
            found |= _values_of_keys(_variable(said.option), values[_variable(said.option)], _keys(fields, said.option))
            continue
        value = values[field.name]
        if said.switch is not None:
            value = said.switch if value else None
        elif isinstance(value, list) and _choices(field):
            value = [choice.strip() for part in value for choice in part.split(",")]
        if value is not None and value != []:
            found[field.name] = value
    return found


def _values_of_keys(option: str, pairs: Pairs, keys: Sequence[Declared]) -> dict[str, object]:
    what = option.replace("_", " ")
    kinds = {key.name: get_args(key.type)[0] for key in keys}
    found = {}
    for pair in pairs or ():
        key, _, text = pair.partition("=")
        if key not in kinds:
            raise BadInput(
                f"The {what} {pair!r} is unknown.",
                f"Write KEY=VALUE with one of {', '.join(kinds)}.",
                code="option-key-unknown",
            )
        try:
            found[key] = kinds[key](text)
        except ValueError:
            raise BadInput(
                f"The {what} {pair!r} has no valid number.",
                "Write, for example, top_p=0.9.",
                code="option-value-not-valid",
            ) from None
    return found


def _keys(fields: Sequence[Declared], option: str) -> list[Declared]:
    return [field for field in fields if field.parameter.key and field.parameter.option == option]


def _variable(option: str) -> str:
    return option.strip("-").replace("-", "_")
