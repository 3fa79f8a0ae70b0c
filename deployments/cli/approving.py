"""The approval of a new champion at a command: in the UI of the server that is set, else at this terminal."""

import getpass
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from slmops.deployments.cli.output import print_note
from slmops.infra.errors import BadInput

if TYPE_CHECKING:
    from slmops.deployments.cli.stages import StageDisplay
    from slmops.tasks.versions.approval import Approval


def require_approver(*, approval: bool) -> None:
    """Raise `BadInput` where nobody could answer: neither a server with a UI nor a terminal."""
    if approval and not os.environ.get("PREFECT_API_URL") and not sys.stdin.isatty():
        raise BadInput(
            "Nobody can approve: no Prefect server is set, and standard input is not a terminal.",
            "Start slmops up, set PREFECT_API_URL, or call the command at a terminal.",
            code="no-approver",
        )


@contextmanager
def answers_to(display: "StageDisplay") -> Iterator[None]:
    """Let a run get its approval: in the UI of the server that is set, whose address is printed, else here.

    Where a server is set, somebody else may be the one who approves.
    """
    from slmops.tasks.versions.approval import answered_by

    if url := os.environ.get("PREFECT_API_URL"):
        display.say(f"The run will wait for approval in Prefect's UI: {url.removesuffix('/api')}/runs")
        yield
        return

    def ask(question: str) -> "Approval":
        with display.aside():
            return ask_here(question)

    with answered_by(ask):
        yield


def ask_here(question: str) -> "Approval":
    """Print a question, and return the answer that is typed; without one the champion stays."""
    from slmops.tasks.versions.approval import Approval

    print_note(f"{question}\nPromote it? [y/N]")  # not by typer: it writes a space to standard output, which is JSON's
    typed = sys.stdin.readline().strip().lower()
    return Approval(given=typed in ("y", "yes"), by=getpass.getuser())
