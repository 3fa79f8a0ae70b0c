"""What a run shows in Prefect beside its result."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import httpx
from prefect.logging import get_run_logger

EMPTY_CELL = "\N{EN DASH}"


def shown_rows(rows: Iterable[Mapping[str, str]]) -> list[dict[str, object]]:
    """Return the rows of a table artifact. Prefect's older UI shows a lone hyphen as the mark of a list."""
    return [{title: EMPTY_CELL if cell == "-" else cell for title, cell in row.items()} for row in rows]


@contextmanager
def shown_in_prefect(what: str) -> Iterator[None]:
    """Post artifacts of a stage. Where the server does not take one, the run's log says so, and the run goes on.

    Prefect's client has tried for a minute then.
    """
    try:
        yield
    except httpx.HTTPError as error:
        get_run_logger().warning("%s is not shown in Prefect: %s", what, str(error) or type(error).__name__)
