import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.genai.calls import TemplateMismatches, Vocabulary
from slmops.infra.settings import MachineSettings, Settings
from slmops.infra.storage.manifest import Source
from slmops.infra.storage.opening import open_registry
from slmops.tasks.exams.evaluation import EvaluatedRow, Evaluation
from slmops.tasks.exams.measurement import MEASUREMENT_SCHEMA
from slmops.tasks.verdict.history import Figures, compare_versions, history_of
from tests.support.measurements import HARDWARE, make_measurement
from tests.support.versions import add_evidence

TTFTS = (10.0, 10.1, 10.2, 9.9, 10.05)


def row(number, score, kl=0.01, positions=10):
    return EvaluatedRow(
        id=number,
        answer="a",
        exact_match=score == 1,
        identical_to_reference=True,
        prompt_tokens=3,
        template_matches=True,
        positions=positions,
        finite_positions=positions,
        top1_agreement=1.0,
        kl_divergence=kl,
        score=score,
    )


def evaluation(rows, rows_sha256="a" * 64, reference=512):
    return Evaluation(
        rows=tuple(rows),
        template_mismatches=TemplateMismatches(count=0, example=None),
        positions=sum(row.positions for row in rows),
        finite_logits=1.0,
        top1_agreement=1.0,
        kl_divergence=0.01,
        kl_divergence_p99=0.02,
        perplexity=2.0,
        reference_perplexity=2.0,
        exact_match=None,
        reference_exact_match=None,
        identical_answers=1.0,
        empty_answers=0,
        vocabulary=Vocabulary(variant=512, reference=reference, compared=512),
        rows_sha256=rows_sha256,
        threads=2,
        versions={},
        wall_s=1.0,
        peak_rss_bytes=1,
    )


def compared(before, after):
    sides = [Figures(measurements=tuple(side) if isinstance(side, list) else (side,)) for side in (before, after)]
    return compare_versions("int4", *sides)


def trends(comparison):
    return {change.metric: change.trend for change in comparison.changes}


def test_the_same_figures_are_the_same():
    found = compared(make_measurement(TTFTS), make_measurement(TTFTS))
    assert set(trends(found).values()) == {"same"}
    assert list(trends(found)) == [
        "ttft_ms",
        "prompt_processing_throughput_tps",
        "token_generation_throughput_tps",
        "peak_rss_bytes",
        "size_bytes",
    ]
    assert (found.notes, found.earlier_measurements) == ((), 1)


@pytest.mark.parametrize(
    ("factor", "trend"), [(2.0, "worse"), (1.08, "worse"), (1.03, "same"), (0.97, "same"), (0.5, "better")]
)
def test_time_to_the_first_token_has_a_trend_beyond_five_percent(factor, trend):
    found = compared(make_measurement(TTFTS), make_measurement([factor * value for value in TTFTS]))
    change = next(change for change in found.changes if change.metric == "ttft_ms")
    assert (change.trend, change.before, change.after) == (trend, 10.05, pytest.approx(factor * 10.05))
    assert change.change.low <= change.change.value <= change.change.high
    assert change.change.value == pytest.approx(factor)
    assert trends(found)["prompt_processing_throughput_tps"] == trend


def test_a_larger_throughput_is_better():
    assert trends(compared(make_measurement(gap_ms=2.0), make_measurement(gap_ms=1.0)))[
        "token_generation_throughput_tps"
    ] == ("better")


@given(st.lists(st.floats(1.0, 100.0), min_size=3, max_size=12))
def test_requests_that_vary_as_much_as_they_differ_show_no_trend(values):
    found = compared(make_measurement(values), make_measurement([*values, *values]))
    assert trends(found)["ttft_ms"] == "same"


def test_noise_hides_a_small_change():
    noisy = (5.0, 10.0, 20.0, 8.0, 14.0)
    found = compared(make_measurement(noisy), make_measurement([1.1 * value for value in noisy]))
    assert trends(found)["ttft_ms"] == "same"


def test_a_change_within_the_spread_of_earlier_runs_does_not_count():
    slow, fast = ([factor * value for value in TTFTS] for factor in (2.0, 1.0))
    now = make_measurement([1.7 * value for value in TTFTS])
    assert trends(compared(make_measurement(fast), now))["ttft_ms"] == "worse"
    runs = [make_measurement(slow if number == 2 else fast) for number in range(5)]
    assert trends(compared(runs, now))["ttft_ms"] == "same"


