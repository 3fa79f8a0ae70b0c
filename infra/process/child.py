"""The child's side: run one function of `infra` and report to the supervisor.

Started as `python -m infra.process.child MODULE:FUNCTION`. The first line of standard input is the
request (a JSON object); the rest of it is a lifeline: when it closes, the supervisor is gone and the
child ends itself. Standard output carries one JSON message a line; whatever libraries print goes to
standard error, which is the stage's log.
"""

import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from infra.errors import SlmopsError


class Progress(Protocol):
    """Report `done` of `total` steps and what is being done; cheap enough to call in a loop."""

    def __call__(self, done: float, total: float, what: str) -> None: ...


ChildFunction = Callable[[dict[str, Any], Progress], dict[str, Any]]


def _end_with_the_supervisor(lifeline: Any) -> None:
    lifeline.read()
    if os.name == "posix":
        os.killpg(os.getpgrp(), signal.SIGKILL)  # the supervisor started us as the leader of our own group
    os._exit(1)


def _load(target: str) -> ChildFunction:
    module_name, _, function_name = target.partition(":")
    function: ChildFunction = getattr(importlib.import_module(module_name), function_name)
    return function


def main() -> int:
    """Run the function named on the command line; 0 if it returned, 1 if it raised."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # native libraries print to descriptor 1 as well: keep the message channel clean
    sys.stdout = sys.stderr

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_supervisor, args=(sys.stdin.buffer,), daemon=True).start()
    try:
        result = _load(sys.argv[1])(
            request, lambda done, total, what: send({"progress": {"done": done, "total": total, "what": what}})
        )
    except SlmopsError as error:
        traceback.print_exc()
        kind = type(error).__name__
        send({"error": {"kind": kind, "message": error.message, "what_to_do": error.what_to_do}})
        code = 1
    except BaseException as error:
        traceback.print_exc()
        text = str(error).strip() or type(error).__name__
        send({"error": {"kind": "", "message": text.splitlines()[-1], "what_to_do": ""}})
        code = 1
    else:
        send({"result": result})
        code = 0
    sys.stderr.flush()
    # Native runtimes may hang or abort in their static destructors; every result is already sent.
    os._exit(code)


if __name__ == "__main__":
    main()
