"""Does the machine have the proven stack, and room for a checkpoint: each row can fail, and says what to do."""

import sys
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.settings import MachineSettings, Settings
from slmops.tasks.build.recipes import load_recipe
from slmops.tasks.environment import checks as environment
from slmops.tasks.environment.checks import (
    CALIBRATED_BY_DEFAULT,
    Check,
    check_execution_provider,
    check_packages,
    check_resources,
    check_system,
    locked_versions,
    require_packages,
    require_resources,
)
from slmops.tasks.environment.estimates import estimate_build_ram, estimate_stages
from slmops.tasks.environment.host import builder_versions, host_facts
from slmops.tasks.request.parameters import PRECISIONS
from tests.support.errors import coded
from tests.support.inspections import inspection

STACK = {"olive-ai", "onnxruntime-genai", "onnxruntime", "foundry-local-sdk", "transformers", "torch", "prefect"}


def machine(home: Path, **sizes: int | bool) -> Settings:
    return Settings(home=home, machine=MachineSettings.model_validate(sizes))


class TestPackages:
    def test_this_environment_is_the_proven_one(self) -> None:
        checks = check_packages()
        require_packages(checks)
        names = {check.name for check in checks}
        assert names > STACK
        assert {"Foundry Local's onnxruntime", "Foundry Local's onnxruntime-genai-core"} < names

    def test_another_version_is_named_with_the_way_to_the_proven_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        installed = metadata.version
        monkeypatch.setattr(metadata, "version", lambda name: "0.0.1" if name == "transformers" else installed(name))
        failed = [check for check in check_packages() if not check.ok]
        assert [(check.name, check.found) for check in failed] == [("transformers", "0.0.1")]
        with pytest.raises(
            StageFailed, check=coded("environment-unsuitable", "transformers is 0.0.1, needed 5.")
        ) as caught:
            require_packages(check_packages())
        assert "pip install 'transformers==5." in caught.value.what_to_do

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        installed = metadata.version

        def without_peft(name: str) -> str:
            if name == "peft":
                raise metadata.PackageNotFoundError(name)
            return installed(name)

        monkeypatch.setattr(metadata, "version", without_peft)
        with pytest.raises(StageFailed, check=coded("environment-unsuitable", "peft")):
            require_packages(check_packages())

    @pytest.mark.parametrize(("installed_builder", "ok"), [("0.18.9", True), ("0.19.0", False)])
    def test_the_builder_must_be_of_the_release_that_foundry_bundles(
        self, installed_builder: str, ok: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        installed = metadata.version
        monkeypatch.setattr(
            metadata, "version", lambda name: installed_builder if name == "onnxruntime-genai" else installed(name)
        )
        row = next(check for check in check_packages() if check.name == "Foundry Local's onnxruntime-genai-core")
        assert row.ok == ok
        assert bool(row.what_to_do) == (not ok)

    def test_without_a_lock_file_the_requirements_ranges_hold(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        locked = locked_versions()
        monkeypatch.setattr(environment, "LOCK_FILE", tmp_path / "none")
        ranges = locked_versions()
        assert {"olive-ai", "onnxruntime-genai", "torch"} <= set(ranges) <= set(environment.STACK)
        assert all(version.startswith("==") for version in locked.values())
        assert all(check.ok for check in check_packages())

    def test_builder_versions_are_those_installed(self) -> None:
        versions = builder_versions()
        assert versions["olive-ai"] == metadata.version("olive-ai")
        assert all(versions.values())


class TestSystem:
    def test_this_one_fits(self) -> None:
        assert all(check.ok for check in check_system())

    def test_another_python_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "version_info", (3, 14, 0))
        row = check_system()[0]
        assert not row.ok
        assert "Python" in row.what_to_do

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows runs no shell scripts")
    @pytest.mark.parametrize(
        ("printed", "found", "ok"),
        [
            ("cmake version 3.31.0", "3.31.0", True),
            ("cmake version 4.0.1-rc2", "4.0.1", True),
            ("cmake version 3.9.6", "3.9.6", False),
            ("cmake version 3.30.5", "3.30.5", False),
            ("nothing of use", "not found", False),
        ],
    )
    def test_cmake(self, printed: str, found: str, ok: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        program = tmp_path / "cmake"
        program.write_text(f"#!/bin/sh\necho '{printed}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        row = check_system(source_build=True)[-1]
        assert (row.name, row.found, row.ok) == ("CMake", found, ok)
        assert bool(row.what_to_do) == (not ok)
        assert "CMake" not in [check.name for check in check_system()]

    def test_no_cmake(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        row = check_system(source_build=True)[-1]
        assert (row.found, row.ok) == ("not found", False)

    def test_execution_providers(self) -> None:
        available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        assert check_execution_provider("cpu", available).ok
        assert check_execution_provider("cuda", available).ok
        row = check_execution_provider("webgpu", available)
        assert not row.ok
        assert "webgpu" in row.what_to_do
        assert "cuda, cpu" in row.found

    def test_facts_of_the_host_name_neither_host_nor_user(self) -> None:
        assert set(host_facts()) == {"system", "machine", "cores", "ram_bytes", "python"}


class TestResources:
    def test_too_little_memory_names_need_and_found(self, tmp_path: Path) -> None:
        estimates = estimate_stages(inspection(), PRECISIONS, rows=200)
        peak = max(estimate.ram_bytes for estimate in estimates)
        with pytest.raises(
            BadInput, check=coded("resources-too-small", f"memory: this needs {peak / 1e9:.1f} GB ", " 1.5 GB")
        ) as caught:
            require_resources(check_resources(estimates, machine(tmp_path, ram_bytes=1_500_000_000)))
        assert "SLMOPS_MACHINE__RAM_CHECK=false" in caught.value.what_to_do
        require_resources(check_resources(estimates, machine(tmp_path, ram_bytes=peak)))
        require_resources(check_resources(estimates, machine(tmp_path, ram_bytes=0, ram_check=False)))

    def test_too_little_disk_names_need_and_found(self, tmp_path: Path) -> None:
        estimates = estimate_stages(inspection(), PRECISIONS, rows=200)
        need = sum(estimate.disk_bytes for estimate in estimates)
        enough = machine(tmp_path, ram_bytes=2**50, disk_bytes=need)
        require_resources(check_resources(estimates, enough))
        settings = machine(tmp_path / "not" / "there" / "yet", ram_bytes=2**50, disk_bytes=need - 1)
        with pytest.raises(
            BadInput, check=coded("resources-too-small", f"disk: this needs {need / 1e9:.1f} GB,")
        ) as caught:
            require_resources(check_resources(estimates, settings))
        assert "SLMOPS_HOME" in caught.value.what_to_do
        assert not (tmp_path / "not").exists()

    def test_what_is_measured_is_this_machines(self, tmp_path: Path) -> None:
        memory, disk = check_resources(estimate_stages(inspection(1_000, 10, 10), ["int4"], rows=1), machine(tmp_path))
        assert memory.ok
        assert disk.ok
        assert not memory.found.startswith("0.0 GB")

    def test_the_first_row_that_fails_is_reported(self) -> None:
        good = Check(name="Disk", required="1 GB", found="2 GB", ok=True)
        require_resources([good])
        with pytest.raises(
            BadInput, check=coded("resources-too-small", "memory: this needs 3 GB, there is 1 GB.")
        ) as caught:
            require_resources([good, Check(name="Memory", required="3 GB", found="1 GB", ok=False, what_to_do="Buy.")])
        assert caught.value.what_to_do == "Buy."

    @given(
        st.integers(1, 8_000_000_000), st.integers(1, 4_000_000_000), st.sampled_from(PRECISIONS), st.booleans(),
        st.integers(1, 500),
    )  # fmt: skip
    def test_a_larger_model_never_needs_less(
        self, parameters: int, more: int, precision: str, tied: bool, rows: int
    ) -> None:
        small = estimate_stages(inspection(parameters, tied_embeddings=tied), [precision], rows=rows)
        large = estimate_stages(inspection(parameters + more, tied_embeddings=tied), [precision], rows=rows)
        for one, other in zip(small, large, strict=True):
            assert one.stage == other.stage
            assert one.ram_bytes <= other.ram_bytes
            assert one.disk_bytes <= other.disk_bytes
            assert 0 < one.time_s <= other.time_s
        assert estimate_build_ram(inspection(parameters, tied_embeddings=tied), precision) < estimate_build_ram(
            inspection(parameters + more + 10, tied_embeddings=tied), precision
        )

    @given(st.sampled_from(PRECISIONS), st.integers(1, 200_000), st.integers(1, 8192), st.booleans())
    def test_a_larger_vocabulary_never_needs_less(
        self, precision: str, vocabulary: int, hidden: int, tied: bool
    ) -> None:
        def need(rows: int) -> int:
            copies = 1 if tied else 2
            made = inspection(10**8 + copies * rows * hidden, rows, hidden, tied_embeddings=tied)
            return estimate_build_ram(made, precision)

        assert need(vocabulary) < need(vocabulary + 1000)

    def test_the_estimate_covers_what_was_measured_of_a_half_billion_parameters(self) -> None:
        # docs: peaks of the builds of a Qwen2.5-0.5B-shaped checkpoint, in GB.
        measured = {"fp16": 1.63, "int8": 1.89, "int4": 1.89}
        for precision, peak in measured.items():
            assert estimate_build_ram(inspection(), precision) / 1e9 == pytest.approx(peak, rel=0.15)

    def test_weights_that_are_quantized_at_once_need_room_for_the_whole_model(self) -> None:
        # Peaks of the same checkpoint, and of a 3 B one, built the builder's own way, in GB.
        for precision, made, peak in (
            ("int4", inspection(), 4.6),
            ("int8", inspection(), 5.6),
            ("int4", inspection(3_086_000_000, hidden=2048), 20.6),
        ):
            assert estimate_build_ram(made, precision, whole_model=True) / 1e9 == pytest.approx(peak, rel=0.15)
        stages = estimate_stages(inspection(), ["int8", "int4"], rows=1, whole_model=["int4"])
        needed = {stage.stage: stage.ram_bytes for stage in stages}
        assert needed["build int4"] > 2 * needed["build int8"]

    def test_a_calibrated_build_takes_the_checkpoints_own_answers_and_more_time_and_memory(self) -> None:
        smollm2, one_layer = inspection(134_515_008, 49_152, 576), inspection(151_000_000, 151_936, 896)
        for made, peak in ((smollm2, 1.10), (one_layer, 1.85)):  # in GB, measured
            plain, calibrated = (
                {stage.stage: stage for stage in estimate_stages(made, ["int4"], rows=1, calibrated=precisions)}
                for precisions in ((), ("int4",))
            )
            assert set(calibrated) - set(plain) == {"calibrate"}
            assert calibrated["build int4"].ram_bytes / 1e9 == pytest.approx(peak, rel=0.15)
            assert calibrated["build int4"].ram_bytes > plain["build int4"].ram_bytes
            assert calibrated["build int4"].time_s > 2 * plain["build int4"].time_s
        assert [name for name in PRECISIONS if load_recipe(name).is_calibrated] == [*CALIBRATED_BY_DEFAULT]

    @pytest.mark.parametrize(
        ("parameters", "rows", "took_s"), [(107_072, 4, 22.0), (3_313_920, 200, 32.0)], ids=["random", "demo"]
    )
    def test_a_plan_is_within_a_quarter_of_what_small_deploys_took_on_two_idle_cores(self, parameters, rows, took_s):
        """Without the soak and the edge inputs, which were longer then."""
        stages = estimate_stages(inspection(parameters), PRECISIONS, rows=rows, calibrated=["int4"])
        planned_s = sum(stage.time_s for stage in stages if not stage.stage.startswith("exercise"))
        assert planned_s == pytest.approx(took_s, rel=0.25)

    @pytest.mark.parametrize(
        ("parameters", "calibrated", "took_s"),
        [(134_515_008, ["int4"], 223.0), (134_515_008, [], 193.0), (494_032_768, ["int4"], 1_011.0)],
        ids=["SmolLM2", "SmolLM2 with int4-rtn", "0.5 B shape"],
    )
    def test_a_plan_is_within_a_quarter_of_what_deploys_took_on_two_idle_cores(self, parameters, calibrated, took_s):
        """50 rows, three precisions; docs/performance.md has the stages."""
        stages = estimate_stages(inspection(parameters), PRECISIONS, rows=50, calibrated=calibrated)
        assert sum(stage.time_s for stage in stages) == pytest.approx(took_s, rel=0.25)

    def test_runtimes_that_have_room_side_by_side_are_one_stage(self) -> None:
        def exercised(parameters: int) -> list[str]:
            stages = estimate_stages(inspection(parameters), ["int8"], rows=1)
            return [stage.stage for stage in stages if stage.stage.startswith("exercise")]

        assert exercised(134_515_008) == ["exercise int8 in genai and foundry"]
        assert exercised(494_032_768) == ["exercise int8 in genai", "exercise int8 in foundry"]

    def test_a_model_that_is_built_already_needs_no_build_and_no_reference(self) -> None:
        built = inspection(0, kind="genai", size_bytes=300_000_000)
        stages = [stage.stage for stage in estimate_stages(built, ["int4"], rows=10)]
        assert stages == [
            "measure int4",
            "evaluate int4",
            "exercise int4 in genai and foundry",
            "register and prove int4",
        ]
