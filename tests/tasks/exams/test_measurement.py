import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.errors import StageFailed
from slmops.infra.settings import BenchmarkSettings, MachineSettings, Settings, SweepSettings
from slmops.tasks.exams.exam import Bench
from slmops.tasks.exams.measurement import Measurement, MeasurementExam, measure_variant, statistics_of, summarize
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import build_genai_model
from tests.support.measurements import raw_result, raw_row, swept_row

METRICS = [
    "load_ms",
    "ttft_ms",
    "prompt_processing_throughput_tps",
    "token_generation_throughput_tps",
    "inter_token_latency_ms",
    "e2e_latency_ms",
    "peak_rss_bytes",
    "cpu_percent",
    "size_bytes",
]
POSITIVE = st.floats(1e-3, 1e6)


@given(st.lists(POSITIVE, min_size=1, max_size=50))
def test_statistics_equal_numpy_s(values):
    found = statistics_of(values)
    assert found.p50 == pytest.approx(np.percentile(values, 50))
    assert found.p95 == pytest.approx(np.percentile(values, 95))
    assert found.count == len(values)
    if len(values) == 1:
        assert found.stdev is None
    else:
        assert found.stdev == pytest.approx(np.std(values, ddof=1), abs=1e-9)


@given(st.lists(st.tuples(POSITIVE, st.lists(POSITIVE, min_size=3, max_size=3)), min_size=1, max_size=8))
def test_a_measurement_keeps_every_row_and_its_medians(requests):
    rows = [raw_row(128, index, value, gaps) for index, (value, gaps) in enumerate(requests)]
    measurement = summarize(raw_result(rows), warmup=1, wall_s=3.0)
    assert list(measurement.metrics) == METRICS
    assert len(measurement.rows) == len(rows)
    assert measurement.metrics["ttft_ms"] == pytest.approx(statistics.median(value for value, _ in requests))
    gaps = [gap for _, row_gaps in requests for gap in row_gaps]
    assert measurement.metrics["inter_token_latency_ms"] == pytest.approx(statistics.median(gaps))
    assert measurement.by_prompt_length[0].statistics["inter_token_latency_ms"].count == len(gaps)
    assert Measurement.model_validate_json(measurement.model_dump_json()) == measurement


def test_the_flat_metrics_are_those_of_the_first_prompt_length():
    rows = [raw_row(128, 0, 10.0, [1.0, 2.0]), raw_row(128, 1, 20.0, [1.0, 2.0]), raw_row(16, 0, 3.0, [1.0, 2.0])]
    measurement = summarize(raw_result(rows), warmup=0, wall_s=1.0)
    assert measurement.metrics["ttft_ms"] == 15.0
    assert [length.prompt_tokens for length in measurement.by_prompt_length] == [128, 16]
    assert measurement.by_prompt_length[1].statistics["ttft_ms"].p50 == 3.0
    assert measurement.by_prompt_length[1].statistics["ttft_ms"].stdev is None


def test_the_sweep_is_kept_apart_from_the_measured_requests():
    rows = [raw_row(128, 0, 10.0, [1.0, 2.0])]
    result = raw_result(rows, sweep=[swept_row(32, 1.0), swept_row(64, 99.0, answered=None)], sweep_notes=["stopped"])
    measurement = summarize(result, warmup=0, wall_s=1.0)
    assert [(row.prompt_tokens, row.ttft_ms, row.answered) for row in measurement.sweep] == [
        (32, 1.0, True),
        (64, 99.0, None),
    ]
    assert measurement.sweep_notes == ("stopped",)
    assert measurement.metrics["ttft_ms"] == 10.0
    assert [length.prompt_tokens for length in measurement.by_prompt_length] == [128]
    assert Measurement.model_validate_json(measurement.model_dump_json()) == measurement


def test_a_benchmark_without_requests_is_an_error():
    with pytest.raises(StageFailed, check=coded("nothing-measured")):
        summarize(raw_result([]), warmup=0, wall_s=1.0)


def test_a_real_model_is_measured_in_a_child_process(tmp_path):
    model_dir = build_genai_model(make_tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "int4", "int4")
    benchmark = BenchmarkSettings(prompt_tokens=(24, 12), new_tokens=6, warmup=1, repetitions=2)
    sweep = SweepSettings(max_prompt_tokens=100, repetitions=2)
    settings = Settings(home=tmp_path / "home", benchmark=benchmark, sweep=sweep, machine=MachineSettings(threads=1))
    seen = []
    measurement = measure_variant(
        settings, Bench(model_dir, tmp_path / "work", lambda *progress: seen.append(progress))
    )
    assert list(measurement.metrics) == METRICS
    assert all(value >= 0 for value in measurement.metrics.values())
    assert [(row.prompt_tokens, row.repetition) for row in measurement.rows] == [(24, 0), (24, 1), (12, 0), (12, 1)]
    assert measurement.threads == 1
    assert measurement.metrics["size_bytes"] == sum(path.stat().st_size for path in model_dir.iterdir())
    assert measurement.metrics["peak_rss_bytes"] > 20_000_000
    assert {"measuring", "sweep, 64 prompt tokens"} <= {what for _, _, what in seen}
    swept = {row.prompt_tokens for row in measurement.sweep}
    assert swept == {32, 64, 100}
    assert Measurement.model_validate_json(measurement.model_dump_json()) == measurement


def test_a_damaged_model_is_a_clear_error_of_the_parent(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(StageFailed, check=coded("genai-config-not-valid")):
        measure_variant(Settings(home=tmp_path), Bench(tmp_path / "model", tmp_path / "work"))


@pytest.mark.parametrize(
    ("gaps_ms", "others", "reliable"),
    [
        ((2.0, 2.0, 2.0), None, True),  # an older record does not say
        ((2.0, 2.0, 2.0), 0.05, True),
        ((2.0, 2.0, 2.0), 0.2, False),
        ((2.0, 2.0, 40.0), 0.05, False),  # requests that differ this much say nothing of the next one
    ],
)
def test_a_busy_machine_s_figures_are_flagged_and_not_reused(
    gaps_ms: tuple[float, ...], others: float | None, reliable: bool
) -> None:
    rows = [raw_row(128, number, 10.0, [gap, gap]) for number, gap in enumerate(gaps_ms)]
    found = summarize(raw_result(rows, others_cpu_share=others, rounds=3), warmup=1, wall_s=1.0)
    assert (found.reliable, MeasurementExam().stands(found)) == (reliable, reliable)
    assert (found.warning is None) == reliable
    assert Measurement.model_validate_json(found.model_dump_json()) == found
