"""The child's side of endurance: long use and difficult input, for any runtime that answers conversations.

The child may die at any step. Therefore it writes every step to a journal before the step begins and after it has
ended. The supervisor's side reads there which step was interrupted.
"""

import faulthandler
import gc
import itertools
import json
import time
import traceback
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TextIO

import psutil
from pydantic import JsonValue

from slmops.infra.errors import SlmopsError, StageFailed, reason_of
from slmops.infra.process.call import Call, Progress
from slmops.infra.process.garbage import give_memory_back
from slmops.infra.records import AbsolutePath, Json, Record

Messages = Sequence[dict[str, str]]

# 13 s of work on two cores, where a model of 0.5 B parameters processes 80 tokens a second. A longer text is rendered
# and tokenized whole, and cut for the model; the measurement has the longer prompts.
MAX_PROMPT_TOKENS = 1024
DETAIL_CHARACTERS = 200
LONG_USE = "long use"  # the soak's name among the steps


class OpenedModel(Protocol):
    """A model that a runtime has loaded; its methods raise whatever the runtime raises."""

    context_length: int

    def count_prompt_tokens(self, messages: Messages) -> int:
        """Length of the prompt that the runtime makes of a conversation."""

    def answer(self, messages: Messages, max_new_tokens: int) -> str:
        """Text of the greedy answer. The runtime itself refuses a prompt that does not fit the context."""

    def takes_for_control_token(self, text: str, token_id: int) -> bool:
        """Whether the text of a control token inside a user's message becomes that token."""


class TypedInput(Record):
    """A difficult conversation; `control_tokens` are (text, id) of the control tokens that a user typed in it."""

    name: str
    messages: tuple[dict[str, str], ...]
    control_tokens: tuple[tuple[str, int], ...] = ()


class Endure(Call[None]):
    """Run the soak on a model folder in a runtime, then the edge inputs; the journal has the results.

    `conversations` (at least one) are cycled over, and the first is the ordinary request; `requests` 0: no soak;
    `new_tokens` at most, per answer. The process ends itself when one step takes longer than `step_deadline_s`.
    `cache_dir` is empty, for a runtime that writes beside the model; `journal` is a file to append to.
    """

    model_dir: AbsolutePath
    cache_dir: AbsolutePath
    threads: int
    conversations: tuple[tuple[dict[str, str], ...], ...]
    requests: int
    new_tokens: int
    edge_inputs: tuple[TypedInput, ...]
    step_deadline_s: float
    journal: AbsolutePath


def endure(model: OpenedModel, call: Endure, progress: Progress) -> None:
    """Run the soak on an opened model, then the edge inputs.

    The journal is JSON Lines: `{"begun": name, "request": int or null, "at": time.time()}` before each step;
    `{"rss_bytes": [int]}` after a soak that ended; `{"outcome": {...}}`, the fields of
    `EdgeInputOutcome` of tasks/exams/endurance.py, per input, and for a soak in which a request was refused;
    `{"note": text}`.

    Raises `StageFailed` when the model does not answer an ordinary request before the first edge input.
    """
    give_memory_back()  # a child that keeps freed memory would keep the weights' first form, 1 GB of 0.5 B in fp16
    requests, new_tokens = call.requests, call.new_tokens
    total = requests + len(call.edge_inputs)
    with call.journal.open("a", encoding="utf-8", newline="\n") as file:
        journal = _Journal(file, call.step_deadline_s)
        if requests:
            turns = itertools.islice(itertools.cycle(call.conversations), requests)
            _soak(model, list(turns), new_tokens, journal, lambda done: progress(done, total, LONG_USE))
        if call.edge_inputs:
            ordinary = _OrdinaryRequest(model, call.conversations[0], new_tokens, journal)
            for done, edge_input in enumerate(call.edge_inputs, requests):
                progress(done, total, f"edge input: {edge_input.name}")
                journal.write({"outcome": _try_edge_input(model, edge_input, new_tokens, ordinary, journal)})
    progress(total, total, "exercised")


