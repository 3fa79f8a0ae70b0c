"""The flow `deploy` with builds that end at once: what is stored, reported and passed on."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.schemas import State
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.flows.deploy import deploy
from slmops.flows.qualify import DeployEnded
from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import BUILD, SBOM
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.version import Version
from slmops.tasks.build.build import BuiltVariant
from slmops.tasks.build.variants import Built
from slmops.tasks.report.markdown import to_markdown
from slmops.tasks.runs.stage import final_state
from slmops.tasks.workshop import workshop
from tests.support import reports
from tests.support.versions import FILES, store_version

FLOW = import_module("slmops.flows.deploy")


class Stages:
    """Results of the stages that would need a real checkpoint."""

    def __init__(self, registry: ModelRegistry, folder: Path) -> None:
        self.registry, self.folder = registry, folder
        self.errors: dict[str, str] = {}
        self.precisions = ["int4"]
        self.qualified: list[tuple[Version, dict[str, Any]]] = []

    def prepare(self, *asked: Any) -> Any:
        """Return a checkpoint that nothing opens."""
        inspection = SimpleNamespace(
            kind="huggingface",
            parameters=7,
            warnings=("It is a test.",),
            architecture="Qwen2ForCausalLM",
            quantized=None,
        )
        fields = {"folder": self.folder, "digest": "a" * 64, "origin": "here", "inspection": inspection}
        return SimpleNamespace(**fields, model_copy=lambda update: SimpleNamespace(**{**fields, **update}))

    def build(self, *asked: Any) -> Built:
        """Store a variant of each precision."""
        built = []
        for precision in self.precisions:
            manifest = store_version(self.registry, self.folder / precision, FILES, name="elsewhere")
            variant = manifest.variants[0].model_copy(update={"precision": precision})
            built.append(BuiltVariant(variant=variant, wall_s=1.0, peak_rss_bytes=2, log="", warnings=("Slow here.",)))
        return Built(built, self.errors)

    def qualify(self, asked: Any, version: Version, prepared: Any, **how: Any) -> Any:
        """Pass every version."""
        self.qualified.append((version, {"asked": asked, "gate": workshop().settings.gate, **how}))
        return reports.full_report(name=version.name, version=version.number, status="registered")


@pytest.fixture
def stages(settings: Settings, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stages]:
    stages = Stages(open_registry(settings), tmp_path / "checkpoint")
    stages.folder.mkdir()
    for name, stand_in in {
        "check_environment": lambda *asked: None,
        "check_templates": lambda *asked: None,
        "prove_family": lambda prepared, precisions: None,
        "check_room": lambda *asked, **how: None,
        "prepare_checkpoint": stages.prepare,
        "build_each": stages.build,
        "qualify": stages.qualify,
    }.items():
        monkeypatch.setattr(FLOW, name, stand_in)
    with temporary_settings({PREFECT_API_URL: server}):
        yield stages


def run(stages: Stages, **options: Any) -> State[Any]:
    return final_state(deploy, str(stages.folder), "home", ["int8", "int4"], **options)


def test_what_was_built_is_a_version_with_its_provenance_before_it_is_judged(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("MAX_KL_DIVERGENCE", "MAX_QUALITY_LOSS", "MAX_CLIFF_RATIO"):
        monkeypatch.setenv(f"SLMOPS_GATE__{limit}", "9" if limit != "MAX_QUALITY_LOSS" else "0.9")  # of this worker
    stages.errors = {"int8": "Olive could not build it."}
    state = run(stages, budget=["max-size=1GB"], max_kl_divergence=0.5, max_cliff_ratio=2, promote=True)
    assert state.is_completed()
    ((version, handed_on),) = stages.qualified
    assert (version.reference, version.manifest.source.parameters) == ("home@1", 7)
    assert version.latest(SBOM) is not None
    assert [record.precision for record in version.all(BUILD)] == ["int4"]
    assert handed_on["errors"] == {"int8": "Olive could not build it."}
    assert handed_on["warnings"][:2] == ("It is a test.", "Slow here.")
    asked = handed_on["asked"]
    assert (tuple(asked.budget), asked.promote) == (("max-size=1GB",), True)
    gate = handed_on["gate"]
    assert (gate.max_kl_divergence, gate.max_cliff_ratio, gate.max_quality_loss) == (0.5, 2, 0.9)


def test_without_a_variant_there_is_no_version_and_the_report_says_why(stages: Stages) -> None:
    stages.precisions, stages.errors = [], {"int8": "No memory.", "int4": "Killed."}
    state = run(stages)
    ended = state.result(raise_on_failure=False)
    assert isinstance(ended, DeployEnded)
    assert (state.name, ended.exit_code, ended.report.version) == ("Failed", 1, None)
    assert {variant.precision: variant.error for variant in ended.report.variants} == stages.errors
    assert stages.registry.names() == []
    assert stages.qualified == []


def test_what_is_only_built_is_stored_with_its_checkpoint_and_judged_by_nobody(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without the variants' execution provider builds them for one that has it."""
    checked: list[str] = []
    monkeypatch.setattr(FLOW, "check_environment", lambda provider, settings: checked.append(provider))
    monkeypatch.setattr(FLOW, "put_into_store", lambda prepared, registry: f"store://{'c' * 64}")
    state = run(stages, device="gpu", execution_provider="webgpu", build_only=True)
    report = state.result()
    assert (state.name, report.reference, report.status, report.selected) == ("Completed", "home@1", "built", None)
    assert [(variant.precision, variant.status) for variant in report.variants] == [("int4", "built")]
    assert "slmops regate home@1" in report.reason
    assert "not judged yet" in to_markdown(report)
    version = stages.registry.find("home@1")
    assert version.manifest.source.origin == f"store://{'c' * 64}"
    assert (version.deployed.variants, version.serving, version.aliases) == ((), None, ())
    assert (checked, stages.qualified) == (["cpu"], [])

    stages.errors = {"int8": "Olive could not build it."}
    ended = run(stages, build_only=True).result(raise_on_failure=False)
    assert (ended.exit_code, ended.report.status) == (1, "failed")


def test_a_plain_copy_has_a_folder_a_precision_and_its_model_card(stages: Stages, tmp_path: Path) -> None:
    run(stages, output=str(tmp_path / "copy"))
    folder = tmp_path / "copy" / "int4"
    assert (folder / "model.onnx").read_bytes() == FILES["model.onnx"]
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize("options", [{"budget": ["max-size=much"]}, {"text_file": "nowhere.txt"}, {"scorer": "magic"}])
def test_bad_input_builds_nothing(stages: Stages, options: dict[str, Any]) -> None:
    state = run(stages, **options)
    assert isinstance(state.result(raise_on_failure=False), BadInput)
    assert stages.registry.names() == []
