"""One line in a record declares a parameter of the flow, with its description, and an option of the command."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
import typer
from prefect import flow
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema

from slmops.deployments.cli.options import Json, asks_for
from slmops.infra.errors import BadInput
from slmops.tasks.request.declaration import Parameter, takes
from tests.support.errors import coded


@dataclass(frozen=True)
class Order:
    """An order for a table."""

    table: Annotated[int, Parameter("Number of the table.", positional=True)]
    dishes: Annotated[tuple[str, ...], Parameter("Dishes to serve.", "Dish; repeatable.", "--dish")] = ("soup",)
    size: Annotated[Literal["small", "large"], Parameter("Size of each dish.")] = "large"
    salt: Annotated[float | None, Parameter("Grams of salt.", option="--spice", key=True)] = None
    peppers: Annotated[int | None, Parameter("Peppers.", option="--spice", key=True)] = None
    service: Annotated[Literal["ours", "self"], Parameter("Who serves.", option="--self-service", switch="self")] = (
        "ours"
    )
    to_go: Annotated[bool, Parameter("Pack it.")] = False


@takes(Order)
def serve(order: Order) -> Order:
    """Serve what was ordered.

    Returns:
        The order.
    """
    return order


def asked(*arguments: str) -> dict[str, Any]:
    """Return the flow's parameters from a command line."""
    found: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @asks_for(Order)
    def command(parameters: dict[str, Any], as_json: Json = False) -> None:
        found.update(parameters, as_json=as_json)

    app(args=list(arguments), standalone_mode=False)
    return found


def test_a_flow_has_the_fields_as_parameters() -> None:
    assert serve(3, to_go=True) == Order(table=3, to_go=True)
    assert Order(**flow(serve).validate_parameters({"table": "3", "dishes": ["bread"]})) == Order(3, dishes=("bread",))
    with pytest.raises(ParameterTypeError):
        flow(serve).validate_parameters({"table": 3, "size": "huge"})
    with pytest.raises(TypeError, match="chairs"):
        serve(3, chairs=4)


def test_its_form_has_types_defaults_and_descriptions() -> None:
    form = parameter_schema(serve)
    assert form.required == ["table"]
    assert {name: field["description"] for name, field in form.properties.items()} == {
        "table": "Number of the table.",
        "dishes": "Dishes to serve.",
        "size": "Size of each dish.",
        "salt": "Grams of salt.",
        "peppers": "Peppers.",
        "service": "Who serves.",
        "to_go": "Pack it.",
    }
    assert form.properties["dishes"]["items"] == {"type": "string"}
    assert form.properties["size"]["enum"] == ["small", "large"]
    assert form.properties["to_go"]["default"] is False
    assert (serve.__doc__ or "").endswith("Returns:\n    The order.")


def test_a_command_has_an_option_for_each_field() -> None:
    assert asked("3") == {"table": 3, "size": "large", "to_go": False, "as_json": False}  # the record has the rest
    found = asked("3", "--dish", "bread", "--dish", "soup", "--spice", "salt=0.5", "--spice", "peppers=2", "--json")
    assert found.items() >= {"dishes": ["bread", "soup"], "salt": 0.5, "peppers": 2, "as_json": True}.items()
    assert (
        asked("3", "--self-service", "--to-go", "--size", "small").items() >= {"service": "self", "to_go": True}.items()
    )


@pytest.mark.parametrize("pair", ["sugar=1", "salt", "salt=much", "peppers=1.5"])
def test_a_key_that_is_unknown_or_has_no_number_is_refused(pair: str) -> None:
    code = "option-key-unknown" if pair == "sugar=1" else "option-value-not-valid"
    with pytest.raises(BadInput, check=coded(code, pair)):
        asked("3", "--spice", pair)
