import itertools
import json
import os
import platform

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.errors import StageFailed
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.settings import GateSettings, Settings, SoakSettings, TimeoutSettings
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Source
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.exams.endurance import (
    CALLS,
    Endurance,
    EnduranceExam,
    control_tokens,
    endurance_exams,
    examine_endurance,
    memory_growth,
    soak_conversations,
)
from slmops.tasks.exams.estimates import drift
from slmops.tasks.exams.exam import Bench, examine
from slmops.tasks.questions.edge_inputs import MAX_CONTROL_TOKENS, ControlToken, edge_inputs
from slmops.tasks.questions.evaluation_set import EvaluationRow, chat_prompts
from slmops.tasks.workshop import Workshop, working_in
from tests.infra.child_functions import EndureFake
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import build_genai_model
from tests.support.versions import SOURCE, evidence, stored_variant, write_files

CONTEXT_LENGTH = 1024
NAMES = [edge_input.name for edge_input in edge_inputs(CONTEXT_LENGTH, [ControlToken("<end>", 5)])]
SEGFAULTS = pytest.param(
    "segfault_at", marks=pytest.mark.skipif(os.name == "nt", reason="Windows: ctypes makes an exception of it")
)
ROWS = [EvaluationRow(id=1, messages=[{"role": "user", "content": "Hello."}])]
MB = 2**20


@pytest.fixture
def run(tmp_path):
    """Run the endurance test on a fake runtime with a fault; returns the record."""

    def run(fault, *, requests=0, exercise_s=120, on_progress=None, extent="full"):
        model_dir = tmp_path / "model"
        model_dir.mkdir(exist_ok=True)
        (model_dir / "fault.json").write_text(json.dumps({"taken": [], **fault}))
        (model_dir / "genai_config.json").write_text(json.dumps({"model": {"context_length": CONTEXT_LENGTH}}))
        token = {"content": "<end>", "id": 5, "special": True}
        (model_dir / "tokenizer.json").write_text(json.dumps({"added_tokens": [token]}))
        settings = Settings(
            home=tmp_path / "home",
            soak=SoakSettings(requests=requests),
            timeout=TimeoutSettings(exercise_s=exercise_s),
        )
        work_dir = tmp_path / "work"
        bench = Bench(model_dir, work_dir, on_progress)
        found = examine_endurance(settings, bench, ROWS, "genai", extent=extent, kind=EndureFake)
        assert [path.name for path in work_dir.iterdir()] == ["exam.log"]
        assert Endurance.model_validate_json(found.model_dump_json()) == found
        return found

    return run


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Other allocators do not keep what is freed.")
def test_what_loading_a_model_freed_is_not_memory_of_its_requests(run):
    plain, loaded = (run({"freed_bytes": size}, requests=16).memory.rss_bytes[0] for size in (0, 256 * MB))
    assert loaded < plain + 64 * MB


def unhandled(endurance):
    return [edge_input.name for edge_input in endurance.edge_inputs if not edge_input.handled]


class TestMemory:
    def test_a_leak_is_caught_and_its_size_is_found(self, run):
        leak = MB // 2
        found = run({"leak_bytes": leak}, requests=48).memory
        assert len(found.rss_bytes) == 48 and found.warmup_requests == 16
        assert leak / 2 < found.bytes_per_request.low <= found.bytes_per_request.high < 2 * leak
        assert found.bytes_per_request.low > GateSettings().max_memory_growth_bytes_per_request

    def test_a_runtime_that_keeps_its_memory_does_not_grow(self, run):
        found = run({}, requests=48).memory.bytes_per_request
        assert found.low <= 1024 and abs(found.value) < 8192

    @pytest.mark.parametrize(("requests", "told"), [(0, "No soak was requested"), (15, "15 requests are too few")])
    def test_too_few_requests_give_no_figure_and_a_note(self, run, requests, told):
        found = run({}, requests=requests)
        assert found.memory is None and not unhandled(found)
        assert any(told in note for note in found.notes)
        assert memory_growth([1] * 16) is not None

    @given(st.integers(16, 400), st.integers(1, 60))
    def test_each_block_of_requests_has_each_conversation_equally_often(self, requests, conversations):
        count = soak_conversations(requests, conversations)
        block = (requests - memory_growth([0] * requests).warmup_requests) // 8
        assert 1 <= count <= conversations and block % count == 0

    def test_conversations_of_different_size_are_no_growth(self):
        requests = 48
        sizes = itertools.cycle(range(soak_conversations(requests, 24)))
        found = memory_growth([100 * MB + 3 * MB * next(sizes) for _ in range(requests)])
        assert found.bytes_per_request.low == found.bytes_per_request.high == 0


