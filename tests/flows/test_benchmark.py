"""The flow `benchmark` on a real tiny model, against a real Prefect server."""

import shutil
import time
from typing import Any

import pytest
from prefect.client.schemas import State
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.flows.benchmark import benchmark
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.storage.manifest import Source
from slmops.infra.storage.opening import open_registry
from slmops.tasks.exams.exam import Bench
from slmops.tasks.exams.measurement import MEASUREMENT_SCHEMA, Measurement, measure_variant
from slmops.tasks.runs.events import REGRESSION
from slmops.tasks.runs.stage import final_state
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import build_genai_model
from tests.support.prefect_api import call, query
from tests.support.versions import add_evidence, evidence, stored_variant

pytestmark = pytest.mark.slow

SPEED = ("ttft_ms", "prompt_processing_throughput_tps", "token_generation_throughput_tps")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    work = tmp_path_factory.mktemp("benchmark")
    return build_genai_model(make_tiny_checkpoint(work / "checkpoint"), work / "model", "int4")


@pytest.fixture(autouse=True)
def small(home, monkeypatch):
    for name, value in {
        "BENCHMARK__REPETITIONS": "3",
        "BENCHMARK__NEW_TOKENS": "8",
        "SWEEP__MAX_PROMPT_TOKENS": "64",
        "MACHINE__THREADS": "1",
    }.items():
        monkeypatch.setenv(f"SLMOPS_{name}", value)


@pytest.fixture
def api(server):
    with temporary_settings({PREFECT_API_URL: server}):
        yield server


@pytest.fixture
def settings(small):
    from slmops.infra.settings import load_settings

    return load_settings()


@pytest.fixture
def registry(settings):
    return open_registry(settings)


@pytest.fixture
def commit(registry):
    def make(name, folder, precision="int4", others=()):
        variant = stored_variant(registry, folder, precision)
        source = Source(digest="0" * 64, origin="x", architecture="qwen2", parameters=1)
        return registry.commit(name, source, {}, [variant, *others])[0]

    return make


@pytest.fixture
def measured(settings, model_dir, tmp_path):
    return measure_variant(settings, Bench(model_dir, tmp_path / "work"))


def scaled(measured: Measurement, factor: float) -> Measurement:
    """The same measurement on a machine that is `factor` times as fast."""
    rows = [
        row.model_copy(
            update={
                "ttft_ms": row.ttft_ms / factor,
                "prompt_processing_throughput_tps": row.prompt_processing_throughput_tps * factor,
                "token_generation_throughput_tps": row.token_generation_throughput_tps * factor,
            }
        )
        for row in measured.rows
    ]
    metrics = measured.metrics | {"peak_rss_bytes": int(measured.metrics["peak_rss_bytes"] / factor)}
    return measured.model_copy(update={"rows": tuple(rows), "metrics": metrics})


def put(registry, manifest, measurement):
    record = {
        "schema": MEASUREMENT_SCHEMA,
        "variant": manifest.variants[0].digest,
        "measurement": measurement.model_dump(mode="json"),
    }
    add_evidence(registry, manifest, "measurement", record)


def run(reference: str) -> State[Any]:
    return final_state(benchmark, reference)


def events_of(api: str, name: str) -> list[dict[str, Any]]:
    wanted = {"event": {"name": [REGRESSION]}, "resource": {"id": [f"slmops.model.{name}"]}}
    found: list[dict[str, Any]] = call("POST", f"{api}/events/filter", {"filter": wanted})["events"]
    return found


def artifact_of(api: str, name: str) -> str:
    (artifact,) = query(api, "artifacts", artifacts={"key": {"any_": [f"slmops-benchmark-{name}"]}})
    return str(artifact["data"])


