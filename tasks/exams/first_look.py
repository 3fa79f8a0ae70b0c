"""A first look at a checkpoint, `deploy --quick`: one precision, few rows, no soak, short prompts, no champion."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.tasks.questions.evaluation_set import EvaluationSet
from slmops.tasks.request.deploy_request import DeployRequest
from slmops.tasks.request.gate_limits import with_limits
from slmops.tasks.request.parameters import PRECISIONS, Precision
from slmops.tasks.workshop import Workshop, workshop

R = TypeVar("R")

PRECISION: Precision = "int8"  # it needs no calibration, and is nearest to the checkpoint for its size
ROWS_PER_ASKED = 10
MAX_PROMPT_TOKENS = 128
WARNING = (
    "This is a first look: few rows, no soak and no long prompts. The run did not make the version the champion. "
    "Deploy it without --quick for that."
)


def planned_look(request: DeployRequest) -> DeployRequest:
    """Return a quick request with its one precision and without further attempts, any other as it is.

    Raises `BadInput` for a quick request that asks for more than a look.
    """
    if not request.quick:
        return request
    if request.promote or request.search:
        raise BadInput(
            f"A first look does not {'promote' if request.promote else 'search for recipes'}.",
            f"Leave out --quick or --{'promote' if request.promote else 'search'}.",
            code="quick-asks-for-more",
        )
    precisions = (PRECISION,) if request.precisions == PRECISIONS else request.precisions
    if len(precisions) > 1:
        raise BadInput(
            f"A first look is at one precision, found {', '.join(precisions)}.",
            "Name one, or leave out --quick.",
            code="quick-precisions",
        )
    return replace(request, precisions=precisions, no_climb=True)


def looked_at(rows: Sequence[R]) -> Sequence[R]:
    """Return every tenth row, the first one at least."""
    return rows[::ROWS_PER_ASKED]


def evaluation_for(request: DeployRequest, evaluation: EvaluationSet) -> EvaluationSet:
    """Return the rows that a request's variants are judged on."""
    return evaluation.model_copy(update={"rows": looked_at(evaluation.rows)}) if request.quick else evaluation


def workshop_for(request: DeployRequest) -> Workshop:
    """Return the current run's workshop with the settings that a request's exams and its gate follow."""
    shop = workshop()
    settings = with_limits(shop.settings, vars(request))
    return replace(shop, settings=_brief(settings) if request.quick else settings)


def _brief(settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "soak": settings.soak.model_copy(update={"requests": 0}),
            "sweep": settings.sweep.model_copy(update={"max_prompt_tokens": MAX_PROMPT_TOKENS}),
        }
    )
