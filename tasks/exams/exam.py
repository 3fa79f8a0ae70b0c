"""Exams: questions on a stored variant. Each is answered once, and the answer is kept as evidence of its version."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from slmops.infra.process.call import Call, ChildResult, OnProgress
from slmops.infra.process.supervisor import ChildProcess, run_in_child
from slmops.infra.records import Json
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.folders import work_folder
from slmops.infra.storage.manifest import digest_of
from slmops.infra.storage.version import Variant
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import Workshop, workshop

R = TypeVar("R")
A = TypeVar("A")


@dataclass(frozen=True)
class Bench:
    """The environment of an exam: a folder with the model's files, a work folder, and a progress listener."""

    model: Path
    work: Path
    on_progress: OnProgress | None = None

    def run(
        self,
        call: Call[A],
        deadline_s: float,
        *,
        environment: Mapping[str, str] | None = None,
        within: ChildProcess | None = None,
    ) -> ChildResult[A]:
        """Perform a call in a child process; raises as `run_in_child` does. The log is in `work`."""
        return run_in_child(
            call,
            deadline_s=deadline_s,
            log_path=self.work / "exam.log",
            work_dir=self.work,
            on_progress=self.on_progress,
            environment=environment,
            within=within,
        )


class Exam(ABC, Generic[R]):
    """A question on a variant; its answer of type `R` is evidence under the digest of the question."""

    kind: Kind[R]  # of the evidence
    name: ClassVar[str]  # "measure": in progress and in the names of task runs
    done_before: ClassVar[str]  # "measured before": the progress report for a stored answer

    @abstractmethod
    def question(self, variant: Variant, settings: Settings) -> Json:
        """Return everything that determines the answer."""

    @abstractmethod
    def take(self, bench: Bench, variant: Variant, shop: Workshop) -> R:
        """Determine the answer; raises `StageFailed` and its kinds, and `BadInput` for a fault in the question."""

    def stands(self, found: R) -> bool:
        """Whether a stored answer may be reused."""
        return True

    def record(self, variant: Variant, settings: Settings) -> Json:
        """Return the further fields of the answer's record."""
        return self.question(variant, settings)

    @property
    def id(self) -> str:
        """Its name among the exams of a run."""
        return self.name

    def run_name(self, precision: str) -> str:
        """Return the name of the task run for a variant."""
        return f"{self.name}-{precision}"

    def title(self, precision: str) -> str:
        """Return the exam's name in progress reports on a variant."""
        return f"{self.name} {precision}"

    def key(self, variant: Variant, settings: Settings) -> str:
        """Return the key of the evidence: the same question has the same key."""
        return digest_of(self.question(variant, settings))[:16]

    def known(self, variant: Variant, settings: Settings) -> R | None:
        """Return the stored answer, or None if there is none that may be reused.

        Raises `DamagedEvidence`.
        """
        found = variant.version.latest(self.kind, self.key(variant, settings))
        return found if found is not None and self.stands(found) else None


def _run_name(parameters: Mapping[str, Any]) -> str:
    return str(parameters["exam"].run_name(parameters["variant"].precision))


@stage("examine", run_name=_run_name)
def examine(exam: Exam[R], variant: Variant, *, fresh: bool = False) -> R:
    """Take an exam of a stored variant, and keep the answer as evidence; a stored answer is reused.

    With `fresh`, the exam is taken again and its answer is added. Raises what `Exam.take` does.
    """
    shop = workshop()
    with stage_progress(exam.title(variant.precision)) as on_progress:
        known = None if fresh else exam.known(variant, shop.settings)
        if known is not None:
            on_progress(1, 1, exam.done_before)
            return known
        with work_folder(shop.settings) as work:
            variant.place(work / "model", on_progress)
            found = exam.take(Bench(work / "model", work, on_progress), variant, shop)
        key = None if fresh else exam.key(variant, shop.settings)
        variant.version.record(exam.kind, found, key, beside=exam.record(variant, shop.settings))
    return found
