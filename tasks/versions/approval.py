"""A person's approval of a new champion: in Prefect's UI, where the run pauses, or at the command's own terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal
from uuid import uuid4

from prefect.input import RunInput
from pydantic import Field

from slmops.infra.errors import SlmopsError
from slmops.infra.records import Record
from slmops.infra.storage.model_summary import figures_of
from slmops.infra.storage.registry import CHAMPION
from slmops.infra.storage.version import Version
from slmops.tasks.report.blocks import Block, Paragraph, Strong, Text, table
from slmops.tasks.report.markdown import blocks_to_markdown
from slmops.tasks.report.wording import decimal, megabytes, percent, shown
from slmops.tasks.runs.pause import pause_for
from slmops.tasks.versions.change import Change
from slmops.tasks.versions.refusal import Request, refusal_published
from slmops.tasks.workshop import workshop

PROMOTE: Literal["promote"] = "promote"
KEEP: Literal["keep the champion"] = "keep the champion"


class ApprovalForm(RunInput):
    """The form of a run that waits for approval, and the JSON that its API takes."""

    decision: Literal["keep the champion", "promote"] = Field(KEEP, description="What happens next.")
    by: str = Field("", description="Who decides.", max_length=200)
    note: str = Field("", description="Why; kept in the history of champions.", max_length=2000)


class Approval(Record):
    """The answer of a person, or (not `answered`) that there was none in time."""

    given: bool = False
    by: str = ""
    note: str = ""
    answered: bool = True

    @property
    def sentence(self) -> str:
        """Who decided what, and why."""
        if not self.answered:
            return f"nobody approved it within {workshop().settings.timeout.approval_s / 3600:,.3g} h"
        by, note = f" by {self.by}" if self.by else "", f": {self.note}" if self.note else ""
        return f"{'approved' if self.given else 'declined'}{by}{note}"


class NotApproved(SlmopsError):
    """A person declined a promotion, or nobody approved it in time; the champion stays."""

    code = "not-approved"
    exit_code = 3


Answerer = Callable[[str], Approval]
_answerers: list[Answerer] = []


@contextmanager
def answered_by(answerer: Answerer) -> Iterator[None]:
    """Have runs of this process ask `answerer`, which gets the question in Markdown, instead of pausing."""
    _answerers.append(answerer)
    try:
        yield
    finally:
        _answerers.remove(answerer)


def approved(change: Change) -> Change:
    """Return a change with its approval in the reason. A version that already is the champion needs none.

    A refusal is published as an artifact. Raises `NotApproved`.
    """
    if change.former == change.version.number:
        return change
    approval = ask_approval(change.version)
    reason = f"{change.reason}; {approval.sentence}"
    if approval.given:
        return replace(change, reason=reason)
    request = Request(change.name, change.version.reference, change.reason, change.former)
    with refusal_published(request):
        kept = f"{change.name}@{change.former} stays the champion" if change.former else "There is no champion"
        raise NotApproved(
            f"{change.version.reference} was not promoted: {approval.sentence}. {kept}.",
            f"Ask again, or promote it without approval: slmops promote {change.version.reference}",
        )


def ask_approval(challenger: Version, verdict: str = "") -> Approval:
    """Ask whether a version becomes the champion, with its figures beside the champion's; `verdict` is a comparison's.

    Without an `answered_by` the run pauses until somebody answers in the UI or over the API, at most for
    `settings.timeout.approval_s`.
    """
    question = question_of(challenger, verdict)
    if _answerers:
        return _answerers[-1](question)
    nobody = ApprovalForm(decision=KEEP, by=uuid4().hex)
    answer = pause_for(ApprovalForm, question, nobody, workshop().settings.timeout.approval_s)
    if answer.by == nobody.by:
        return Approval(answered=False)
    return Approval(given=answer.decision == PROMOTE, by=answer.by.strip(), note=answer.note.strip())


def question_of(challenger: Version, verdict: str = "") -> str:
    """Return the question in Markdown, with the figures of both versions."""
    registry, name = challenger.registry, challenger.name
    number = registry.alias(name, CHAMPION)
    champion = None if number is None else registry.version(name, number)
    title = f"Promote {challenger.reference}{f' in place of {champion.reference}' if champion else ''}?"
    versions = [version for version in (champion, challenger) if version]
    figures = [figures_of(version) for version in versions]
    rows: list[tuple[Text, ...]] = [  # a column for each version: the UI's window has room for few
        ("variant", *(each.precision or "-" for each in figures)),
        ("size", *(shown(each.size_bytes, megabytes) for each in figures)),
        ("TTFT (ms)", *(shown(each.ttft_ms, decimal) for each in figures)),
        ("score", *(shown(each.score, percent) for each in figures)),
    ]
    columns = ("", *(f"{version.reference}{' (champion)' * (version is champion)}" for version in versions))
    blocks: list[Block] = [Paragraph(Strong(title)), *table(columns, rows)]
    return blocks_to_markdown([*blocks, Paragraph(verdict)] if verdict else blocks)
