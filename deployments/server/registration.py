"""What `slmops up` registers with a Prefect server: the deployments of `prefect.yaml`, and those of each pool."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import yaml

from slmops.infra.errors import BadInput
from slmops.infra.server_settings import PREFECT_TAG
from slmops.tasks.request.values import GROUP

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Schedule

PREFECT_FILE = Path(__file__).parents[1] / "prefect.yaml"

# Each run of a deployment without a pull step copies the folder in which it was registered, or the worker's own. With
# this step a run stays in the empty folder that the worker makes for it: its imports are installed packages.
PULL_STEPS = [{"prefect.deployments.steps.set_working_directory": {"directory": "."}}]


@dataclass(frozen=True)
class Registered:
    """A deployment by its full name, `FLOW/DEPLOYMENT`, and whether it was made, changed or left unchanged."""

    name: str
    outcome: str


def read_deployments(path: Path = PREFECT_FILE) -> list[dict[str, Any]]:
    """Return the entries of a prefect.yaml, with their first schedules; raises `BadInput` when it cannot be read."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
        schedules = content.get("definitions", {}).get("schedules", {})
        first = {name: {"schedules": list(found)} for name, found in schedules.items()}
        return [{**entry, **first.get(entry["name"], {})} for entry in content["deployments"]]
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}.", "Correct it, or install slmops again.") from None


def full_name(entry: Mapping[str, object]) -> str:
    """Return a deployment's name in Prefect's API: flows and their deployments have the same names."""
    return f"{entry.get('flow', entry['name'])}/{entry['name']}"


def variant_entries(pool: str) -> list[dict[str, Any]]:
    """Return the deployments with which a pool's workers build and measure variants for deploys on other machines.

    They are named like their pool, which `SLMOPS_WORKER__POOL` and `__MEASURE_POOL` name.
    """
    return [
        {
            "flow": f"{what}-variant",
            "name": pool,
            "entrypoint": f"slmops.flows.on_worker.{what}_variant_on_worker",
            "description": f"{what.capitalize()} one variant of a deploy. Deploys start it.",
            "version": package_version(),
            "tags": [PREFECT_TAG],
            "work_pool": {"name": pool},
        }
        for what in ("build", "measure")
    ]


def register_deployments(entries: Sequence[dict[str, Any]]) -> list[Registered]:
    """Register deployments; one that the server already has in this version, with this form, is not changed.

    Any other is updated, and keeps its schedules and the defaults of its parameters, because users may change them.
    Raises `BadInput` for a schedule that Prefect refuses.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.exceptions import ObjectNotFound

    done = []
    with get_client(sync_client=True) as client:
        for entry in entries:
            name = full_name(entry)
            try:
                known = client.read_deployment_by_name(name)
            except ObjectNotFound:
                known = None
            form = form_of(entry["entrypoint"])
            wanted = (entry["version"], entry["entrypoint"], PULL_STEPS, form)
            found = known and (known.version, known.entrypoint, known.pull_steps, known.parameter_openapi_schema)
            if known and found == wanted and not known.job_variables:
                done.append(Registered(name, "unchanged"))
                continue
            deployment = deployment_of(entry, with_schedules=known is None)
            if known:
                kept = {key: value for key, value in known.parameters.items() if key in form["properties"]}
                deployment.parameters = {**deployment.parameters, **kept}
            made = cast(UUID, deployment.apply())
            client.update_deployment(made, DeploymentUpdate(parameter_openapi_schema=form))
            done.append(Registered(name, "updated" if known else "created"))
    return done


def form_of(entrypoint: str) -> dict[str, Any]:
    """Return the JSON schema of a flow's parameters: Prefect makes its form of it, and checks each run by it."""
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(load_flow_from_entrypoint(entrypoint)).model_dump(mode="json", exclude_unset=True)
    return with_plain_fields(schema)


def with_plain_fields(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a flow's parameters with one plain type for each that may be null, and no other parameters.

    A parameter's title begins with its group.

    Prefect's form shows a field for a plain type, and only "Property is type None" for a type or null. The API takes
    null for such a field all the same, as long as the schema has no default for it. It refuses a misspelt parameter;
    in a form of `prefect deploy`, which cannot say so, the run fails.
    """
    plain = {name: _in_group(_plain(field)) for name, field in schema.get("properties", {}).items()}
    return {**schema, "properties": plain, "additionalProperties": False}


def _plain(field: dict[str, Any]) -> dict[str, Any]:
    types: list[dict[str, Any]] = [option for option in field.get("anyOf", ()) if option != {"type": "null"}]
    if field.get("default", ...) is not None or not types or "$ref" in types[0]:
        return field
    kept = {key: value for key, value in field.items() if key not in ("anyOf", "default")}
    is_plain = len(types) == 1 and "enum" not in types[0]  # a list of choices would refuse null
    return kept | (types[0] if is_plain else {"anyOf": field["anyOf"]})


def _in_group(field: dict[str, Any]) -> dict[str, Any]:
    """Return a field whose title begins with its group.

    Prefect's form would show a group of its own only for a parameter that is an object, and so under another name.
    """
    kept = {key: value for key, value in field.items() if key != GROUP}
    return kept | {"title": f"{field[GROUP]}: {field['title']}"} if GROUP in field else kept


def deployment_of(entry: dict[str, Any], *, with_schedules: bool = True) -> "RunnerDeployment":
    """Return Prefect's deployment of an entry of prefect.yaml; raises `BadInput` for a schedule that is not valid."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.deployments.runner import RunnerDeployment
    from prefect.runner.storage import LocalStorage

    class Installed(LocalStorage):
        def to_pull_step(self) -> list[dict[str, Any]]:  # type: ignore[override]  # which Prefect takes too
            return PULL_STEPS

    limit = entry.get("concurrency_limit")
    deployment = RunnerDeployment.from_entrypoint(
        entrypoint=entry["entrypoint"],
        name=entry["name"],
        schedules=[schedule_of(schedule, entry["name"]) for schedule in entry.get("schedules", ())]
        if with_schedules
        else None,
        concurrency_limit=ConcurrencyLimitConfig.model_validate(limit) if limit else None,
        parameters=dict(entry.get("parameters", {})),
        description=entry.get("description"),
        tags=list(entry["tags"]),
        version=entry["version"],
        work_pool_name=entry["work_pool"]["name"],
        job_variables={},
    )
    deployment.storage = Installed(".")
    return deployment


def schedule_of(schedule: dict[str, Any], name: str) -> "Schedule":
    """Return Prefect's schedule; raises `BadInput` for a cron or a time zone that is not valid."""
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.schedules import Cron
    from pydantic import ValidationError

    options = {key: value for key, value in schedule.items() if key != "cron"}
    try:
        made = Cron(schedule["cron"], **options)
        CronSchedule(cron=schedule["cron"], timezone=schedule.get("timezone"))  # checks the time zone too
    except (ValidationError, ValueError) as error:
        fault = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise BadInput(
            f"The schedule {schedule.get('cron')!r} of the deployment {name!r} is not valid: {fault}.",
            "Write five fields and a time zone, such as 0 3 * * 0 and Europe/Berlin.",
            code="schedule-not-valid",
        ) from None
    return made


def package_version() -> str:
    """Return the version of slmops, which is that of its deployments."""
    return metadata.version("slmops")
