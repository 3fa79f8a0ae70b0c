"""A store that an earlier slmops wrote: it opens, it is shown, and what it answers is not asked again.

`tests/data/store_before` is what deploys, a benchmark, a retrain and notes of an earlier version left, without blobs.
File names, keys, digests and records on disk are a contract: whatever changes in the code, these stay readable, and the
same questions have the same keys.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

from slmops.deployments.cli import app as cli
from slmops.infra.settings import Settings, StoreSettings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import CHAMPION, ModelRegistry
from slmops.infra.storage.signatures import check_signature
from slmops.tasks.build.search import last_search
from slmops.tasks.evidence import KINDS
from slmops.tasks.exams import answers, endurance, lm_eval, measurement, text
from slmops.tasks.exams.exam import Exam, examine
from slmops.tasks.foundry.proof import last_proof
from slmops.tasks.questions.evaluation_set import EvaluationSet, read_evaluation_set
from slmops.tasks.training.comparison import last_retrain
from slmops.tasks.verdict.history import history_of
from slmops.tasks.versions.commit import last_budget
from slmops.tasks.workshop import Workshop, working_in
from tests.support.lm_eval_tasks import write_tasks
from tests.support.snapshots import JsonDocument, PlainText
from tests.support.versions import add_evidence

BEFORE = Path(__file__).parents[1] / "data" / "store_before"
# What the deploys were run with.
ASKED = {
    "SLMOPS_EVALUATION__BATCH_SIZE": "8",  # that release's default: a batch of another size has other roundings
    "SLMOPS_EVALUATION__MAX_ROWS": "2",
    "SLMOPS_EVALUATION__MAX_NEW_TOKENS": "4",
    "SLMOPS_EVALUATION__MAX_POSITIONS": "16",
    "SLMOPS_EVALUATION__MAX_TEXT_TOKENS": "40",
    "SLMOPS_BENCHMARK__REPETITIONS": "2",
    "SLMOPS_BENCHMARK__NEW_TOKENS": "4",
    "SLMOPS_BENCHMARK__PROMPT_TOKENS": "[8]",
    "SLMOPS_SWEEP__MAX_PROMPT_TOKENS": "64",
    "SLMOPS_SWEEP__REPETITIONS": "1",
    "SLMOPS_SOAK__REQUESTS": "6",
    "SLMOPS_SOAK__NEW_TOKENS": "1",
    "SLMOPS_GATE__MAX_CLIFF_RATIO": "100",
    "SLMOPS_MACHINE__THREADS": "2",
}
HOST = {"cores": 2, "machine": "x86_64", "python": "3.11.7", "ram_bytes": 25276518400, "system": "Linux"}
PACKAGES = {
    "foundry-local-sdk": "2.2.1",
    "onnxruntime": "1.31.0",
    "onnxruntime-genai": "0.18.0",
    "onnxruntime-genai-core": "0.18.0",
    "tokenizers": "0.23.3",
    "transformers": "5.23.0",
    "lm-eval": "0.4.13",
}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    home = tmp_path / "home"
    shutil.copytree(BEFORE, home / "store", ignore=shutil.ignore_patterns("asked"))
    for name, value in {**ASKED, "SLMOPS_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    return Settings()


@pytest.fixture
def registry(settings: Settings) -> ModelRegistry:
    return open_registry(settings)


@pytest.fixture
def the_same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is the one, and has the packages, that the evidence was gathered on and with."""
    installed = importlib.metadata.distribution
    monkeypatch.setattr(measurement, "host_facts", lambda: HOST)
    monkeypatch.setattr(
        importlib.metadata,
        "distribution",  # which `version` asks
        lambda name: SimpleNamespace(version=PACKAGES[name]) if name in PACKAGES else installed(name),
    )


def asked_rows(regex: str | None = ".*") -> EvaluationSet:
    return read_evaluation_set(str(BEFORE / "asked" / "eval.jsonl"), None, output_regex=regex)


