"""The errors that reach a user: each says what was wrong, what was found and what to do."""


class SlmopsError(Exception):
    """A failure that a user can act on.

    `message` is one sentence on what was wrong and what was found; `what_to_do` one on the way out.
    `exit_code` is the command line's exit status for it.
    """

    exit_code = 1

    def __init__(self, message: str, what_to_do: str = "") -> None:
        super().__init__(message, what_to_do)
        self.message = message
        self.what_to_do = what_to_do

    def __str__(self) -> str:
        return f"{self.message} {self.what_to_do}".strip()


class BadInput(SlmopsError):
    """The user's input cannot be used as it stands; nothing was written."""

    exit_code = 2


class StageFailed(SlmopsError):
    """A stage did its work and could not finish it."""


class PassingFault(StageFailed):
    """A stage failed for a reason that may be gone at the next attempt (killed child, lost connection)."""


class DeadlineExceeded(StageFailed):
    """A child process did not end within its deadline and was stopped."""
