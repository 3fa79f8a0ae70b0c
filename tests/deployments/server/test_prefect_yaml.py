"""deployments/prefect.yaml: what it names can be imported, and Prefect's forms of it are described throughout."""

from importlib import metadata
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from slmops.deployments.server.registration import (
    PREFECT_FILE,
    PULL_STEPS,
    deployment_of,
    full_name,
    read_deployments,
    schedule_of,
    variant_entries,
)
from slmops.infra.errors import BadInput
from tests.support.errors import coded

ENTRIES = read_deployments()
EVERY = [*ENTRIES, *variant_entries("slmops")]
NAMES = {"deploy", "retrain", "benchmark", "promote", "rollback", "gc"}


def test_it_has_the_agreed_deployments() -> None:
    assert {entry["name"] for entry in ENTRIES} == NAMES


@pytest.mark.parametrize("entry", EVERY, ids=full_name)
def test_an_entry_is_complete_and_its_flow_can_be_imported(entry: dict[str, Any]) -> None:
    made = deployment_of(entry)
    assert made.full_name == full_name(entry)
    assert made.version == metadata.version("slmops")
    assert made.description
    assert "slmops" in made.tags
    assert made.job_variables == {}  # which no locked work pool takes
    # Without a step, each run would copy the folder that `slmops up` was started in.
    assert made.storage and made.storage.to_pull_step() == PULL_STEPS


def test_prefects_own_tools_register_the_same_pull_step() -> None:
    assert yaml.safe_load(PREFECT_FILE.read_text("utf-8"))["pull"] == PULL_STEPS


@pytest.mark.parametrize("entry", EVERY, ids=full_name)
def test_every_field_of_the_form_is_described(entry: dict[str, Any]) -> None:
    fields = parameter_schema(load_flow_from_entrypoint(entry["entrypoint"])).properties
    assert fields
    assert [name for name, field in fields.items() if not field.get("description")] == []
    assert set(entry.get("parameters", {})) <= set(fields)
    for schedule in entry.get("schedules", ()):
        assert set(schedule.get("parameters", {})) <= set(fields)


def test_choices_are_enumerations_in_the_form() -> None:
    fields = parameter_schema(load_flow_from_entrypoint("slmops.flows.deploy.deploy")).properties
    assert fields["precisions"]["items"]["enum"] == ["fp16", "int8", "int4"]
    assert fields["device"]["enum"] == ["cpu", "gpu"]  # npu always fails
    assert fields["execution_provider"]["enum"] == ["cpu", "cuda", "dml", "webgpu"]


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if "schedules" in entry], ids=full_name)
def test_a_schedule_has_a_time_zone_and_a_name(entry: dict[str, Any]) -> None:
    for schedule in entry["schedules"]:
        assert schedule["timezone"]
        assert schedule_of(schedule, entry["name"]).slug


def test_a_limit_defines_what_happens_to_a_second_run() -> None:
    limits = {entry["name"]: deployment_of(entry).concurrency_options for entry in ENTRIES}
    found = {name: one.collision_strategy for name, one in limits.items() if one}
    assert found["gc"] == found["rollback"] == ConcurrencyLimitStrategy.CANCEL_NEW
    assert found["benchmark"] == found["promote"] == ConcurrencyLimitStrategy.ENQUEUE


@pytest.mark.parametrize(
    ("schedule", "fault"),
    [
        ({"cron": "99 * * * *", "timezone": "UTC"}, "99 * * * *"),
        ({"cron": "every day", "timezone": "UTC"}, "every day"),
        ({"cron": "0 3 * * *", "timezone": "Mars/Base"}, "Mars/Base"),
    ],
)
def test_a_schedule_that_is_not_valid_is_refused_by_name(schedule: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadInput, check=coded("schedule-not-valid", "'gc'")) as refused:
        schedule_of(schedule, "gc")
    assert fault in str(refused.value)


def test_prefect_still_admits_a_sqlalchemy_under_which_it_schedules_nothing() -> None:
    (wanted,) = [
        requirement
        for requirement in map(Requirement, metadata.requires("prefect") or ())
        if requirement.name == "sqlalchemy"
    ]
    assert "2.1.9" in wanted.specifier, "Prefect has a bound of its own now: remove ours from pyproject.toml."
