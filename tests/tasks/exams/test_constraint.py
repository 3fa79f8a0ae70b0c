"""The output schema as a constraint: what it changes in a real model's answers, and schemas that cannot be one."""

from pathlib import Path
from typing import Any

import pytest

from slmops.infra.errors import BadInput
from slmops.infra.genai.constraint import write_smallest_model
from slmops.infra.settings import EvaluationSettings, MachineSettings, Settings
from slmops.infra.storage.opening import open_registry
from slmops.tasks.exams.constraint import (
    RESPONSE_FORMAT,
    ConstraintExam,
    check_constraint,
    record_response_format,
    schema_of,
)
from slmops.tasks.exams.exam import Bench
from slmops.tasks.questions.evaluation_set import EvaluationSet
from slmops.tasks.report.answers import output_format
from slmops.tasks.report.assemble import variant_metrics
from slmops.tasks.report.blocks import Table
from slmops.tasks.report.records import VariantDetails
from slmops.tasks.workshop import Workshop, working_in
from tests.support.checkpoints import SENTENCES
from tests.support.errors import coded
from tests.support.reports import full_report, full_variant
from tests.support.versions import store_version

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def evaluation(schema: Any, **fields: Any) -> EvaluationSet:
    rows = [
        {"id": number, "messages": [{"role": "user", "content": text}], "expected": '"on"', **fields}
        for number, text in enumerate(SENTENCES[:3])
    ]
    form = None if schema is None else {"json_schema": schema}
    return EvaluationSet.model_validate({"rows": rows, "origin": "a test", "output_format": form})


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    settings = Settings(
        home=tmp_path / "home",
        machine=MachineSettings(threads=1),
        evaluation=EvaluationSettings(max_new_tokens=12),
    )
    return Workshop(settings, open_registry(settings))


def test_constrained_answers_have_the_form_and_may_be_wrong(shop: Workshop, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_smallest_model(model, context_length=512)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    manifest = store_version(shop.registry, tmp_path / "in", {path.name: path.read_bytes() for path in model.iterdir()})
    (variant,) = shop.registry.of(manifest).variants
    exam = ConstraintExam(evaluation({"const": "off"}))
    found = exam.take(Bench(model, tmp_path / "work"), variant, shop)
    assert {row.bound.answer for row in found.rows} == {'"off"'}
    assert (found.bound.conformity.value, found.free.conformity.value) == (1, 0)  # it repeats a byte
    assert found.bound.score and found.bound.well_formed_but_wrong and found.free.well_formed_but_wrong
    assert (found.bound.score.value, found.bound.well_formed_but_wrong.value) == (0, 1)
    assert found.free.well_formed_but_wrong.value == 0
    assert min(found.bound.tokens_per_s, found.free.tokens_per_s) > 0
    metrics = variant_metrics(VariantDetails(constraint=found))
    assert metrics["constrained_conformity"] == 1
    assert {"constrained_throughput_tps", "unconstrained_throughput_tps"} <= metrics.keys()
    shown = full_variant("int4")
    shown = shown.model_copy(update={"details": shown.details.model_copy(update={"constraint": found})})
    tables = [block for block in output_format(full_report(shown)) if isinstance(block, Table)]
    (table,) = [table for table in tables if "constrained" in table.columns]
    assert [row[1] for row in table.rows] == ["no", "yes"]


@pytest.mark.parametrize(
    ("asked", "code", "told"),
    [
        (evaluation(None), "constraint-without-schema", "nothing"),
        (evaluation(True), "constraint-without-schema", "--output-schema"),
        (evaluation({"not": {"type": "string"}}), "schema-without-grammar", "not"),
        (evaluation({"type": "object"}, tools=[TOOL]), "constraint-without-rows", "tools"),
    ],
)
def test_what_cannot_be_a_constraint_is_refused_before_a_build(
    shop: Workshop, asked: EvaluationSet, code: str, told: str
) -> None:
    with working_in(shop), pytest.raises(BadInput, check=coded(code, told)):
        check_constraint.fn(asked)


def test_a_schema_with_a_grammar_becomes_the_versions_response_format(shop: Workshop, tmp_path: Path) -> None:
    version = shop.registry.of(store_version(shop.registry, tmp_path / "in", {"a": b"a"}))
    asked = evaluation({"enum": ["on", "off"]})
    with working_in(shop):
        check_constraint.fn(asked)
        for _ in range(2):
            record_response_format.fn(version, asked)
    assert [record.json_schema for record in version.all(RESPONSE_FORMAT)] == [schema_of(asked)]
