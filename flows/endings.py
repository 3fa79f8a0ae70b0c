"""The failed end of runs that could not do everything that was requested."""

from typing import Any

from slmops.infra.errors import SlmopsError


class RunEnded(SlmopsError):
    """A run that finished without the requested result; `report` holds its findings."""

    report: Any
