"""The form that Prefect's UI makes of a flow, and the JSON that its API takes."""

from typing import Any

import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema

from slmops.flows.benchmark import benchmark
from slmops.flows.deploy import deploy
from slmops.flows.promote import promote
from slmops.flows.regate import regate
from slmops.flows.retrain import retrain
from slmops.flows.rollback import rollback


@pytest.mark.parametrize("flow", [benchmark, deploy, promote, regate, retrain, rollback], ids=lambda flow: flow.name)
def test_every_parameter_is_flat_and_described(flow: Flow[..., Any]) -> None:
    schema = parameter_schema(flow).model_dump()
    assert schema["properties"]
    for name, parameter in schema["properties"].items():
        assert parameter.get("description"), f"{name} has no description"
        assert "$ref" not in parameter


def test_choices_are_enumerated_and_defaults_are_given() -> None:
    schema = parameter_schema(deploy).model_dump()
    properties = schema["properties"]
    assert schema["required"] == ["checkpoint", "name"]
    assert properties["precisions"]["items"]["enum"] == ["fp16", "int8", "int4"]
    assert list(properties["precisions"]["default"]) == ["fp16", "int8", "int4"]
    assert properties["execution_provider"]["enum"] == ["cpu", "cuda", "dml", "webgpu"]
    assert parameter_schema(retrain).model_dump()["properties"]["method"]["enum"] == ["lora", "full"]