class _Journal:
    def __init__(self, file: TextIO, step_deadline_s: float) -> None:
        self._file = file
        self._step_deadline_s = step_deadline_s

    def write(self, line: Json) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()  # handed to the operating system, so it survives a crash of this process

    @contextmanager
    def step(self, name: str, request: int | None = None) -> Iterator[None]:
        self.write({"begun": name, "request": request, "at": time.time()})
        # A watchdog in C: native code that hangs may hold the GIL forever.
        faulthandler.dump_traceback_later(self._step_deadline_s, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _soak(
    model: OpenedModel,
    turns: Sequence[Messages],
    new_tokens: int,
    journal: _Journal,
    on_request: Callable[[int], None],
) -> None:
    process = psutil.Process()
    rss_bytes = array("q", [0] * len(turns))  # its own memory is allocated before the first request
    gc.collect()
    gc.freeze()  # what the imports made: looking at it after each request would take longer than a short answer
    for index, messages in enumerate(turns):
        on_request(index)
        with journal.step(LONG_USE, index + 1):
            try:
                model.answer(messages, new_tokens)
            except Exception as error:  # a runtime may raise anything; the process is still alive
                detail = f"request {index + 1} of {len(turns)}: {_shown(_reason(error))}"
                journal.write({"outcome": _outcome(LONG_USE, "refused", detail, alive=False)})
                return
        gc.collect()  # Python's own garbage must not count as a leak of the runtime
        rss_bytes[index] = process.memory_info().rss
    journal.write({"rss_bytes": [*rss_bytes]})


def _outcome(name: str, outcome: str, detail: str, **further: JsonValue) -> Json:
    return {"name": name, "outcome": outcome, "detail": detail, **further}


class _OrdinaryRequest:
    """An ordinary conversation. Its greedy answer stays the same as long as the runtime works."""

    def __init__(self, model: OpenedModel, messages: Messages, new_tokens: int, journal: _Journal) -> None:
        self._model, self._messages, self._new_tokens = model, messages, new_tokens
        try:
            self._expected = {self._ask(), self._ask()}
        except Exception as error:
            raise StageFailed(
                f"The model does not answer an ordinary request: {_reason(error)}.", "See the stage's log."
            ) from error
        if len(self._expected) > 1:
            journal.write({"note": "Greedy answers to the same request differ here, so any answer counts as alive."})

    def _ask(self) -> str:
        return self._model.answer(self._messages, self._new_tokens)

    def is_answered_as_before(self) -> bool:
        try:
            answer = self._ask()
        except Exception:
            traceback.print_exc()  # to the stage's log
            return False
        return len(self._expected) > 1 or answer in self._expected


def _try_edge_input(
    model: OpenedModel, edge_input: TypedInput, new_tokens: int, ordinary: _OrdinaryRequest, journal: _Journal
) -> Json:
    with journal.step(edge_input.name):
        messages, prompt_tokens = _fitting(model, edge_input.name, edge_input.messages, journal)
        started = time.perf_counter()
        try:
            outcome, detail = "answered", model.answer(messages, new_tokens)
        except Exception as error:  # a runtime may raise anything: it refused, and the process is still alive
            outcome, detail = "refused", _reason(error)
        wall_ms = 1000 * (time.perf_counter() - started)
        return _outcome(
            edge_input.name,
            outcome,
            _shown(detail),
            prompt_tokens=prompt_tokens,
            alive=ordinary.is_answered_as_before(),
            control_tokens=_control_tokens(model, edge_input.control_tokens, journal),
            wall_ms=wall_ms,
        )


def _fitting(model: OpenedModel, name: str, messages: Messages, journal: _Journal) -> tuple[Messages, int | None]:
    """Return the conversation and its prompt's length. The last message is cut if it takes too long to process.

    A prompt longer than the context is not cut, because the runtime should refuse it. The length is None if the runtime
    does not render the prompt.
    """
    text = messages[-1]["content"] if messages else ""
    try:
        prompt_tokens = model.count_prompt_tokens(messages)
        if "\0" in text and prompt_tokens < model.count_prompt_tokens(_ending(messages, text.replace("\0", ""))):
            journal.write({"note": "Text after a NUL character in a message is dropped without an error."})
        if prompt_tokens <= model.context_length:
            kept = text
            while prompt_tokens > MAX_PROMPT_TOKENS and kept:
                kept = kept[: len(kept) * MAX_PROMPT_TOKENS // prompt_tokens]
                prompt_tokens = model.count_prompt_tokens(_ending(messages, kept))
            if kept != text:
                journal.write({"note": f"{name}: cut to {len(kept):,} of {len(text):,} characters to save time."})
                messages = _ending(messages, kept)
    except Exception:
        traceback.print_exc()  # to the stage's log; the runtime still gets the request
        return messages, None
    return messages, prompt_tokens


def _ending(messages: Messages, text: str) -> Messages:
    return [*messages[:-1], {**messages[-1], "content": text}]


def _control_tokens(model: OpenedModel, typed: Sequence[tuple[str, int]], journal: _Journal) -> bool | None:
    if not typed:
        return None
    taken = [text for text, token_id in typed if model.takes_for_control_token(text, token_id)]
    if taken:
        journal.write({"note": f"Typed by a user, these become control tokens: {' '.join(taken)}."})
    return bool(taken)


def _reason(error: Exception) -> str:
    return error.message.rstrip(".") if isinstance(error, SlmopsError) else reason_of(error)


def _shown(text: str) -> str:
    """The beginning of a text on one line; characters that are not printable are escaped as in Python."""
    beginning = text[:DETAIL_CHARACTERS]
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in beginning)
