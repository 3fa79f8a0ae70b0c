"""The errors for users: each says what was wrong, what was found and what to do."""

from slmops.infra.foreign_text import without_passwords

# Characters of a message: what it quotes from a foreign file or a library may have any length.
LONGEST_MESSAGE = 2000
_LONGEST_END = 400


class SlmopsError(Exception):
    """A failure that the user can correct.

    `message` is one sentence on what was wrong and what was found, without passwords of URLs, and with its middle left
    out where it has more than `LONGEST_MESSAGE` characters; `what_to_do` is one sentence on the remedy. `code`
    identifies the fault for programs and tests, and does not change when the sentences are reworded. An error that is
    raised without a code has the code of its class. `exit_code` is the command line's exit status for it.
    """

    code = "failed"
    exit_code = 1

    def __init__(self, message: str, what_to_do: str = "", code: str = "") -> None:
        message, what_to_do = without_passwords(message), without_passwords(what_to_do)
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE - _LONGEST_END - 3]} … {message[-_LONGEST_END:]}"
        super().__init__(message, what_to_do, code)
        self.message = message
        self.what_to_do = what_to_do
        self.code = code or self.code

    def __str__(self) -> str:
        return f"{self.message} {self.what_to_do}".strip()


class BadInput(SlmopsError):
    """The user's input cannot be used; nothing was written."""

    code = "bad-input"
    exit_code = 2


class StageFailed(SlmopsError):
    """A stage started its work and could not finish it."""

    code = "stage-failed"


class PassingFault(StageFailed):
    """A stage failed for a reason that may not recur at the next attempt (killed child, lost connection)."""

    code = "passing-fault"


class DeadlineExceeded(StageFailed):
    """A child process did not end within its deadline and was stopped."""

    code = "deadline-exceeded"


def reason_of(error: BaseException, line: int | None = None) -> str:
    """Return the message of a library's error, in one line without a full stop; its class if it has none.

    `line` selects one of its lines: 0 is the first, -1 the last.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (" ".join(lines) if line is None else lines[line]).rstrip(":. ")