def test_a_version_is_measured_again_each_time(api, commit, registry, model_dir):
    manifest = commit("anew", model_dir)
    first = run("anew").result()
    assert (first.reference, first.regressed, first.summary) == ("anew@1", False, "anew@1 nothing to compare.")
    assert first.variants[0].changes == ()
    assert first.variants[0].metrics["ttft_ms"] > 0
    assert "# anew@1: benchmark" in artifact_of(api, "anew")

    second = run("anew@1").result()
    assert second.variants[0].earlier == 1
    assert {change.metric for change in second.variants[0].changes} == {*SPEED, "peak_rss_bytes", "size_bytes"}
    records = list(evidence(registry, manifest, "measurement"))
    assert len({record["measurement"]["metrics"]["ttft_ms"] for record in records}) == len(records) >= 2
    contract = second.to_contract()
    assert contract["reference"] == "anew@1"
    assert contract["regressed"] is second.regressed
    assert contract["variants"][0]["changes"][0]["metric"] == "ttft_ms"


def test_a_slowdown_is_a_completed_run_with_an_event(api, commit, registry, model_dir, measured):
    manifest = commit("slower", model_dir)
    put(registry, manifest, scaled(measured, 50))
    state = run("slower")
    assert state.is_completed()
    assert state.message.startswith("slower@1 worse: int4 time to first token")
    report = state.result()
    assert report.regressed
    assert {change.metric for change in report.worse} == {*SPEED, "peak_rss_bytes"}
    # It was measured twice before it was believed.
    assert len(list(evidence(registry, manifest, "measurement"))) == 3

    deadline = time.monotonic() + 240
    while not (events := events_of(api, "slower")):
        assert time.monotonic() < deadline, "the event did not arrive"
        time.sleep(0.5)
    (event,) = events
    assert event["resource"] == {"prefect.resource.id": "slmops.model.slower", "prefect.resource.name": "slower@1"}
    assert event["payload"]["reference"] == "slower@1"
    assert {change["metric"] for change in event["payload"]["changes"]} == {*SPEED, "peak_rss_bytes"}
    assert all(change["trend"] == "worse" for change in event["payload"]["changes"])
    assert any(resource["prefect.resource.role"] == "flow-run" for resource in event["related"])
    text = artifact_of(api, "slower")
    assert "# slower@1: regressed" in text
    assert "| **worse**" in text


def test_a_speedup_is_no_regression(api, commit, registry, model_dir, measured):
    manifest = commit("faster", model_dir)
    put(registry, manifest, scaled(measured, 1 / 50))
    report = run("faster").result()
    assert not report.regressed
    assert report.summary == "faster@1 no regression."
    assert {change.metric for change in report.variants[0].changes if change.trend == "better"} >= set(SPEED)
    assert len(list(evidence(registry, manifest, "measurement"))) == 2
    assert events_of(api, "faster") == []


def test_a_variant_that_no_longer_runs_fails_the_run_and_the_others_go_on(api, commit, registry, model_dir, tmp_path):
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    (broken / "genai_config.json").write_text("{")
    other = commit("whole", model_dir).variants[0]
    manifest = commit("partly", broken, "int8", others=[other])
    state = run("partly")
    assert state.is_failed()
    with pytest.raises(StageFailed, check=coded("variant-not-measured", "partly@1", "int8: ", "genai_config.json")):
        state.result()
    assert len(list(evidence(registry, manifest, "measurement"))) == 1
    assert "Not measured" in artifact_of(api, "partly")


def test_a_version_that_is_not_there_is_bad_input(api, registry):
    with pytest.raises(BadInput, check=coded("version-missing", "nowhere")):
        run("nowhere").result()


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ({"lm_eval_on_checkpoint": True}, coded("bad-input", "No lm-eval task is named")),
        ({"lm_eval_tasks": ["mine"], "lm_eval_limit": 0}, coded("bad-input", "The limit is 0 documents")),
        (
            {"lm_eval_tasks": ["mine"], "lm_eval_include": "/gone/for/good"},
            coded("lm-eval-folder-missing", "/gone/for/good"),
        ),
    ],
)
def test_a_bad_question_to_lm_eval_is_refused_before_anything_is_measured(
    api, commit, registry, model_dir, asked, refused
):
    manifest = commit("home", model_dir)
    with pytest.raises(BadInput, check=refused):
        benchmark("home", **asked)
    assert not list(evidence(registry, manifest, "measurement"))