class TestDrift:
    @given(st.floats(-1e6, 1e6), st.integers(8, 300))
    def test_steady_growth_is_found_exactly(self, growth, count):
        found = drift([1e8 + growth * index for index in range(count)])
        assert (found.value, found.low, found.high) == pytest.approx((growth,) * 3, abs=1e-4)

    @pytest.mark.parametrize("count", [8, 33, 133])
    def test_one_step_is_no_growth(self, count):
        for at in range(1, count):
            found = drift([100 * MB + (index >= at) * 64 * MB for index in range(count)])
            assert found.low <= 0 <= found.value <= found.high

    @pytest.mark.parametrize("growth", [0, 50_000])
    def test_the_interval_holds_the_drift_of_a_series_that_wanders(self, growth):
        random = np.random.default_rng(1)
        series = np.cumsum(growth + 40_000 * random.standard_normal((1000, 32)), axis=1)
        intervals = [drift(values.tolist()) for values in series]
        held = np.mean([interval.low <= growth <= interval.high for interval in intervals])
        assert 0.93 <= held < 1

    def test_passing_peaks_do_not_hide_growth(self):
        random = np.random.default_rng(1)
        found = drift([1000 * index + (random.random() < 0.1) * 16 * MB for index in range(64)])
        assert 500 < found.low <= 1000 <= found.high < 1500