def test_a_second_look_must_confirm_it():
    slow = make_measurement([2 * value for value in TTFTS])
    assert trends(compared(make_measurement(TTFTS), [slow, slow]))["ttft_ms"] == "worse"
    assert trends(compared(make_measurement(TTFTS), [slow, make_measurement(TTFTS)]))["ttft_ms"] == "same"


@pytest.mark.parametrize(("size", "trend"), [(500, "same"), (504, "same"), (510, "worse"), (400, "better")])
def test_size_is_exact_from_one_percent_on(size, trend):
    assert trends(compared(make_measurement(), make_measurement(size_bytes=size)))["size_bytes"] == trend


@pytest.mark.parametrize(("peak", "trend"), [(1090, "same"), (1200, "worse"), (800, "better")])
def test_memory_has_a_trend_beyond_ten_percent(peak, trend):
    assert trends(compared(make_measurement(), make_measurement(peak_rss_bytes=peak)))["peak_rss_bytes"] == trend


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"hardware": HARDWARE | {"cpu": "fast"}}, "the processor fast, not x"),
        ({"hardware": HARDWARE | {"logical_cores": 8}}, "logical cores 8, not 2"),
        ({"hardware": HARDWARE | {"ram_bytes": 16_000_000_000}}, "16.0 GB of memory, not 8.0"),
        ({"hardware": HARDWARE | {"os": "Windows-11"}}, "the system Windows, not Linux"),
        ({"threads": 8}, "8 threads, not 2"),
        ({"execution_provider": "cuda"}, "the execution provider cuda, not unknown"),
    ],
)
def test_other_conditions_are_reported_and_only_size_is_compared(changes, note):
    found = compared(make_measurement(TTFTS, **changes), make_measurement([3 * value for value in TTFTS]))
    assert list(trends(found)) == ["size_bytes"]
    assert found.earlier_measurements == 0
    assert note in found.notes[0]


def test_a_new_kernel_is_the_same_machine():
    other = HARDWARE | {"os": "Linux-6.2", "ram_bytes": 8_000_100_000}
    found = compared(make_measurement(TTFTS, hardware=other), make_measurement(TTFTS))
    assert "ttft_ms" in trends(found)
    assert found.notes == ()


def test_the_newest_measurements_of_the_same_kind_are_taken():
    elsewhere = make_measurement([value / 10 for value in TTFTS], threads=8)
    runs = [make_measurement([value / 100 for value in TTFTS])] + [make_measurement(TTFTS)] * 5 + [elsewhere]
    found = compared(runs, make_measurement(TTFTS))
    assert found.earlier_measurements == 5
    assert trends(found)["ttft_ms"] == "same"


def test_another_runtime_is_compared_and_named():
    found = compared(make_measurement(TTFTS), make_measurement(TTFTS, versions={"onnxruntime": "2"}))
    assert found.notes == ("int4: measured with onnxruntime 1 before and with onnxruntime 2 now.",)
    assert "ttft_ms" in trends(found)


def test_scores_are_paired_by_row():
    before = evaluation([row(number, 1.0) for number in range(40)])
    after = evaluation([row(number, float(number >= 20)) for number in reversed(range(40))])
    found = compare_versions("int4", Figures(evaluation=before), Figures(evaluation=after))
    (score, _) = found.changes
    assert (score.metric, score.before, score.after, score.trend) == ("score", 1.0, 0.5, "worse")
    assert score.change.value == -0.5
    assert score.change.high < 0
    back = compare_versions("int4", Figures(evaluation=after), Figures(evaluation=before))
    assert trends(back)["score"] == "better"


def test_few_other_answers_are_no_trend():
    before = evaluation([row(number, 1.0) for number in range(40)])
    after = evaluation([row(number, float(number != 7)) for number in range(40)])
    assert trends(compare_versions("int4", Figures(evaluation=before), Figures(evaluation=after)))["score"] == "same"


def test_other_rows_are_not_compared():
    before, after = (evaluation([row(1, 1.0)], rows_sha256=digest * 64) for digest in "ab")
    found = compare_versions("int4", Figures(evaluation=before), Figures(evaluation=after))
    assert found.changes == ()
    assert found.notes == ("int4: quality cannot be compared, because the earlier version was judged on other rows.",)


