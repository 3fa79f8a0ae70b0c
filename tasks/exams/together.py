"""Exams side by side: those that need no quiet machine share its cores, where the memory suffices."""

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import psutil

from slmops.infra.process.abreast import run_abreast
from slmops.infra.settings import Settings
from slmops.infra.storage.version import Variant
from slmops.tasks.environment.estimates import have_room_side_by_side, runtime_ram
from slmops.tasks.exams.exam import Exam, examine
from slmops.tasks.workshop import working_by, workshop

R = TypeVar("R")


def examine_together(exams: Sequence[Exam[R]], variant: Variant) -> tuple[R, ...]:
    """Examine a variant as `examine` does, side by side; one after the other where memory or threads do not suffice.

    Raises the first error, after the other exams were stopped.
    """
    settings = workshop().settings
    left = sum(exam.known(variant, settings) is None for exam in exams)
    if left < 2 or settings.threads < left or not _has_room(variant, left):
        return tuple(examine(exam, variant) for exam in exams)
    with working_by(_with_threads(settings, settings.threads // left)):
        return tuple(run_abreast([partial(examine, exam, variant) for exam in exams]))


def _has_room(variant: Variant, processes: int) -> bool:
    available = bool(runtime_ram(variant.size_bytes, processes) <= psutil.virtual_memory().available)
    return available and have_room_side_by_side(variant.size_bytes, processes)


def _with_threads(settings: Settings, threads: int) -> Settings:
    return settings.model_copy(update={"machine": settings.machine.model_copy(update={"threads": threads})})
