"""The source checkpoint's side of an exam: it runs once in transformers, is kept for the variants, then removed."""

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from slmops.infra.records import Json
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import made_once, shared_folder
from slmops.infra.storage.manifest import digest_of
from slmops.infra.storage.version import Variant
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.exam import Bench, Exam
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import Workshop, workshop

R = TypeVar("R")


class ComparedExam(Exam[R]):
    """An exam whose answer compares a variant with its source checkpoint on the same question."""

    source_name: ClassVar[str]  # "reference": in progress and, with hyphens, as the name of the task run

    @abstractmethod
    def source_question(self, source_digest: str, settings: Settings) -> Json:
        """Return everything that determines the checkpoint's answer."""

    @abstractmethod
    def run_source(self, bench: Bench, shop: Workshop) -> None:
        """Run the checkpoint, which is the bench's model; its work folder keeps the reference for the variants."""

    def source_folder(self, source_digest: str, settings: Settings) -> Path:
        """Return the folder that keeps the checkpoint's result for the variants."""
        return settings.cache_dir / "references" / digest_of(self.source_question(source_digest, settings))

    def source_in_use(self, source_digest: str, settings: Settings) -> AbstractContextManager[None]:
        """Keep the checkpoint's result, which runs share: see `slmops.infra.storage.folders.shared_folder`."""
        return shared_folder(self.source_folder(source_digest, settings))

    def needs_source(self, variants: Iterable[Variant], settings: Settings) -> bool:
        """Whether a variant is not yet compared with its source checkpoint."""
        return any(has_source(variant) and self.known(variant, settings) is None for variant in variants)


def has_source(variant: Variant) -> bool:
    """Whether a variant was built from a checkpoint with which it can be compared."""
    return variant.version.manifest.source.parameters > 0


@contextlib.contextmanager
def sources_in_use(exams: Sequence[ComparedExam[Any]], source_digest: str) -> Iterator[None]:
    """Keep the checkpoint's results for several exams; the last run that uses these large files removes them."""
    with contextlib.ExitStack() as stack:
        for exam in exams:
            stack.enter_context(exam.source_in_use(source_digest, workshop().settings))
        yield


def _run_name(parameters: dict[str, Any]) -> str:
    return str(parameters["exam"].source_name).replace(" ", "-")


@stage("run source", run_name=_run_name)
def run_source_once(exam: ComparedExam[Any], prepared: PreparedCheckpoint) -> None:
    """Run the source checkpoint in transformers on an exam's question, unless its result exists."""
    shop = workshop()
    folder = exam.source_folder(prepared.digest, shop.settings)
    with stage_progress(exam.source_name) as on_progress, made_once(folder, shop.settings, on_progress) as made:
        if made:
            exam.run_source(Bench(prepared.folder, made, on_progress), shop)
