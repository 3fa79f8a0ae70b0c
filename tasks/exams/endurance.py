"""Endurance: soak test and edge inputs of a variant, in each runtime that may serve it."""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import FiniteFloat

from slmops.infra.checkpoints.folder import read_chat_template, read_json
from slmops.infra.errors import StageFailed
from slmops.infra.foundry.calls import EndureInFoundry
from slmops.infra.genai.calls import EndureInGenai
from slmops.infra.process.call import OnProgress
from slmops.infra.process.channel import keeping_memory
from slmops.infra.process.endurance import LONG_USE, Endure, TypedInput
from slmops.infra.records import Json, Record, later_field
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.manifest import digest_of as digest_of_json
from slmops.infra.storage.version import Variant
from slmops.tasks.exams.estimates import DRIFT_BLOCKS, Estimate, drift
from slmops.tasks.exams.exam import Bench, Exam
from slmops.tasks.questions.edge_inputs import MAX_CONTROL_TOKENS, ControlToken, EdgeInput, edge_inputs
from slmops.tasks.questions.evaluation_set import EvaluationRow, digest_of, plain_rows
from slmops.tasks.workshop import Workshop, workshop

Runtime = Literal["genai", "foundry"]
# full: every edge input; short: those whose outcome depends on the weights.
Extent = Literal["full", "short"]

CALLS: dict[Runtime, type[Endure]] = {"genai": EndureInGenai, "foundry": EndureInFoundry}
PACKAGES: dict[Runtime, tuple[str, ...]] = {
    "genai": ("onnxruntime", "onnxruntime-genai"),
    "foundry": ("foundry-local-sdk", "onnxruntime", "onnxruntime-genai-core"),
}
MIN_WARMUP_REQUESTS = 8
MAX_RESTARTS = 3
# One step's share of the stage's deadline, so that several inputs may hang and time is left for the others.
STEP_DEADLINE_SHARE = 1 / 6


class MemoryGrowth(Record):
    """Resident memory after each request of a soak, in bytes, and the growth fitted after the warm-up."""

    rss_bytes: tuple[int, ...]
    warmup_requests: int
    bytes_per_request: Estimate


class EdgeInputOutcome(Record):
    """The outcome of one edge input: an answer, a clean error, or a dead process.

    `detail` is the beginning of the answer or the error. `alive` says whether the runtime answered an ordinary request
    afterwards as it did before. `control_tokens` says whether control tokens in a user's text reached the model as
    control tokens; None for other inputs. `wall_ms` is how long the answer or the error took.
    """

    name: str
    outcome: Literal["answered", "refused", "crashed"]
    detail: str
    prompt_tokens: int | None
    alive: bool
    control_tokens: bool | None = None
    wall_ms: FiniteFloat | None = None

    @property
    def handled(self) -> bool:
        """Whether the input ended as it should."""
        return self.outcome != "crashed" and self.alive


