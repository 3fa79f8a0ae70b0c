"""The gate's limits that a run's parameters name: they are the run's own, whatever the environment of its process says.

A deployment can have them as defaults of its parameters. Its runs are then judged alike by every worker.
"""

from collections.abc import Mapping

from pydantic import ValidationError

from slmops.infra.errors import BadInput
from slmops.infra.settings import GateSettings, Settings


def named_limits(parameters: Mapping[str, object]) -> dict[str, object]:
    """Return the gate's limits among a run's parameters, by name, without those that are not given."""
    return {name: parameters[name] for name in GateSettings.model_fields if parameters.get(name) is not None}


def with_limits(settings: Settings, parameters: Mapping[str, object]) -> Settings:
    """Return settings whose gate has the limits that a run's parameters name; the others stay the settings' own.

    Raises `BadInput` for a limit out of its bounds.
    """
    try:
        gate = GateSettings.model_validate({**settings.gate.model_dump(), **named_limits(parameters)})
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}, found {fault['input']!r}" for fault in error.errors())
        raise BadInput(
            f"Gate thresholds are not valid: {faults}.", "Correct them.", code="gate-threshold-not-valid"
        ) from None
    return settings.model_copy(update={"gate": gate})
