"""The form of every flow in Prefect's UI, and the JSON that its API takes: names, types, defaults and descriptions.

After an intended change, `python -m tests.flows.test_parameter_schema` records the new form.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate

from slmops.deployments.server.registration import with_plain_fields

RECORDED = Path(__file__).parent / "golden" / "parameter_schema.json"
FLOWS = ("benchmark", "deploy", "gc", "promote", "regate", "retrain", "rollback")


def form(name: str) -> dict[str, Any]:
    """Return a flow's form and description; white space does not count."""
    flow = getattr(import_module(f"slmops.flows.{name}"), name)
    schema = parameter_schema(flow).model_dump_for_openapi()
    for field in schema["properties"].values():
        field["description"] = " ".join(field["description"].split())
        field.pop("position")
    found: dict[str, Any] = json.loads(json.dumps({"flow": " ".join(flow.description.split()), "parameters": schema}))
    return found


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_has_the_recorded_form(name: str) -> None:
    recorded = json.loads(RECORDED.read_text("utf-8"))[name]
    found = form(name)
    assert found["parameters"] == recorded["parameters"]
    assert sorted(found["flow"].split()) == sorted(recorded["flow"].split())  # the order of the parameters may differ


@pytest.mark.parametrize("name", FLOWS)
def test_prefects_form_has_a_plain_field_for_each_parameter_and_its_api_takes_null(name: str) -> None:
    flow = getattr(import_module(f"slmops.flows.{name}"), name)
    schema = parameter_schema(flow).model_dump_for_openapi()
    plain = with_plain_fields(schema)
    assert "null" not in json.dumps([field.get("anyOf", ()) for field in plain["properties"].values()])
    required = dict.fromkeys(schema.get("required", ()), "text")
    nullable = {field: None for field, shown in schema["properties"].items() if shown.get("default", ...) is None}
    validate({**required, **nullable}, plain, raise_on_error=True)
    for field in nullable:
        with pytest.raises(ValidationError):
            validate({**required, field: {"no": "such type"}}, plain, raise_on_error=True)


if __name__ == "__main__":
    RECORDED.write_text(json.dumps({name: form(name) for name in FLOWS}, indent=1) + "\n", "utf-8")