@pytest.mark.parametrize(("factor", "trend"), [(2.0, "worse"), (1.01, "same"), (0.5, "better")])
def test_the_divergence_is_compared_row_by_row(factor, trend):
    kls = [0.01 + 0.001 * number for number in range(20)]
    before, after = (
        evaluation([row(number, 1.0, scale * kl, positions=5 + number) for number, kl in enumerate(kls)])
        for scale in (1.0, factor)
    )
    found = compare_versions("int4", Figures(evaluation=before), Figures(evaluation=after))
    change = next(change for change in found.changes if change.metric == "kl_divergence")
    assert change.trend == trend
    assert change.change.value == pytest.approx(change.after - change.before)
    assert change.after == pytest.approx(factor * change.before)


def test_a_divergence_that_is_not_finite_is_reported():
    before, after = (evaluation([row(number, 1.0, kl) for number in range(3)]) for kl in (0.01, None))
    found = compare_versions("int4", Figures(evaluation=before), Figures(evaluation=after))
    assert "not finite" in found.notes[0]


# From the registry


@pytest.fixture
def registry(settings):
    return open_registry(settings)


@pytest.fixture
def commit(registry, tmp_path):
    """Make versions of a model whose int4 files have the given text."""

    def make(text, *precisions):
        variants = []
        for precision in precisions or ("int4",):
            folder = tmp_path / f"{text}-{precision}"
            folder.mkdir()
            (folder / "model.onnx").write_text(text + precision)
            variants.append(stored(registry.add_files(folder), precision))
        source = Source(digest="0" * 64, origin="x", architecture="y", parameters=1)
        return registry.commit("home", source, {}, variants)[0]

    return make


def stored(files, precision):
    from slmops.infra.storage.manifest import StoredVariant

    names = {"device": "cpu", "execution_provider": "cpu", "recipe": precision, "recipe_digest": "1" * 64}
    return StoredVariant(precision=precision, files=files, **names)


def put_measurement(registry, manifest, measurement, precision="int4", schema=MEASUREMENT_SCHEMA):
    variant = manifest.variant(precision)
    record = {"schema": schema, "variant": variant.digest, "measurement": measurement.model_dump(mode="json")}
    add_evidence(registry, manifest, "measurement", record)


def put_evaluation(registry, manifest, evaluated, precision="int4"):
    record = {"precision": precision, "rows": [], "evaluation": evaluated.model_dump(mode="json")}
    add_evidence(registry, manifest, "evaluation", record)


def test_the_first_version_has_no_history(commit, registry, settings):
    assert history_of(registry.of(commit("one")), settings.threads) is None


def test_a_version_is_compared_with_the_one_before_it(commit, registry, home):
    settings = Settings(home=home, machine=MachineSettings(threads=2))
    for text, factor in (("one", 5.0), ("two", 1.0), ("three", 2.0)):
        manifest = commit(text)
        put_measurement(registry, manifest, make_measurement([factor * value for value in TTFTS]))
        put_evaluation(registry, manifest, evaluation([row(number, 1.0) for number in range(5)]))
    history = history_of(registry.of(manifest), settings.threads)
    assert history.previous == "home@2"
    assert trends(history)["ttft_ms"] == "worse"
    assert trends(history)["score"] == "same"
    assert history.notes == ()
    assert history_of(registry.version("home", 2), settings.threads).previous == "home@1"


def test_the_earlier_evaluation_on_the_same_rows_is_found(commit, registry, settings):
    first, second = commit("one"), commit("two")
    put_evaluation(registry, first, evaluation([row(1, 1.0)], rows_sha256="a" * 64))
    put_evaluation(registry, first, evaluation([row(1, 0.0)], rows_sha256="b" * 64))
    put_evaluation(registry, second, evaluation([row(1, 1.0)], rows_sha256="a" * 64))
    (score, _) = history_of(registry.of(second), settings.threads).changes
    assert (score.metric, score.before, score.after) == ("score", 1.0, 1.0)


def test_figures_of_an_older_method_and_new_precisions_are_reported(commit, registry, home):
    settings = Settings(home=home, machine=MachineSettings(threads=2))
    first, second = commit("one"), commit("two", "int4", "int8")
    put_measurement(registry, first, make_measurement([value / 9 for value in TTFTS]), schema=1)
    put_measurement(registry, second, make_measurement(TTFTS))
    history = history_of(registry.of(second), settings.threads)
    assert history.changes == ()
    assert history.notes == (
        "int4: there is no earlier measurement by the present method.",
        "int8: home@1 has none.",
    )
