import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import BadInput
from infra.settings import EvaluationSettings, GateSettings, MachineSettings, Settings
from tasks.evaluate import Evaluation, Reference, evaluate_variant, run_reference
from tasks.evaluation_set import EvaluationRow, chat_prompts, digest_of, read_evaluation_file
from tasks.gate import GateVerdict, judge, thresholds_for
from tests.checkpoints import SENTENCES, make_tiny_checkpoint
from tests.genai_models import build_genai_model, with_weights_set

TEXT = st.text(max_size=40)
USER = {"role": "user", "content": "Turn on the lights in the kitchen, please."}
ROW = {"id": "a", "messages": [USER], "expected": "{}"}


@st.composite
def evaluation_rows(draw):
    turns = draw(st.integers(0, 2))
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(turns):
        messages += [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(TEXT)}]
    row = {"messages": [*messages, {"role": "user", "content": draw(TEXT)}], "expected": draw(TEXT)}
    row |= draw(st.fixed_dictionaries({}, optional={"category": TEXT, "scorer": st.just("exact_match")}))
    return row


@given(
    st.dictionaries(st.integers() | st.text(min_size=1), evaluation_rows(), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.booleans(),
)
def test_every_good_file_is_read_as_written(tmp_path_factory, rows, ascii_only, line_end, byte_order_mark):
    rows = {key: row for key, row in rows.items() if isinstance(key, int) or not key.lstrip("-").isdecimal()}
    if not rows:
        return
    written = [{"id": key, **row} for key, row in rows.items()]
    path = tmp_path_factory.getbasetemp() / "good.jsonl"
    text = line_end.join(json.dumps(row, ensure_ascii=ascii_only) for row in written)
    path.write_bytes(text.encode("utf-8-sig" if byte_order_mark else "utf-8"))
    read = read_evaluation_file(path)
    assert [row.model_dump(mode="json", exclude_unset=True) for row in read] == written
    assert digest_of(read) == digest_of([EvaluationRow.model_validate_json(row.model_dump_json()) for row in read])


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_in_words(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    try:
        assert read_evaluation_file(path)
    except BadInput as error:
        assert error.what_to_do
        assert "any.jsonl" in error.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["id", "messages", "expected", "scorer", "category", "more"]), JSON)
