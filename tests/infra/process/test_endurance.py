import json

import pytest

from slmops.infra.errors import StageFailed
from slmops.infra.process.supervisor import run_in_child
from tests.infra.child_functions import EndureFake

ORDINARY = [{"role": "user", "content": "Hello."}]


def said(name, text, **further):
    return {"name": name, "messages": [{"role": "user", "content": text}], "control_tokens": [], **further}


@pytest.fixture
def run(tmp_path):
    """Test a fake runtime with a fault; returns the journal's lines, and the error if the child ended with one."""

    def run(fault, *, requests=0, edge_inputs=(), step_deadline_s=60):
        (tmp_path / "fault.json").write_text(json.dumps(fault))
        call = EndureFake(
            model_dir=tmp_path,
            cache_dir=tmp_path / "cache",
            threads=1,
            conversations=[ORDINARY],
            requests=requests,
            new_tokens=4,
            edge_inputs=list(edge_inputs),
            step_deadline_s=step_deadline_s,
            journal=tmp_path / "journal.jsonl",
        )
        error = None
        try:
            run_in_child(call, deadline_s=120, log_path=tmp_path / "child.log", work_dir=tmp_path, on_progress=None)
        except StageFailed as raised:
            error = raised
        return [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()], error

    return run


def outcomes(lines):
    return [line["outcome"] for line in lines if "outcome" in line]


def test_each_input_is_written_down_before_and_after(run):
    lines, error = run({}, requests=3, edge_inputs=[said("short", "a\x00\nb"), said("long", "x" * 2000)])
    assert error is None
    assert [line["begun"] for line in lines if "begun" in line] == ["long use"] * 3 + ["short", "long"]
    (soaked,) = [line["rss_bytes"] for line in lines if "rss_bytes" in line]
    assert len(soaked) == 3 and min(soaked) > 2**20
    found = [(outcome["name"], outcome["outcome"], outcome["detail"], outcome["alive"]) for outcome in outcomes(lines)]
    assert found == [("short", "answered", "well", True), ("long", "refused", "too long for the context", True)]


def test_a_runtime_that_answers_differently_afterwards_is_not_alive(run):
    lines, _ = run({"ill_after": "poison"}, edge_inputs=[said("good", "a"), said("bad", "poison"), said("next", "a")])
    assert [(outcome["name"], outcome["alive"]) for outcome in outcomes(lines)] == [
        ("good", True),
        ("bad", False),
        ("next", False),
    ]


@pytest.mark.parametrize("taken", [True, False])
def test_typed_control_tokens_are_looked_up_in_the_runtime(run, taken):
    typed = said("typed", "a", control_tokens=[["<a>", 1], ["<b>", 2]])
    lines, _ = run({"taken": [2] if taken else []}, edge_inputs=[typed, said("other", "a")])
    assert [outcome["control_tokens"] for outcome in outcomes(lines)] == [taken, None]
    notes = [line["note"] for line in lines if "note" in line]
    assert notes == ["Typed by a user, these become control tokens: <b>."] * taken


def test_a_prompt_that_takes_long_is_cut_unless_the_context_is_shorter(run):
    fault = {"context_length": 10_000}
    lines, _ = run(fault, edge_inputs=[said("cut", "x" * 9000), said("whole", "x" * 20_000)])
    assert [(outcome["name"], outcome["prompt_tokens"], outcome["outcome"]) for outcome in outcomes(lines)] == [
        ("cut", 1024, "answered"),
        ("whole", 20_000, "refused"),
    ]
    assert [line["note"] for line in lines if "note" in line] == ["cut: cut to 1,024 of 9,000 characters to save time."]


def test_a_soak_that_is_refused_ends_and_the_edge_inputs_go_on(run):
    lines, error = run({"refuse_from": 3}, requests=5)
    assert error is None
    assert not any("rss_bytes" in line for line in lines)
    (outcome,) = outcomes(lines)
    assert (outcome["name"], outcome["outcome"], outcome["alive"]) == ("long use", "refused", False)
    assert outcome["detail"].startswith("request 3 of 5: ")


def test_a_runtime_that_never_answers_is_an_error(run):
    lines, error = run({"refuse_from": 1}, edge_inputs=[said("any", "a")])
    assert error and "does not answer an ordinary request" in error.message
    assert not outcomes(lines)


def test_a_runtime_that_hangs_in_native_code_is_ended_by_its_own_watchdog(run):
    lines, error = run({"hang_at": "stop"}, edge_inputs=[said("first", "a"), said("hang", "stop")], step_deadline_s=0.5)
    assert error and "without a result" in error.message
    assert [outcome["name"] for outcome in outcomes(lines)] == ["first"]
    assert lines[-1]["begun"] == "hang"