def contents(version: int, kind: str) -> Iterator[dict[str, Any]]:
    for path in sorted((BEFORE / "models" / "home" / str(version) / "evidence").glob(f"{kind}-*.json")):
        record = json.loads(path.read_text("utf-8"))
        if record["kind"] == kind:
            yield record["content"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.run(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["list", "show-home@1", "diff-home@1-home@2", "history-home"])
def test_it_is_printed_as_it_is_recorded(
    command: str, settings: Settings, capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    printed = said(capsys, *command.split("-")).replace(settings.home_dir.as_uri(), "HOME")
    assert printed == snapshot(extension_class=PlainText)


@pytest.mark.parametrize("command", ["list", "diff-home@1-home@2"])
def test_its_documents_are_as_they_are_recorded(
    command: str, settings: Settings, capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    printed = said(capsys, *command.split("-"), "--json").replace(settings.home_dir.as_uri(), "HOME")
    assert json.loads(printed) == snapshot(extension_class=JsonDocument)


def test_a_version_is_shown_with_its_evidence(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(said(capsys, "show", "home@stable", "--json"))
    *_, deployed = contents(1, "deploy")
    assert {name: shown["deploy"][name] for name in deployed} == deployed
    assert shown["deploy"]["recorded_at"] == "2026-11-29T23:00:51.296726+00:00"
    assert (shown["tags"], shown["signed"]) == ({"team": "home"}, True)
    assert shown["notes"] == [{"at": "2026-11-29T23:00:36.832311+00:00", "text": "Kept for the tests"}]
    assert shown["digest"] == "42c8ce6f666bf37767c067fcb41b06addf7e5a45b24c6137a40e7453bbedf476"


def test_its_logs_bill_of_materials_and_champions_are_shown(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "== int4: built in" in said(capsys, "logs", "home@1")
    (bill,) = contents(1, "sbom")
    assert json.loads(said(capsys, "sbom", "home@1")) == bill
    history = json.loads(said(capsys, "history", "home", "--json"))
    assert [(change["version"], change["former"]) for change in history["history"]] == [(2, 1), (1, None)]


def test_its_signature_holds(settings: Settings, registry: ModelRegistry) -> None:
    key = StoreSettings(verification_key=BEFORE / "asked" / "key.pub")
    check_signature(registry.version("home", 1), key)


# What a deploy asks of a variant: the answers on record are those of the same questions. Without the version's files in
# the store, no question can be asked anew. Template parity is not among them: more conversations are compared now.
QUESTIONS: dict[str, tuple[int, str, Callable[[Settings], Exam[Any]]]] = {
    "measurement": (1, "int4", lambda settings: measurement.MeasurementExam()),
    "measurement of int8": (2, "int8", lambda settings: measurement.MeasurementExam()),
    "evaluation": (1, "int4", lambda settings: answers.AnswersExam(asked_rows())),
    "evaluation without a format": (2, "int8", lambda settings: answers.AnswersExam(asked_rows(None))),
    "exercise in genai": (1, "int4", lambda settings: endurance.EnduranceExam("genai", asked_rows().rows)),
    "exercise in foundry": (1, "int4", lambda settings: endurance.EnduranceExam("foundry", asked_rows().rows)),
    "text": (
        1,
        "int4",
        lambda settings: text.TextExam(
            text.read_text_file(BEFORE / "asked" / "text.txt", settings.evaluation.max_text_tokens)
        ),
    ),
    "lm-eval": (
        1,
        "int4",
        lambda settings: lm_eval.LmEvalExam(
            lm_eval.LmEvalTasks(names=("house_choice",), include_path=str(settings.home_dir / "lm"), limit=2)
        ),
    ),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_its_answers_are_reused(
    question: str, registry: ModelRegistry, settings: Settings, the_same_machine: None
) -> None:
    write_tasks(settings.home_dir / "lm")
    number, precision, exam = QUESTIONS[question]
    version = registry.version("home", number)
    names = {entry.key for entry in version.evidence_entries()}
    with working_in(Workshop(settings, registry)):
        found = examine.fn(exam(settings), version.variant(precision))
    assert found is not None
    assert {entry.key for entry in version.evidence_entries()} == names


def test_its_other_records_are_read_as_they_were_written(registry: ModelRegistry, settings: Settings) -> None:
    first, second = registry.version("home", 1), registry.version("home", 2)
    proof = last_proof(first.variant("int4"), asked_rows().rows[0])
    assert proof is not None
    assert proof.question == "Turn on the light"
    assert last_budget(first) == ("max-size=1GB",)
    searched = last_search(first)
    assert searched is not None
    assert searched.chosen == {"int4": "int4-fast"}
    retrained = last_retrain.fn("home", "0123456789abcdef", registry)
    assert retrained is not None
    assert (retrained.status, retrained.version) == ("kept", 2)
    assert registry.alias("home", CHAMPION) == 2
    rows = answers.last_evaluation_set(first)
    assert rows is not None
    assert [row.id for row in rows.rows] == ["r0", "r1"]
    history = history_of(second, settings.threads)
    assert history is not None
    assert history.previous == "home@1"
    assert {change.metric for change in history.changes} >= {"ttft_ms", "size_bytes", "score"}
    assert len(measurement.measurements_of(first.variant("int4"))) == 2


def test_the_same_record_has_the_same_name_and_bytes(registry: ModelRegistry) -> None:
    """A record of a keyed kind, written anew, is the same file but for the time."""
    version = registry.version("home", 1)
    (asked,) = contents(1, "text")
    path = next((BEFORE / "models" / "home" / "1" / "evidence").glob("text-*.json"))
    add_evidence(registry, version.manifest, "text", asked, path.stem.removeprefix("text-"))
    written = json.loads(registry.objects.read_bytes(version.evidence_key(path.name)))
    before = json.loads(path.read_text("utf-8"))
    assert {**written, "recorded_at": ""} == {**before, "recorded_at": ""}


def test_every_record_is_of_a_declared_kind_and_is_the_same_when_written_again(registry: ModelRegistry) -> None:
    seen = set()
    for version in registry.all_versions():
        for entry in version.evidence_entries():
            if entry.key.endswith(".json"):
                before = json.loads(registry.objects.read_bytes(entry.key))
                kind = KINDS[before["kind"]]
                beside = {name: value for name, value in before["content"].items() if name != kind.field}
                value = kind.from_content(before["content"])
                assert (
                    json.loads(json.dumps(kind.to_content(value, beside if kind.field else None))) == before["content"]
                )
                seen.add(kind.name)
    later = {"climb", "constraint", "license", "response-format", "source-lengths"}
    assert set(KINDS) - seen <= {*later, "proof-fp16", "proof-fp32"}
