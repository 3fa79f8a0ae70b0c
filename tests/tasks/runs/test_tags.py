"""The tags of a run, by its flow's parameters, on a real server."""

from typing import Any

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.tasks.runs import tags
from slmops.tasks.runs.stage import ends_by_its_errors
from tests.support.prefect_api import query

PARAMETERS: list[tuple[dict[str, Any], set[str]]] = [
    ({"name": "home", "precisions": ("int4", "int8")}, {"model:home", "precision:int4", "precision:int8"}),
    ({"reference": "home@2", "precision": "fp16"}, {"model:home", "precision:fp16"}),
    ({"name": "home", "precisions": None}, {"model:home"}),
    ({"keep": 5}, set()),
]


@pytest.mark.parametrize(("parameters", "expected"), PARAMETERS)
def test_the_parameters_say_which_model_a_run_is_of(parameters: dict[str, Any], expected: set[str]) -> None:
    assert {*tags._tags_of(parameters)} == expected


def test_a_run_keeps_its_own_tags_and_gets_those_of_its_model(server: str) -> None:
    @flow(name="tagged")
    @ends_by_its_errors
    def tagged(name: str) -> None:
        tags.tag_run("champion")

    from prefect import tags as given

    with temporary_settings({PREFECT_API_URL: server}), given("team-a"):
        tagged("home")
    (run,) = query(server, "flow_runs", flows={"name": {"any_": ["tagged"]}})
    assert sorted(run["tags"]) == ["champion", "model:home", "slmops", "team-a"]
