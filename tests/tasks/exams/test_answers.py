"""Evaluation: what follows from the answers, what is kept as evidence, and the whole way with a real model."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from slmops.infra.errors import BadInput
from slmops.infra.settings import EvaluationSettings, MachineSettings, Settings
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest, Source, StoredVariant
from slmops.infra.storage.manifest import digest_of as digest_of_json
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.exams.answers import (
    AnswersExam,
    evaluate_variant,
    last_evaluation_set,
    run_reference,
)
from slmops.tasks.exams.estimates import mean_score, paired_loss, weighted_mean
from slmops.tasks.exams.evaluation import Evaluation, score_evaluation
from slmops.tasks.exams.exam import Bench
from slmops.tasks.questions.evaluation_set import EvaluationRow, EvaluationSet, chat_prompts, digest_of
from slmops.tasks.questions.output_format import OutputFormat
from slmops.tasks.verdict.gate import judge
from slmops.tasks.verdict.thresholds import thresholds_for
from tests.support.checkpoints import SENTENCES, make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import build_genai_model, with_weights_set
from tests.support.versions import add_evidence, stored_variant


def row(row_id: Any, **fields: Any) -> EvaluationRow:
    messages = [{"role": "user", "content": "x"}]
    return EvaluationRow.model_validate({"id": row_id, "messages": messages, **fields})


def evaluated(*rows: dict[str, Any], **figures: Any) -> Evaluation:
    """An evaluation as the child returns it."""
    same: dict[str, Any] = {
        "answer": "",
        "reference_answer": None,
        "exact_match": None,
        "identical_to_reference": None,
        "prompt_tokens": 3,
        "template_matches": None,
        "positions": 4,
        "finite_positions": 4,
        "top1_agreement": None,
        "kl_divergence": None,
    }
    values = {
        "rows": [same | {"id": number} | one for number, one in enumerate(rows)],
        "template_mismatches": {"count": 0, "example": None},
        "positions": 4 * len(rows),
        "finite_logits": 1.0,
        "top1_agreement": None,
        "kl_divergence": None,
        "kl_divergence_p99": None,
        "perplexity": None,
        "reference_perplexity": None,
        "exact_match": None,
        "reference_exact_match": None,
        "identical_answers": None,
        "empty_answers": 0,
        "vocabulary": {"variant": 512, "reference": 512, "compared": 512, "comparable": True},
        "rows_sha256": "0" * 64,
        "threads": 1,
        "versions": {},
        "wall_s": 1.0,
        "peak_rss_bytes": 1,
    }
    return Evaluation.model_validate(values | figures)


def test_scores_of_both_sides_their_loss_and_their_categories() -> None:
    rows = [
        row(0, expected="on", category="lights"),
        row(1, expected="21", scorer="numeric", category="heat"),
        row(2, expected="the cat sat", scorer="rouge_l", category="lights"),
        row(3, expected="x"),
        row(4, category="lights"),
    ]
    answers = [("on", "off"), ("21 °C", "22 °C"), ("the cat sat", "the cat"), ("y", "x"), ("anything", "else")]
    found = score_evaluation(
        evaluated(*({"reference_answer": one, "answer": other} for one, other in answers)), rows, None
    )
    assert [row.score for row in found.rows] == [0.0, 0.0, pytest.approx(0.8), 1.0, None]
    assert [row.reference_score for row in found.rows] == [1.0, 1.0, 1.0, 0.0, None]
    assert [row.category for row in found.rows] == ["lights", "heat", "lights", None, "lights"]
    assert found.score == mean_score([0, 0, 0.8, 1])
    assert found.reference_score == mean_score([1, 1, 1, 0])
    assert found.quality_loss == paired_loss([1, 1, 1, 0], [0, 0, 0.8, 1])
    lights, heat = found.categories
    assert (lights.category, lights.rows, lights.score.value) == ("lights", 2, pytest.approx(0.4))
    assert lights.reference_score
    assert lights.reference_score.value == 1
    assert (heat.category, heat.rows, heat.score.value) == ("heat", 1, 0)
    assert (found.output_conformity, found.reference_output_conformity, found.notes) == (None, None, ())
    assert Evaluation.model_validate_json(found.model_dump_json()) == found


def test_without_a_reference_or_expected_answers_there_are_fewer_figures() -> None:
    alone = score_evaluation(
        evaluated({"answer": "on"}, {"answer": "x"}), [row(0, expected="on"), row(1, expected="y")], None
    )
    assert alone.score == mean_score([1, 0])
    assert (alone.reference_score, alone.quality_loss, alone.worst_examples) == (None, None, ())
    chats = chat_prompts()[:2]
    unasked = score_evaluation(
        evaluated({"answer": "a", "reference_answer": "b"}, {"reference_answer": "c"}), chats, None
    )
    assert (unasked.score, unasked.reference_score, unasked.quality_loss, unasked.categories) == (None, None, None, ())
    assert unasked.rows[0].category == chats[0].category


def test_worst_examples_lost_most_and_of_those_the_farthest_first() -> None:
    losses = [(0, 1.0, 0.0, 0.1), (1, 0.0, 1.0, 9.0), (2, 1.0, 0.0, 0.3), (3, 1.0, 0.5, 8.0), (4, 1.0, 1.0, 9.0)]
    losses += [(5, 1.0, 0.0, None), (6, 0.5, 0.0, 0.0), (7, 1.0, 0.0, 0.2)]
    texts = {0.0: "no", 0.5: "a c d", 1.0: "a b"}
    rows = [row(number, expected="a b", scorer="rouge_l") for number, *_ in losses]
    children = [
        {
            "reference_answer": texts[reference],
            "answer": texts[variant],
            "kl_divergence": divergence,
            "top1_agreement": 0.5,
        }
        for _, reference, variant, divergence in losses
    ]
    assert score_evaluation(evaluated(*children), rows, None).worst_examples == (5, 2, 7, 0, 3)


def test_intervals_of_agreement_and_divergence_are_over_rows() -> None:
    figures = [(4, 1.0, 0.1), (2, 0.5, 0.4), (0, None, None), (6, 0.0, 0.2)]
    names = ("positions", "top1_agreement", "kl_divergence")
    children = [dict(zip(names, figure_row, strict=True)) for figure_row in figures]
    rows = [row(number) for number in range(4)]
    found = score_evaluation(evaluated(*children), rows, None)
    assert found.top1_agreement_interval == weighted_mean([1.0, 0.5, 0.0], [4, 2, 6])
    assert found.kl_divergence_interval == weighted_mean([0.1, 0.4, 0.2], [4, 2, 6])
    children[1]["kl_divergence"] = None  # not finite
    broken = score_evaluation(evaluated(*children), rows, None)
    assert broken.top1_agreement_interval == found.top1_agreement_interval
    assert broken.kl_divergence_interval is None
    single = score_evaluation(evaluated(children[0]), rows[:1], None)
    assert single.top1_agreement_interval is None


def test_conformity_is_of_all_raw_answers_of_both_sides() -> None:
    output_format = OutputFormat(json_schema={"type": "object", "required": ["action"]})
    answers = [('{"action": 1}', "{}"), ("on", '{"action": 2}'), ('{"action": 3}', ' {"action": 3}\n')]
    children = [{"reference_answer": one, "answer": other} for one, other in answers]
    found = score_evaluation(evaluated(*children), [row(0, expected="x"), row(1), row(2)], output_format)
    assert found.output_conformity == mean_score([0, 1, 1])
    assert found.reference_output_conformity == mean_score([1, 0, 1])
    assert [row.output_fault for row in found.rows] == ["$: 'action' is a required property", None, None]
    assert [bool(row.reference_output_fault) for row in found.rows] == [False, True, False]
    alone = score_evaluation(evaluated({"answer": "{}"}), [row(0)], output_format)
    assert alone.output_conformity == mean_score([0])
    assert alone.reference_output_conformity is None


def test_a_pattern_that_exceeds_the_time_limit_scores_0_and_is_reported() -> None:
    rows = [row("slow", expected="^foo(a|aa)+$", scorer="regex")]
    found = score_evaluation(evaluated({"answer": "foo" + "a" * 99 + "!", "reference_answer": "fooa"}), rows, None)
    assert (found.rows[0].score, found.rows[0].reference_score) == (0.0, 1.0)
    assert found.notes == (
        "A pattern did not finish within 1 s, so the score is 0: row 'slow' with the variant's answer.",
    )


@pytest.fixture
def stored(tmp_path: Path) -> tuple[ModelRegistry, Manifest, StoredVariant]:
    registry = ModelRegistry(LocalObjectStore(tmp_path / "store"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.onnx").write_bytes(b"x")
    variant = stored_variant(registry, tmp_path / "model", "int8")
    source = Source(digest="1" * 64, origin="here", architecture="Qwen2ForCausalLM", parameters=1)
    manifest, _ = registry.commit("home", source, {}, [variant])
    return registry, manifest, variant


def test_another_question_has_another_key(
    stored: tuple[ModelRegistry, Manifest, StoredVariant], settings: Settings
) -> None:
    registry, manifest, _ = stored
    variant = registry.of(manifest).variants[0]
    sets = [
        EvaluationSet(rows=(row(0, expected="5"),), origin="a"),
        EvaluationSet(rows=(row(0, expected="5", scorer="numeric"),), origin="a"),
        EvaluationSet(rows=(row(0, expected="5", scorer={"name": "numeric", "absolute_tolerance": 1}),), origin="a"),
        EvaluationSet(rows=(row(0, expected="5"),), origin="a", output_format=OutputFormat(regex="a")),
        EvaluationSet(rows=(row(0, expected="5"),), origin="a", output_format=OutputFormat(json_schema={})),
    ]
    keys = [AnswersExam(evaluation_set).key(variant, settings) for evaluation_set in sets]
    assert len(set(keys)) == len(sets)
    same = EvaluationSet.model_validate_json(sets[3].model_dump_json()).model_copy(update={"origin": "b"})
    assert AnswersExam(same).key(variant, settings) == keys[3]


OLD_ROWS = [
    {
        "id": 1,
        "messages": [{"role": "user", "content": "x"}],
        "expected": "on",
        "scorer": "exact_match",
        "category": None,
    }
]


def test_an_evaluation_on_record_from_an_earlier_slmops_gives_its_rows_and_is_not_reused(
    stored: tuple[ModelRegistry, Manifest, StoredVariant], settings: Settings
) -> None:
    registry, manifest, _ = stored
    variant = registry.of(manifest).variants[0]
    assert last_evaluation_set(registry.of(manifest)) is None
    content = evaluated({"answer": "on"}).model_dump(mode="json")
    earlier = {
        name: content[name] for name in content if name not in ("score", "categories", "notes", "worst_examples")
    }
    earlier["vocabulary"].pop("comparable")
    record = {
        "precision": "int8",
        "rows": OLD_ROWS,
        "origin": "eval.jsonl",
        "evaluation": earlier | {"worst_rows": [1]},
    }
    add_evidence(registry, manifest, "evaluation", record, "0123456789abcdef")
    found = last_evaluation_set(registry.of(manifest))
    assert found == EvaluationSet(rows=(EvaluationRow.model_validate(OLD_ROWS[0]),), origin="eval.jsonl")
    assert AnswersExam(found).known(variant, settings) is None
    assert Evaluation.model_validate(record["evaluation"]).vocabulary.comparable
    assert digest_of(found.rows) == digest_of_json(OLD_ROWS)  # what was on record is the same question still


def test_the_last_evaluation_comes_with_its_output_format(
    stored: tuple[ModelRegistry, Manifest, StoredVariant],
) -> None:
    registry, manifest, _ = stored
    evaluation = EvaluationSet(
        rows=(row(0, expected="5", scorer="numeric"),),
        origin="a",
        output_format=OutputFormat(json_schema={"type": "object"}),
    )
    record = {"precision": "int8", **evaluation.model_dump(mode="json"), "evaluation": {}}
    add_evidence(registry, manifest, "evaluation", record, "0123456789abcdef")
    assert last_evaluation_set(registry.of(manifest)) == evaluation
    add_evidence(registry, manifest, "evaluation", {**record, "rows": [{"id": 0}]}, "0123456789abcdee")
    with pytest.raises(BadInput, check=coded("evaluation-record-unreadable", "home@1")):
        last_evaluation_set(registry.of(manifest))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def quick(work: Path) -> Settings:
    return Settings(
        home=work / "home",
        machine=MachineSettings(threads=1),
        evaluation=EvaluationSettings(max_rows=6, max_new_tokens=4, max_positions=20, batch_size=2),
    )


@pytest.fixture(scope="module")
def checkpoint(work: Path) -> Path:
    return make_tiny_checkpoint(work / "checkpoint", tied=False)


@pytest.fixture(scope="module")
def fp32(work: Path, checkpoint: Path) -> Path:
    return build_genai_model(checkpoint, work / "fp32")


@pytest.mark.usefixtures("torch_stays")
def test_a_real_checkpoint_and_its_variants_from_rows_to_verdict(
    work: Path, quick: Settings, checkpoint: Path, fp32: Path, tmp_path: Path
) -> None:
    rows = [
        row(number, messages=[{"role": "user", "content": sentence}], expected="no such answer")
        for number, sentence in enumerate(SENTENCES)
    ]
    seen: list[tuple[float, float, str]] = []
    reference = run_reference(quick, Bench(checkpoint, tmp_path / "reference", lambda *step: seen.append(step)), rows)
    assert [row.id for row in reference.rows] == list(range(6))
    assert reference.exact_match == 0.0
    assert {"reference answers", "reference distributions"} <= {what for _, _, what in seen}

    # Random weights also answer with bytes that are no text; the two runtimes write those differently.
    well_formed = {row.id: row.answer for row in reference.rows if row.answer.strip() and "\ufffd" not in row.answer}
    scorers = ("exact_match", "normalized_match", "contains", "rouge_l")
    usable = [row for row in rows if row.id in well_formed]
    rows = [
        row(
            one.id,
            messages=one.messages,
            expected=well_formed[one.id],
            scorer=scorers[index % 4],
            category=scorers[index % 2],
        )
        for index, one in enumerate(usable)
    ]
    assert len(rows) > 2
    assert run_reference(quick, Bench(checkpoint, tmp_path / "reference"), rows).exact_match == 1.0
    output_format = OutputFormat(regex=r"(?s).*\{.*")

    def verdict_on(model_dir: Path) -> tuple[Evaluation, set[str]]:
        found = evaluate_variant(
            quick,
            Bench(model_dir, tmp_path / "work"),
            rows,
            reference_dir=tmp_path / "reference",
            output_format=output_format,
        )
        assert Evaluation.model_validate_json(found.model_dump_json()) == found
        verdict = judge(found, thresholds_for("fp16", quick.gate))
        return found, {check.name for check in verdict.checks if not check.passed}

    found, failed = verdict_on(fp32)
    assert failed <= {"output_format"}
    assert found.identical_answers == 1.0
    assert found.rows_sha256 == digest_of(rows)
    assert [row.reference_answer for row in found.rows] == [well_formed[row.id] for row in rows]
    assert found.score == found.reference_score == mean_score([1.0] * len(rows))
    assert found.quality_loss
    assert found.quality_loss.value == 0
    assert found.worst_examples == ()
    assert [row.exact_match for row in found.rows] == [
        True if row.scorer.name == "exact_match" else None for row in rows
    ]
    assert (found.exact_match, found.reference_exact_match) == (1.0, 1.0)
    assert found.top1_agreement_interval
    assert found.top1_agreement_interval.value == pytest.approx(found.top1_agreement)
    assert found.kl_divergence_interval
    assert found.kl_divergence_interval.value == pytest.approx(found.kl_divergence)
    assert found.output_conformity == found.reference_output_conformity
    assert {category.category for category in found.categories} == {"exact_match", "normalized_match"}

    zeroed, failed = verdict_on(with_weights_set(fp32, tmp_path / "zeroed", "layers.0.mlp.down_proj", 0.0))
    assert {"top1_agreement", "kl_divergence", "quality_loss"} <= failed
    assert "finite_logits" not in failed
    assert zeroed.quality_loss
    assert zeroed.quality_loss.value > 0.5
    assert zeroed.worst_examples

    nan, failed = verdict_on(with_weights_set(fp32, tmp_path / "nan", "layers.0.mlp.down_proj", math.nan))
    assert failed >= {"finite_logits", "top1_agreement", "kl_divergence"}
    assert nan.kl_divergence_interval is None


def truncated(fp32: Path, directory: Path, size: int, *, embedding: bool) -> Path:
    """Copy a model with the end of its vocabulary cut off, in the ONNX file and in the configuration."""
    shutil.copytree(fp32, directory)
    model = onnx.load(directory / "model.onnx")
    for tensor in model.graph.initializer:
        if "lm_head" in tensor.name or (embedding and "embed_tokens" in tensor.name):
            array = numpy_helper.to_array(tensor)
            cut = array[:size] if array.shape[0] == 512 else array[:, :size]
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(cut), tensor.name))
    for output in model.graph.output:
        if output.name == "logits":
            output.type.tensor_type.shape.dim[2].dim_value = size
    for value in [value for value in model.graph.value_info if "lm_head" in value.name]:
        model.graph.value_info.remove(value)
    (directory / "model.onnx.data").unlink()
    onnx.save(model, directory / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    config = json.loads((directory / "genai_config.json").read_text())
    config["model"]["vocab_size"] = size
    (directory / "genai_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.usefixtures("torch_stays")
@pytest.mark.parametrize("embedding", [False, True])
def test_a_truncated_vocabulary_is_a_figure_and_is_rejected_by_its_own_check(
    quick: Settings, checkpoint: Path, fp32: Path, tmp_path: Path, embedding: bool
) -> None:
    rows = [row(number, messages=[{"role": "user", "content": SENTENCES[number]}], expected="x") for number in range(2)]
    run_reference(quick, Bench(checkpoint, tmp_path / "reference"), rows)
    model = truncated(fp32, tmp_path / "truncated", 400, embedding=embedding)
    found = evaluate_variant(quick, Bench(model, tmp_path / "work"), rows, reference_dir=tmp_path / "reference")
    assert found.vocabulary.model_dump() == {"variant": 400, "reference": 512, "compared": 0, "comparable": False}
    assert (found.top1_agreement, found.kl_divergence, found.perplexity) == (None, None, None)
    assert (found.top1_agreement_interval, found.kl_divergence_interval) == (None, None)
    assert found.score == mean_score([0, 0])
    verdict = judge(found, thresholds_for("int4", quick.gate))
    assert not verdict.passed
    assert "vocabulary" in {check.name for check in verdict.checks if not check.passed}


@pytest.mark.usefixtures("torch_stays")
def test_rows_with_tools_are_asked_with_them_in_both_runtimes(
    quick: Settings, checkpoint: Path, fp32: Path, tmp_path: Path
) -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for message in messages %}<|im_start|>"
        "{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    for folder in (checkpoint, fp32):
        shutil.copytree(folder, tmp_path / folder.name)
        (tmp_path / folder.name / "chat_template.jinja").write_text(template, "utf-8")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    calls: tuple[list[Any], ...] = ([{"name": "f", "arguments": {}}], [])
    rows = [row(number, tools=[tool], expected_tool_calls=due) for number, due in enumerate(calls)]
    bench = Bench(tmp_path / "checkpoint", tmp_path / "reference", None)
    reference = run_reference(quick, bench, rows)
    assert '"name": "f"' in reference.rows[0].prompt
    bench = Bench(tmp_path / "fp32", tmp_path / "work", None)
    found = evaluate_variant(quick, bench, rows, reference_dir=tmp_path / "reference")
    assert found.template_mismatches.count == 0
    assert [(one.score, one.reference_score, one.category) for one in found.rows] == [
        (0.0, 0.0, "simple"),
        (1.0, 1.0, "irrelevance"),
    ]
    assert {"tool_calls_lost", "tool_calls_invented"} <= {
        check.name for check in judge(found, thresholds_for("fp16", quick.gate)).checks
    }