class Endurance(Record):
    """A variant's soak and edge inputs in one runtime; `memory` is None if the soak did not end.

    A soak that did not end is among `edge_inputs` as well, under the name of
    `slmops.infra.process.endurance.LONG_USE`: its input is ordinary, and is not handled. The inputs of a short `extent`
    are those that depend on the weights.
    """

    runtime: Runtime
    extent: Extent = later_field("full")
    memory: MemoryGrowth | None
    edge_inputs: tuple[EdgeInputOutcome, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    wall_s: FiniteFloat


def memory_growth(rss_bytes: Sequence[int]) -> MemoryGrowth | None:
    """Fit the growth of resident memory over the requests of a soak; None for fewer than 16.

    The first third, at least 8 requests, is warm-up: the runtime's buffers grow to the longest request.
    """
    if _block_requests(len(rss_bytes)) == 0:
        return None
    warmup = _warmup_requests(len(rss_bytes))
    return MemoryGrowth(rss_bytes=tuple(rss_bytes), warmup_requests=warmup, bytes_per_request=drift(rss_bytes[warmup:]))


def _warmup_requests(requests: int) -> int:
    return max(MIN_WARMUP_REQUESTS, requests // 3)


def _block_requests(requests: int) -> int:
    """How many requests of a soak are one block of `slmops.tasks.exams.estimates.drift`."""
    return max(0, requests - _warmup_requests(requests)) // DRIFT_BLOCKS


def soak_conversations(requests: int, conversations: int) -> int:
    """How many of the conversations, at least one, a soak cycles over.

    Longer prompts take more memory. Therefore every block of requests has each conversation equally often, so that
    differences between conversations do not count as growth.
    """
    block = _block_requests(requests)
    return max((count for count in range(1, min(block, conversations) + 1) if block % count == 0), default=1)


def control_tokens(model_dir: Path) -> tuple[ControlToken, ...]:
    """Special tokens of a model folder's tokenizer, at most 8: those in its chat template come first."""
    path = model_dir / "tokenizer.json"
    added = read_json(path).get("added_tokens", []) if path.is_file() else []
    special = [ControlToken(token["content"], token["id"]) for token in added if token.get("special")]
    template = read_chat_template(model_dir) or ""
    written = sorted(
        (token for token in special if token.text in template), key=lambda token: template.index(token.text)
    )
    others = [token for token in special if token not in written]
    return tuple([*written, *others][:MAX_CONTROL_TOKENS])


class _Course:
    """The remaining inputs, and the results so far."""

    def __init__(self, requests: int, inputs: Sequence[EdgeInput]) -> None:
        self.requests, self.edge_inputs = requests, list(inputs)
        self.total = self.steps
        self.rss_bytes: tuple[int, ...] = ()
        self.outcomes: list[EdgeInputOutcome] = []
        self.notes: list[str] = []

    @property
    def steps(self) -> int:
        return self.requests + len(self.edge_inputs)

    @property
    def names(self) -> list[str]:
        """The names of the remaining inputs."""
        return [LONG_USE] * bool(self.requests) + [edge_input.name for edge_input in self.edge_inputs]

    def read(self, journal: Path) -> dict[str, Any] | None:
        """Read a child's journal; returns the step that began and did not end."""
        under_way: dict[str, Any] | None = None
        text = journal.read_text("utf-8") if journal.is_file() else ""
        whole_lines = text.rpartition("\n")[0].splitlines()  # the child may have died while writing
        for line in map(json.loads, whole_lines):
            if "begun" in line:
                under_way = line
            elif "rss_bytes" in line:
                self.rss_bytes, self.requests, under_way = tuple(line["rss_bytes"]), 0, None
            elif "outcome" in line:
                self._ended(EdgeInputOutcome(**line["outcome"]))
                under_way = None
            else:
                self._note(line["note"])
        return under_way

    def crashed(self, step: dict[str, object], reason: str) -> None:
        """Record that a child died in a step."""
        where = f"request {step['request']} of {self.requests}: " if step["request"] else ""
        self._ended(
            EdgeInputOutcome(
                name=step["begun"], outcome="crashed", detail=where + reason, prompt_tokens=None, alive=False
            )
        )

    def _ended(self, outcome: EdgeInputOutcome) -> None:
        self.outcomes.append(outcome)
        if outcome.name == LONG_USE:
            self.requests = 0
        self.edge_inputs = [edge_input for edge_input in self.edge_inputs if edge_input.name != outcome.name]

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def examine_endurance(
    settings: Settings,
    bench: Bench,
    conversations: Sequence[EvaluationRow],
    runtime: Runtime,
    *,
    extent: Extent = "full",
    kind: type[Endure] | None = None,
) -> Endurance:
    """Run the soak and the edge inputs on a genai model folder, the bench's, in a runtime, in a separate child process.

    A child that dies at an input is replaced, at most three times, and the remaining inputs follow. The first of the
    conversations is the ordinary request, and the soak cycles over the first few (`soak_conversations`). `kind`
    replaces the runtime's own call. `extent` says which edge inputs are tried.

    Raises `StageFailed` and its kinds for a model that does not load or does not answer an ordinary request.
    """
    started = time.monotonic()
    soak, deadline_s = settings.soak, settings.timeout.exercise_s
    typed = control_tokens(bench.model)
    context_length = int(read_json(bench.model / "genai_config.json")["model"]["context_length"])
    course = _Course(soak.requests, _inputs(extent, edge_inputs(context_length, typed)))
    if not typed and extent == "full":
        course.notes.append("The tokenizer names no control token, so the input with control tokens was left out.")
    plain = plain_rows(conversations)
    rows = plain[: soak_conversations(soak.requests, len(plain))]
    shared = {
        "model_dir": bench.model,
        "conversations": [[message.model_dump() for message in row.messages] for row in rows],
        "new_tokens": soak.new_tokens,
        "threads": settings.threads,
        "step_deadline_s": deadline_s * STEP_DEADLINE_SHARE,
    }
    restarts = 0
    while course.steps:
        left_s = deadline_s - (time.monotonic() - started)
        if restarts > MAX_RESTARTS or left_s <= 0:
            course.notes.append(f"Not tried after {restarts} crashes: {', '.join(course.names)}.")
            break
        done = course.total - course.steps
        restarts += _crashed(
            partial(kind or CALLS[runtime], **shared),
            course,
            replace(bench, on_progress=bench.on_progress and _shifted(bench.on_progress, done, course.total)),
            left_s,
        )
    memory = memory_growth(course.rss_bytes)
    if memory is None and course.rss_bytes:
        course.notes.append(f"{len(course.rss_bytes)} requests are too few to fit the growth of memory.")
    elif not soak.requests:
        course.notes.append("No soak was requested: the growth of memory is not known.")
    return Endurance(
        runtime=runtime,
        extent=extent,
        memory=memory,
        edge_inputs=tuple(course.outcomes),
        notes=tuple(course.notes),
        versions=runtime_versions(runtime),
        wall_s=time.monotonic() - started,
    )


def _inputs(extent: Extent, inputs: Sequence[EdgeInput]) -> list[EdgeInput]:
    return [edge_input for edge_input in inputs if extent == "full" or edge_input.depends_on_weights]


def runtime_versions(runtime: Runtime) -> dict[str, str]:
    """Versions of the packages that a runtime consists of, as far as they are installed."""
    found = {}
    for package in PACKAGES[runtime]:
        with contextlib.suppress(PackageNotFoundError):  # on some platforms their names differ
            found[package] = version(package)
    return found


def _crashed(endure: Callable[..., Endure], course: _Course, bench: Bench, deadline_s: float) -> bool:
    """Run a child for the remaining inputs; returns whether it died."""
    bench.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bench.work, ignore_cleanup_errors=True) as folder:
        call = endure(
            requests=course.requests,
            edge_inputs=[
                TypedInput(
                    name=edge_input.name,
                    messages=edge_input.messages,
                    control_tokens=[(token.text, token.id) for token in edge_input.control_tokens],
                )
                for edge_input in course.edge_inputs
            ],
            cache_dir=Path(folder) / "foundry",
            journal=Path(folder) / "journal.jsonl",
        )
        try:
            bench.run(call, deadline_s, environment=keeping_memory())
        except StageFailed as error:
            step = course.read(call.journal)
            if step is None:  # not the fault of a step: the model did not load, or does not answer
                raise
            hung = time.time() - step["at"] >= call.step_deadline_s
            course.crashed(step, f"no answer in {call.step_deadline_s:.0f} s" if hung else error.message)
            return True
        course.read(call.journal)
        return False


def _shifted(on_progress: OnProgress, done_before: int, total: int) -> OnProgress:
    return lambda done, _, what: on_progress(done_before + done, total, what)


ENDURANCE = Kind("exercise", Endurance, field="exercise")


class EnduranceExam(Exam[Endurance]):
    """A variant's soak and edge inputs in one runtime."""

    kind, name, done_before = ENDURANCE, "exercise", "exercised before"

    def __init__(self, runtime: Runtime, conversations: Sequence[EvaluationRow], extent: Extent = "full") -> None:
        self.runtime: Runtime = runtime
        self.conversations = conversations
        self.extent: Extent = extent

    @property
    def id(self) -> str:
        """See `Exam.id`."""
        return f"exercise-{self.runtime}"

    def run_name(self, precision: str) -> str:
        """See `Exam.run_name`."""
        return f"exercise-{precision}-{self.runtime}"

    def title(self, precision: str) -> str:
        """See `Exam.title`."""
        return f"exercise {precision} in {self.runtime}"

    def question(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.question`."""
        return {
            "variant": variant.digest,
            "runtime": self.runtime,
            "versions": dict(runtime_versions(self.runtime)),
            "soak": settings.soak.model_dump(mode="json"),
            "conversations": digest_of(self.conversations),
            "edge_inputs": digest_of_json(
                json.dumps([asdict(edge_input) for edge_input in _inputs(self.extent, edge_inputs(0, []))])
            ),
        }

    def take(self, bench: Bench, variant: Variant, shop: Workshop) -> Endurance:
        """See `Exam.take`."""
        return examine_endurance(shop.settings, bench, self.conversations, self.runtime, extent=self.extent)

    def stands(self, found: Endurance) -> bool:
        """Not if the process died, because the machine may have been short of memory."""
        return not any(outcome.outcome == "crashed" for outcome in found.edge_inputs)


def endurance_exams(variant: Variant, rows: Sequence[EvaluationRow]) -> tuple[EnduranceExam, ...]:
    """Return the exams of a variant's endurance in each runtime.

    An exam is short if another variant of the version, of which only the weights differ, has taken it in full and
    handled every input: only what depends on the weights is left to be found out.
    """
    settings = workshop().settings
    siblings = [other for other in variant.version.variants if other != variant and _of_weights(other, variant)]
    exams = []
    for runtime in CALLS:
        full = EnduranceExam(runtime, rows)
        is_left = full.known(variant, settings) is None
        found = (full.known(sibling, settings) for sibling in siblings if is_left)
        short = any(in_full and all(tried.handled for tried in in_full.edge_inputs) for in_full in found)
        exams.append(EnduranceExam(runtime, rows, "short") if short else full)
    return tuple(exams)


def _of_weights(variant: Variant, other: Variant) -> bool:
    """Whether two variants differ only in their weights and graphs."""
    texts = [{file.path: file.sha256 for file in one.files if ".onnx" not in file.path} for one in (variant, other)]
    return texts[0] == texts[1]
