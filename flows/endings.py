"""What the flows whose runs may end with less than was asked for have in common."""

from typing import Any

from slmops.infra.errors import SlmopsError


class RunEnded(SlmopsError):
    """A run that came to its end, and fell short; `report` says what there is."""

    report: Any
