"""The name of a flow run: the one that somebody typed, else one that says what the run does."""

import re
from collections.abc import Callable

from prefect.context import FlowRunContext

# What Prefect's server and its UI make: two or three words, such as fluffy-otter or tan-23-otter.
MADE_BY_PREFECT = re.compile(r"[a-z0-9]+(-[a-z0-9]+){1,2}")


def run_name(template: str) -> Callable[[], str]:
    """Return a function that names a flow's run by a template over its parameters, unless its name was typed."""

    def name() -> str:
        context = FlowRunContext.get()
        assert context
        typed = context.flow_run.name if context.flow_run else ""
        if typed and not MADE_BY_PREFECT.fullmatch(typed):
            return typed
        return template.format(**(context.parameters or {}))

    return name