def test_any_value_of_a_key_is_read_or_refused_with_its_line(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "value.jsonl"
    path.write_text(json.dumps({**ROW, "id": 1}) + "\n" + json.dumps({**ROW, "id": 2, key: value}) + "\n")
    try:
        assert len(read_evaluation_file(path)) == 2
    except BadInput as error:
        assert error.message.startswith("Line 2 of")


def chat(*roles):
    return {**ROW, "messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"id": 1,', "it is not JSON: Expecting property name"),
        (b"[]", "it must be an object, found list"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"id": ' + b"1" * 5000 + b"}", "cannot be read"),
        (b"\xff\xfe", "it is not UTF-8 at byte 1"),
        (json.dumps({"id": 1, "messages": [USER]}).encode(), "`expected` is missing"),
        (json.dumps({**ROW, "expected": None}).encode(), "`expected` is missing"),
        (json.dumps({"id": 1, "expected": ""}).encode(), "`messages` is missing"),
        (json.dumps({"messages": [USER], "expected": ""}).encode(), "`id` is missing"),
        (json.dumps({**ROW, "id": ""}).encode(), "`id`"),
        (json.dumps({**ROW, "id": True}).encode(), "`id`"),
        (json.dumps({**ROW, "expected": 5}).encode(), "`expected`: Input should be a valid string, found 5"),
        (json.dumps({**ROW, "scorer": "bleu"}).encode(), "`scorer`: Input should be 'exact_match', found 'bleu'"),
        (json.dumps({**ROW, "answer": "x"}).encode(), "unknown key `answer`"),
        (json.dumps({**ROW, "id": "first"}).encode(), "the id 'first' was already used in line 1"),
        (json.dumps({**ROW, "messages": []}).encode(), "`messages`"),
        (json.dumps({**ROW, "messages": "hi"}).encode(), "`messages`"),
        (json.dumps({**ROW, "messages": [{"role": "user"}]}).encode(), "`messages.0.content` is missing"),
        (json.dumps(chat("tool")).encode(), "`messages.0.role`"),
        (json.dumps(chat("system")).encode(), "end with a user's turn, found system"),
        (json.dumps(chat("user", "assistant")).encode(), "found user, assistant"),
        (json.dumps(chat("user", "user")).encode(), "must alternate"),
        (json.dumps(chat("assistant", "user")).encode(), "must alternate"),
        (json.dumps(chat("user", "system", "user")).encode(), "must alternate"),
        (json.dumps({**ROW, "expected": "\ud800"}).encode(), "unpaired surrogate"),
        (json.dumps({**ROW, "expected": "x" * 1_000_000}).encode(), "longer than 1,000,000 bytes"),
    ],
)
def test_a_bad_line_is_named_with_its_fault(tmp_path, line, fault):
    path = tmp_path / "eval.jsonl"
    path.write_bytes(json.dumps({**ROW, "id": "first"}).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(BadInput) as caught:
        read_evaluation_file(path)
    assert caught.value.message.startswith(f"Line 3 of the evaluation file {path} cannot be used: ")
    assert fault in caught.value.message
    assert len(caught.value.message) < 500 + len(str(path))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "eval.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match="has no rows"):
        read_evaluation_file(tmp_path / "eval.jsonl")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(BadInput, match="cannot be read"):
            read_evaluation_file(path)


def test_the_built_in_chats_fit_every_template():
    rows = chat_prompts()
    assert 20 <= len(rows) <= 30
    assert len({row.category for row in rows}) >= 8
    assert all(row.expected is None for row in rows)
    assert not any(message.role == "system" for row in rows for message in row.messages)


def test_the_digest_depends_on_rows_and_their_order():
    one, two = EvaluationRow(**ROW), EvaluationRow(**{**ROW, "id": 2})
    digests = [digest_of(rows) for rows in ([one], [two], [one, two], [two, one])]
    assert len(set(digests)) == 4


def evaluation(**figures):
    row = {
        "id": 1,
        "answer": "x",
        "exact_match": None,
        "identical_to_reference": True,
        "prompt_tokens": 3,
        "template_matches": True,
        "positions": 5,
        "finite_positions": 5,
        "top1_agreement": 1.0,
        "kl_divergence": 0.0,
    }
    values = {
        "rows": [row] * 4,
        "template_mismatches": {"count": 0, "example": None},
        "positions": 20,
        "finite_logits": 1.0,
        "top1_agreement": 1.0,
        "kl_divergence": 0.0,
        "kl_divergence_p99": 0.0,
        "perplexity": 1.0,
        "reference_perplexity": 1.0,
        "exact_match": None,
        "reference_exact_match": None,
        "identical_answers": 1.0,
        "empty_answers": 0,
        "worst_rows": [1],
        "vocabulary": {"variant": 512, "reference": 512, "compared": 512},
        "rows_sha256": "0" * 64,
        "threads": 1,
        "versions": {},
        "wall_s": 1.0,
        "peak_rss_bytes": 1,
    }
    return Evaluation(**values | figures)


INT8 = thresholds_for("int8", GateSettings())


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp16", (0.99, 0.005, 0.02)), ("int8", (0.97, 0.02, 0.02)), ("int4", (0.90, 0.10, 0.05))],
)
def test_default_thresholds_of_the_contract(precision, expected):
    found = thresholds_for(precision, GateSettings())
    assert (found.min_top1_agreement, found.max_kl_divergence, found.max_quality_loss) == expected


def test_a_setting_overrides_every_precision_and_a_parameter_overrides_the_setting():
    settings = GateSettings(min_top1_agreement=0.0, max_kl_divergence=9)
    for precision in ("fp16", "int8", "int4"):
        found = thresholds_for(precision, settings, max_kl_divergence=0.0)
        assert (found.min_top1_agreement, found.max_kl_divergence) == (0.0, 0.0)
        assert found.max_quality_loss == thresholds_for(precision, GateSettings()).max_quality_loss


def test_thresholds_out_of_bounds_and_unknown_precisions_are_bad_input():
    with pytest.raises(BadInput, match="min_top1_agreement"):
        thresholds_for("int8", GateSettings(), min_top1_agreement=1.5)
    with pytest.raises(BadInput, match="max_kl_divergence"):
        thresholds_for("int8", GateSettings(), max_kl_divergence=math.nan)
    with pytest.raises(BadInput, match="int3"):
        thresholds_for("int3", GateSettings())


SHARE = st.floats(0, 1)


@given(SHARE, st.none() | st.floats(0, 1e9), SHARE, SHARE, SHARE)
def test_the_verdict_is_that_of_all_its_checks(top1, divergence, finite, score, reference_score):
    verdict = judge(
        evaluation(
            top1_agreement=top1,
            kl_divergence=divergence,
            finite_logits=finite,
            exact_match=score,
            reference_exact_match=reference_score,
        ),
        INT8,
    )
    passed = {check.name: check.passed for check in verdict.checks}
    assert set(passed) == {"top1_agreement", "kl_divergence", "quality_loss", "finite_logits"}
    assert verdict.passed == all(passed.values())
    noise = 1e-11
    if abs(top1 - 0.97) > noise:
        assert passed["top1_agreement"] == (top1 >= 0.97)
    if divergence is None or abs(divergence - 0.02) > noise:
        assert passed["kl_divergence"] == (divergence is not None and divergence <= 0.02)
    if abs(reference_score - score - 0.02) > noise:
        assert passed["quality_loss"] == (reference_score - score <= 0.02)
    if 1 - finite > noise or finite == 1:
        assert passed["finite_logits"] == (finite == 1)
    assert GateVerdict.model_validate_json(verdict.model_dump_json()) == verdict
    json.dumps(verdict.model_dump(mode="json"), allow_nan=False)


def test_a_loss_of_exactly_the_threshold_passes_in_spite_of_rounding():
    assert 1.0 - 0.98 > 0.02  # in binary
    verdict = judge(evaluation(exact_match=0.98, reference_exact_match=1.0), INT8)
    assert verdict.passed
    assert not judge(evaluation(exact_match=0.975, reference_exact_match=1.0), INT8).passed


def test_a_variant_better_than_its_reference_passes():
    (check,) = [
        check
        for check in judge(evaluation(exact_match=1.0, reference_exact_match=0.9), INT8).checks
        if check.name == "quality_loss"
    ]
    assert check.passed
    assert check.value == pytest.approx(-0.1)


def test_without_expected_answers_the_score_is_not_judged_and_that_is_said():
    verdict = judge(evaluation(), INT8)
    assert [check.name for check in verdict.checks] == ["top1_agreement", "kl_divergence", "finite_logits"]
    assert "no expected answers" in verdict.notes[0]


def test_without_a_reference_finite_logits_and_answers_are_judged():
    alone = {"vocabulary": {"variant": 512, "reference": None, "compared": 512}, "top1_agreement": None}
    alone |= {"kl_divergence": None, "exact_match": 0.2}
    verdict = judge(evaluation(**alone), INT8)
    assert [check.name for check in verdict.checks] == ["non_empty_answers", "finite_logits"]
    assert verdict.passed
    assert "no source checkpoint" in verdict.notes[0]
    assert not judge(evaluation(**alone, empty_answers=1), INT8).passed
    assert not judge(evaluation(**alone, finite_logits=0.99), INT8).passed


def test_prompts_that_differ_are_noted():
    mismatch = {"id": 1, "reference": "a", "variant": "b", "reference_ids": [1], "variant_ids": [2]}
    verdict = judge(evaluation(template_mismatches={"count": 3, "example": mismatch}), INT8)
    assert "3 of 4 prompts" in verdict.notes[-1]


def test_a_real_checkpoint_and_its_variants_from_rows_to_verdict(tmp_path):
    settings = Settings(
        home=tmp_path / "home",
        machine=MachineSettings(threads=2),
        evaluation=EvaluationSettings(max_rows=6, max_new_tokens=4, max_positions=20, batch_size=2),
    )
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", tied=False)
    fp32 = build_genai_model(checkpoint, tmp_path / "fp32")
    rows = [
        EvaluationRow(id=number, messages=[{"role": "user", "content": sentence}], expected="no such answer")
        for number, sentence in enumerate(SENTENCES)
    ]

    seen = []
    reference = run_reference(settings, checkpoint, rows, tmp_path / "reference", lambda *step: seen.append(step))
    assert [row.id for row in reference.rows] == list(range(6))
    assert reference.exact_match == 0.0
    assert reference.rows_sha256 == digest_of(rows[:6])
    assert Reference.model_validate_json(reference.model_dump_json()) == reference
    assert {"reference answers", "reference distributions"} <= {what for _, _, what in seen}

    # Random weights also answer with bytes that are no text; the two runtimes write those differently.
    well_formed = {row.id: row.answer for row in reference.rows if row.answer and "\ufffd" not in row.answer}
    rows = [row.model_copy(update={"expected": well_formed[row.id]}) for row in rows if row.id in well_formed]
    assert run_reference(settings, checkpoint, rows, tmp_path / "reference").exact_match == 1.0

    def verdict_on(model_dir):
        found = evaluate_variant(
            settings, model_dir, rows, reference_dir=tmp_path / "reference", work_dir=tmp_path / "work"
        )
        assert Evaluation.model_validate_json(found.model_dump_json()) == found
        verdict = judge(found, thresholds_for("fp16", settings.gate))
        return found, verdict.passed, {check.name for check in verdict.checks if not check.passed}

    found, passed, failed = verdict_on(fp32)
    assert (passed, failed) == (True, set())
    assert found.identical_answers == 1.0
    assert found.rows_sha256 == digest_of(rows)

    _, passed, failed = verdict_on(with_weights_set(fp32, tmp_path / "zeroed", "layers.0.mlp.down_proj", 0.0))
    assert not passed
    assert {"top1_agreement", "kl_divergence", "quality_loss"} <= failed
    assert "finite_logits" not in failed

    _, passed, failed = verdict_on(with_weights_set(fp32, tmp_path / "nan", "layers.0.mlp.down_proj", math.nan))
    assert not passed
    assert failed >= {"finite_logits", "top1_agreement", "kl_divergence"}
