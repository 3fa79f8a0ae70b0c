"""The form of every flow in Prefect's UI, and the JSON that its API takes: names, types, defaults and descriptions.

After an intended change, `python -m tests.flows.test_parameter_schema` records the new form.
"""

import json
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate

from slmops.deployments.server.registration import with_plain_fields
from slmops.flows.retrain import retrain
from slmops.tasks.choices import CHECKS, RECIPES
from slmops.tasks.request.budget import EXAMPLES as EVERY_LIMIT
from slmops.tasks.request.budget import parse_budget
from slmops.tasks.training.fine_tune import Hyperparameters

EXAMPLES = {"checkpoint": "here", "name": "home", "reference": "home@2", "dataset": "chats.jsonl", "base": "here"}
BOUNDS = ("minimum", "maximum", "exclusiveMinimum")
RECORDED = Path(__file__).parent / "golden" / "parameter_schema.json"
FLOWS = ("benchmark", "deploy", "gc", "promote", "regate", "retrain", "rollback")


def posted(name: str) -> dict[str, Any]:
    """Return the schema by which the API judges a flow's parameters, as `slmops up` sets it."""
    flow = getattr(import_module(f"slmops.flows.{name}"), name)
    return with_plain_fields(parameter_schema(flow).model_dump_for_openapi())


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


def test_a_deploys_form_begins_with_what_most_runs_name_and_says_the_group_of_the_others() -> None:
    titles = [field["title"] for field in posted("deploy")["properties"].values()]
    assert titles[:4] == ["checkpoint", "name", "precisions", "evaluation_file"]
    groups = [title.partition(": ")[0] for title in titles if ": " in title]
    expected = ["Evaluation", "Gate", "Choice", "Build", "Checkpoint", "Registered model"]
    assert [group for group, _ in groupby(groups)] == expected


@pytest.mark.parametrize("name", FLOWS)
def test_prefects_form_has_a_plain_field_for_each_parameter_and_its_api_takes_null(name: str) -> None:
    flow = getattr(import_module(f"slmops.flows.{name}"), name)
    schema = parameter_schema(flow).model_dump_for_openapi()
    plain = with_plain_fields(schema)
    kinds = [field["anyOf"] for field in plain["properties"].values() if "anyOf" in field]
    assert all(options[0].get("enum") and options[-1] == {"type": "null"} for options in kinds)
    required = {field: EXAMPLES.get(field, "text") for field in schema.get("required", ())}
    nullable = {field: None for field, shown in schema["properties"].items() if shown.get("default", ...) is None}
    validate({**required, **nullable}, plain, raise_on_error=True)
    for field in nullable:
        with pytest.raises(ValidationError):
            validate({**required, field: {"no": "such type"}}, plain, raise_on_error=True)


REFUSED: dict[str, list[dict[str, Any]]] = {
    "deploy": [
        {"checkpoint": " "},
        {"name": "My Model"},
        {"precisions": []},
        {"precisions": ["int3"]},
        {"device": "npu"},
        {"scorer": "exact"},
        {"recipes": ["int4-blok128"]},
        {"allow": ["vocabulary"]},
        {"budget": ["max-weight=3"]},
        {"temperature": 2.1},
        {"top_p": 0},
        {"max_kl_divergence": -0.1},
        {"min_output_conformity": 1.1},
        {"max_memory_growth_bytes_per_request": 0.5},
        {"max_cliff_ratio": 1},
        {"training_run": "x" * 2001},
        {"preciions": ["int4"]},
    ],
    "retrain": [{"epochs": 0}, {"learning_rate": 0}, {"precisions": []}, {"dataset": ""}, {"max_quality_loss": 2}],
    "benchmark": [{"lm_eval_limit": 0}],
    "promote": [{"reference": "home"}],
    "rollback": [{"to": 0}, {"name": "Home"}],
    "regate": [{"reference": "home@"}],
    "gc": [{"keep": 0}],
}


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name, each in REFUSED.items() for wrong in each], ids=str
)
def test_prefects_api_refuses_a_wrong_value_before_there_is_a_run(name: str, wrong: dict[str, Any]) -> None:
    schema, right = posted(name), {field: EXAMPLES[field] for field in posted(name).get("required", ())}
    validate(right, schema, raise_on_error=True)
    with pytest.raises(ValidationError):
        validate(right | wrong, schema, raise_on_error=True)


@pytest.mark.parametrize(
    "right",
    [
        {"scorer": ' {"name": "numeric", "absolute_tolerance": 0.5}'},
        {"scorer": "rouge_l"},
        {"budget": EVERY_LIMIT.split(", ")},
        {"budget": ["max_size = 300MB"]},
        {"recipes": list(RECIPES), "allow": list(CHECKS)},
        {"temperature": 0, "top_p": 1, "max_length": 10_000_000},
        {"precisions": ["int4", "int4"], "device": "gpu", "execution_provider": "webgpu"},
    ],
    ids=str,
)
def test_what_a_deploy_accepts_is_accepted(right: dict[str, Any]) -> None:
    validate({"checkpoint": "here", "name": "home"} | right, posted("deploy"), raise_on_error=True)
    parse_budget(right.get("budget", ()))


def test_the_bounds_of_hyperparameters_are_those_of_the_fine_tuning() -> None:
    checked = Hyperparameters.model_json_schema()["properties"]
    shown = parameter_schema(retrain).properties
    for name, field in checked.items():
        bounds = {key: field.get(key, field.get("anyOf", [{}])[0].get(key)) for key in BOUNDS}
        found = {key: shown[name].get(key, shown[name].get("anyOf", [{}])[0].get(key)) for key in BOUNDS}
        assert found == bounds, name


if __name__ == "__main__":
    RECORDED.write_text(json.dumps({name: form(name) for name in FLOWS}, indent=1) + "\n", "utf-8")