class TestEdgeInputs:
    def test_every_input_is_tried_and_progress_names_it(self, run):
        seen = []
        found = run({}, requests=2, on_progress=lambda *progress: seen.append(progress))
        assert [edge_input.name for edge_input in found.edge_inputs] == NAMES
        assert not unhandled(found)
        total = 2 + len(NAMES)
        assert seen[0] == (0, total, "long use") and seen[-1] == (total, total, "exercised")
        assert {f"edge input: {name}" for name in NAMES} <= {what for _, _, what in seen}
        outcome = {edge_input.name: edge_input.outcome for edge_input in found.edge_inputs}
        assert outcome["longer than the context"] == "refused"
        assert outcome["emoji"] == "answered"

    @pytest.mark.parametrize("trouble", ["abort_at", SEGFAULTS])
    def test_a_death_is_reported_at_its_input_and_the_others_go_on(self, run, trouble):
        seen = []
        found = run({trouble: "\u200d"}, on_progress=lambda *progress: seen.append(progress))
        assert [edge_input.name for edge_input in found.edge_inputs] == NAMES
        assert unhandled(found) == ["emoji"]
        (crashed,) = (edge_input for edge_input in found.edge_inputs if edge_input.name == "emoji")
        assert (crashed.outcome, crashed.alive, crashed.prompt_tokens) == ("crashed", False, None)
        assert "crashed with SIG" in crashed.detail or "ended with status" in crashed.detail
        assert [done for done, _, _ in seen if done] == sorted(done for done, _, _ in seen if done)

    def test_a_hang_is_reported_at_its_input_and_the_others_go_on(self, run):
        found = run({"hang_at": "\u200d"}, exercise_s=12)
        assert [edge_input.name for edge_input in found.edge_inputs] == NAMES
        assert unhandled(found) == ["emoji"]
        assert (
            next(edge_input for edge_input in found.edge_inputs if edge_input.name == "emoji").detail
            == "no answer in 2 s"
        )

    def test_after_three_restarts_it_ends_and_reports_what_was_not_tried(self, run):
        found = run({"abort_at": "a"})  # "What is", "word ", ...
        crashed = [edge_input for edge_input in found.edge_inputs if edge_input.outcome == "crashed"]
        assert len(crashed) == 4 and unhandled(found) == [edge_input.name for edge_input in crashed]
        tried = [edge_input.name for edge_input in found.edge_inputs]
        assert f"Not tried after 4 crashes: {', '.join(NAMES[len(tried) :])}." in found.notes

    def test_a_soak_that_kills_the_runtime_is_an_input_that_was_not_handled(self, run):
        found = run({"abort_at": "Hello.", "abort_from": 20}, requests=48)
        assert found.memory is None
        first, *others = found.edge_inputs
        assert (first.name, first.outcome, first.handled) == ("long use", "crashed", False)
        assert first.detail.startswith("request 20 of 48: ")
        assert [edge_input.name for edge_input in others] == NAMES

    def test_a_model_that_does_not_open_is_an_error(self, run):
        with pytest.raises(StageFailed, check=coded("model-does-not-open")):
            run({"does_not_open": True})

    def test_a_short_run_tries_what_depends_on_the_weights(self, run):
        found = run({"abort_at": "\ufffd"}, requests=16, extent="short")
        tried = [edge_input.name for edge_input in found.edge_inputs]
        assert tried == ["longer than the context", "odd code points", "10,000 repeats of one character"]
        assert unhandled(found) == ["odd code points"] and found.memory

    def test_the_control_tokens_of_the_chat_template_come_first(self, tiny_checkpoint, tmp_path):
        found = control_tokens(tiny_checkpoint)
        assert [token.text for token in found[:2]] == ["<|im_start|>", "<|im_end|>"]
        assert len(found) == MAX_CONTROL_TOKENS and len(set(found)) == MAX_CONTROL_TOKENS
        assert control_tokens(tmp_path) == ()


