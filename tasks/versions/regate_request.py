"""The request for judging a stored version again: the named parameters, and for the others the last ones."""

from slmops.infra.errors import BadInput
from slmops.infra.storage.version import Version
from slmops.tasks.exams.answers import decoding_of, last_evaluation_set
from slmops.tasks.exams.constraint import RESPONSE_FORMAT, has_schema
from slmops.tasks.exams.statements import recorded_statements
from slmops.tasks.exams.text import read_text
from slmops.tasks.questions.evaluation_set import EvaluationSet, read_evaluation
from slmops.tasks.request.budget import parse_budget
from slmops.tasks.request.inputs import local_file
from slmops.tasks.request.parameters import RegateParameters
from slmops.tasks.verdict.checks import check_allowed
from slmops.tasks.versions.commit import last_budget
from slmops.tasks.versions.qualification import Qualification
from slmops.tasks.workshop import workshop


def request_again(parameters: RegateParameters, version: Version) -> Qualification:
    """Return the request for a version; raises `BadInput` for a named parameter that cannot be used."""
    budget = last_budget(version) if parameters.budget is None else parameters.budget
    parse_budget(budget)
    text_file = _local(parameters.text_file)
    evaluation = _evaluation(parameters, version)
    return Qualification(
        evaluation=evaluation,
        text=read_text(text_file) if text_file else None,
        budget=budget,
        description=version.deployed.description,
        allow=check_allowed(parameters.allow),
        statements=recorded_statements(version),
        constrain=version.latest(RESPONSE_FORMAT) is not None and has_schema(evaluation),
    )


def _evaluation(parameters: RegateParameters, version: Version) -> EvaluationSet:
    evaluation_file = _local(parameters.evaluation_file)
    form = {
        "scorer": parameters.scorer,
        "output_schema_file": _local(parameters.output_schema_file),
        "output_regex": parameters.output_regex,
    }
    if evaluation_file is None and any(form.values()):
        raise BadInput("A scorer or an output format is named without an evaluation file.", "Add --eval FILE.")
    settings = workshop().settings
    rows = last_evaluation_set(version) if evaluation_file is None else None
    if rows is None:
        rows = read_evaluation(evaluation_file, None, settings, **form).decoded_by(decoding_of(version))
    asked = rows.in_modes(parameters.thinking, settings.evaluation.max_rows)
    return asked.with_thoughts(parameters.max_thought_tokens)


def _local(text: str | None) -> str | None:
    return local_file(text, workshop().settings) if text else None
