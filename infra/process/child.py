"""The child's side: perform calls for the supervisor, and report to it.

Started as `python -m slmops.infra.process.child MODULE:CLASS`; the argument names the first call in lists of processes.
Each line of standard input is a call, a JSON object `{"call": "MODULE:CLASS", "request": {...}, "log_path": str,
"work_dir": str, "is_last": bool}`; after the last one the child ends. The input is also a lifeline: when it closes, the
supervisor has ended and the child ends itself. Standard output carries one JSON message a line; output of libraries
goes to standard error, which is the log of the call.
"""

import gc
import os
import signal
import sys
import traceback
from pathlib import Path

from pydantic import JsonValue

from slmops.infra.errors import SlmopsError
from slmops.infra.process.call import Progress, perform
from slmops.infra.process.channel import Message, listen, message_of, speak
from slmops.infra.process.garbage import give_memory_back, spare_imports


class _Lifeline:
    """Ends this process and all its descendants when the supervisor is gone."""

    def __init__(self) -> None:
        self.is_idle = True

    def end(self) -> None:
        if self.is_idle:
            os._exit(0)
        if os.name == "posix":
            os.killpg(os.getpgrp(), signal.SIGKILL)  # the supervisor started us as the leader of our own group
        os._exit(1)


def main() -> None:
    """Perform each call; the exit status is 0 if the last one was answered."""
    spare_imports()
    send = speak()
    lifeline = _Lifeline()

    def progress(done: float, total: float, what: str) -> None:
        send({"progress": {"done": done, "total": total, "what": what}})

    for call in listen(lifeline.end):
        lifeline.is_idle, loaded = False, len(sys.modules)
        _log_to(call["log_path"])
        os.chdir(call["work_dir"])
        answer = _answer(call["call"], call["request"], progress)
        sys.stderr.flush()
        if not call["is_last"]:
            _collect(has_imported=len(sys.modules) > loaded)
        os.chdir(Path(call["log_path"]).parent)  # the call's folder is removed now
        lifeline.is_idle = not call["is_last"]
        send(answer)
        if call["is_last"]:
            # Native runtimes may hang or abort in their static destructors; every result is already sent.
            os._exit(0 if "result" in answer else 1)


def _log_to(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _collect(*, has_imported: bool) -> None:
    gc.collect()
    if has_imported:
        gc.freeze()  # torch's modules have a million objects: later collections would take 0.3 s to look at them all
    give_memory_back()


def _answer(target: str, request: JsonValue, progress: Progress) -> Message:
    try:
        return {"result": perform(target, request, progress)}
    except SlmopsError as error:
        traceback.print_exc()
        return message_of(error)
    except BaseException as error:
        traceback.print_exc()
        text = str(error).strip() or type(error).__name__
        return {"error": {"kind": "", "message": text.splitlines()[-1], "what_to_do": ""}}


if __name__ == "__main__":
    main()