class TestExtents:
    """Three variants of a version, int4 tried in full: how are the others tried?"""

    @pytest.fixture
    def extents(self, settings, tmp_path):
        def extents(*, alive=True, extent="full", int8_template=b"plain", rows=ROWS):
            registry = ModelRegistry(LocalObjectStore(tmp_path / "store"))
            variants = []
            for precision, template in (("fp16", b"plain"), ("int8", int8_template), ("int4", b"plain")):
                files = {"model.onnx": precision.encode(), "chat_template.jinja": template}
                write_files(tmp_path / precision, files)
                variants.append(stored_variant(registry, tmp_path / precision, precision))
            manifest, _ = registry.commit("home", SOURCE, {}, variants)
            version = registry.of(manifest)
            outcome = {"name": "emoji", "outcome": "answered", "detail": "", "prompt_tokens": 9, "alive": alive}
            for runtime in CALLS:
                record = {"runtime": runtime, "extent": extent, "memory": None, "edge_inputs": [outcome], "notes": []}
                found = Endurance.model_validate({**record, "versions": {}, "wall_s": 1})
                exam = EnduranceExam(runtime, ROWS, extent)
                version.record(exam.kind, found, exam.key(version.variant("int4"), settings))
            with working_in(Workshop(settings, registry)):
                found = {variant.precision: endurance_exams(variant, rows) for variant in version.variants}
            return {precision: {exam.extent for exam in exams} for precision, exams in found.items()}

        return extents

    def test_those_with_the_same_tokenizer_are_short(self, extents):
        assert extents() == {"fp16": {"short"}, "int8": {"short"}, "int4": {"full"}}

    def test_one_with_another_template_is_full(self, extents):
        assert extents(int8_template=b"swapped") == {"fp16": {"short"}, "int8": {"full"}, "int4": {"full"}}

    @pytest.mark.parametrize(
        "found", [{"alive": False}, {"extent": "short"}, {"rows": [*ROWS, *ROWS]}], ids=["unhandled", "short", "others"]
    )
    def test_all_are_full_without_one_that_handled_all_on_the_same_terms(self, extents, found):
        assert set().union(*extents(**found).values()) == {"full"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("built")
    return build_genai_model(make_tiny_checkpoint(directory / "checkpoint"), directory / "model")


class TestRealRuntimes:
    @pytest.mark.parametrize("runtime", CALLS)
    def test_all_edge_inputs_are_handled_and_memory_does_not_grow(self, runtime, model_dir, settings, tmp_path):
        before = {path.name: path.stat().st_mtime_ns for path in model_dir.iterdir()}
        found = examine_endurance(settings, Bench(model_dir, tmp_path / "work"), chat_prompts(), runtime)
        assert {path.name: path.stat().st_mtime_ns for path in model_dir.iterdir()} == before
        assert not unhandled(found)
        outcomes = {edge_input.name: edge_input for edge_input in found.edge_inputs}
        assert len(outcomes) == len(NAMES)
        too_long = outcomes["longer than the context"]
        assert too_long.outcome == "refused" and "context" in too_long.detail
        assert too_long.prompt_tokens > CONTEXT_LENGTH
        assert outcomes["unpaired surrogate"].outcome == "refused"
        assert outcomes["emoji"].outcome == outcomes["right to left"].outcome == "answered"
        assert outcomes["control tokens typed by a user"].control_tokens is True
        assert any(note.startswith("Text after a NUL character") for note in found.notes)
        assert found.memory.bytes_per_request.low <= settings.gate.max_memory_growth_bytes_per_request
        assert found.versions["onnxruntime"]

    @pytest.mark.parametrize("runtime", CALLS)
    def test_a_text_that_only_resembles_a_control_token_is_distinguished(self, runtime, model_dir, tmp_path):
        (end,) = (token for token in control_tokens(model_dir) if token.text == "<|im_end|>")
        typed = {"whole": end.text, "broken": "<|im_end|"}
        inputs = [
            {"name": name, "messages": [{"role": "user", "content": text}], "control_tokens": [[text, end.id]]}
            for name, text in typed.items()
        ]
        call = CALLS[runtime](
            model_dir=model_dir,
            conversations=[inputs[0]["messages"]],
            requests=0,
            new_tokens=4,
            edge_inputs=inputs,
            threads=2,
            step_deadline_s=60,
            cache_dir=tmp_path / "cache",
            journal=tmp_path / "journal.jsonl",
        )
        run_in_child(call, deadline_s=120, log_path=tmp_path / "child.log", work_dir=tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
        found = {line["outcome"]["name"]: line["outcome"]["control_tokens"] for line in lines if "outcome" in line}
        assert found == {"whole": True, "broken": False}

    def test_a_stored_variants_endurance_is_kept_and_reused(self, model_dir, settings, tmp_path):
        settings = settings.model_copy(update={"soak": SoakSettings(requests=0)})
        registry = ModelRegistry(LocalObjectStore(tmp_path / "store"))
        variant = stored_variant(registry, model_dir, "fp32")
        source = Source(digest="a" * 64, origin="x", architecture="Qwen2ForCausalLM", parameters=1)
        manifest, _ = registry.commit("home", source, {}, [variant])

        def examined(rows, runtime="genai"):
            with working_in(Workshop(settings, registry)):
                return examine.fn(EnduranceExam(runtime, rows), registry.of(manifest).variants[0])

        first = examined(ROWS)
        assert examined(ROWS) == first  # its wall time too
        assert examined(chat_prompts()).wall_s != first.wall_s
        assert examined(ROWS, "foundry").runtime == "foundry"
        assert len(list(evidence(registry, manifest, "exercise"))) == 3
