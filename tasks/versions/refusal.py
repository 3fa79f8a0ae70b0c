"""Why a version did not become the champion, as a Prefect artifact."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_logger

from slmops.infra.errors import SlmopsError
from slmops.tasks.report.blocks import Code, Heading, Text, table
from slmops.tasks.report.markdown import blocks_to_markdown
from slmops.tasks.runs.stage import stage

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Request:
    """A request for another champion: the name, what was requested (`NAME@VERSION` or the like), and its reason.

    `former` is the champion at that time, if one is known.
    """

    name: str
    reference: str
    reason: str
    former: int | None = None


@contextmanager
def refusal_published(request: Request) -> Iterator[None]:
    """Publish why a request is refused, whatever step refuses it, and let that error pass.

    A refusal that cannot be published is a warning in the run's log: the caller gets the refusal itself in any case.
    """
    try:
        yield
    except SlmopsError as refusal:
        try:
            publish_refusal(request, refusal)
        except Exception as fault:
            _logger.warning("The refusal could not be posted as an artifact: %s", fault)
        raise


@stage("publish refusal", run_name="refused-{request.name}")
def publish_refusal(request: Request, refusal: SlmopsError) -> None:
    """Post why a request was refused as a Markdown artifact."""
    rows: list[tuple[Text, Text]] = [
        ("requested", request.reference),
        ("champion", f"{request.name}@{request.former}" if request.former else "-"),
        ("reason of the request", Code(request.reason) if request.reason else "-"),
        ("refused because", refusal.message),
        ("what to do", refusal.what_to_do or "-"),
        ("code", Code(refusal.code)),
    ]
    title = Heading(f"{request.reference}: refused", 1)
    markdown = blocks_to_markdown([title, *table(("what", "value"), rows)])
    create_markdown_artifact(markdown=markdown, key=f"slmops-promotion-{request.name}", description=refusal.message)
