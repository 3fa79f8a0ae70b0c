"""Checks before anything is built: whether this machine, its packages, memory and disk are sufficient."""

import platform
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import get_args

import psutil
from packaging.requirements import Requirement
from packaging.version import Version as Release

from slmops.infra.errors import BadInput, SlmopsError, StageFailed
from slmops.infra.foundry.calls import DescribeRuntime
from slmops.infra.foundry.command import CommandFailed, installed_command
from slmops.infra.genai.calls import ListExecutionProviders
from slmops.infra.process.programs import installed_program
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.records import Record
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import work_folder
from slmops.infra.storage.opening import open_object_store
from slmops.infra.storage.version import Version
from slmops.tasks.checkpoint.family import proof_of
from slmops.tasks.checkpoint.from_gguf import from_gguf
from slmops.tasks.checkpoint.inspection import Inspection, inspect_checkpoint
from slmops.tasks.checkpoint.preparation import as_loaded
from slmops.tasks.checkpoint.rewriting import without_marks
from slmops.tasks.environment.estimates import (
    GB,
    StageEstimate,
    estimate_stages,
)
from slmops.tasks.environment.host import installed_version
from slmops.tasks.request.parameters import PRECISIONS, ExecutionProvider
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import torch_process, workshop

DISTRIBUTION = "slmops"
LOCK_FILE = Path(__file__).resolve().parents[2] / "constraints.txt"
PYTHON_MIN, PYTHON_BELOW = (3, 11), (3, 14)
SYSTEMS = ("Linux", "Darwin", "Windows")
STACK = (
    "olive-ai", "onnxruntime-genai", "onnxruntime", "foundry-local-sdk", "transformers", "tokenizers",
    "safetensors", "torch", "onnx", "onnx-ir", "numpy", "peft", "prefect", "fastapi", "pydantic",
)  # fmt: skip
# Foundry Local loads these two packages, so the builder's format must match that of the serving runtime.
BUNDLED_BY_FOUNDRY = {"onnxruntime": "onnxruntime", "onnxruntime-genai-core": "onnxruntime-genai"}
CALIBRATED_BY_DEFAULT = ("int4",)  # precisions whose default recipe for CPU is calibrated
CMAKE_MIN = Release("3.31")


class Check(Record):
    """One row of the environment table."""

    name: str
    required: str
    found: str
    ok: bool
    what_to_do: str = ""


def locked_versions() -> dict[str, str]:
    """Return the proven version of each package of the stack.

    They come from the lock file of a checkout. An installed package has no lock file, and uses its requirements.
    """
    if LOCK_FILE.is_file():
        lines = (line.split("#")[0].strip() for line in LOCK_FILE.read_text("utf-8").splitlines())
        pins = dict(line.split("==", 1) for line in lines if "==" in line)
        return {name: f"=={pins[name]}" for name in STACK if name in pins}
    requirements = (Requirement(text) for text in metadata.requires(DISTRIBUTION) or [])
    return {
        requirement.name: str(requirement.specifier)
        for requirement in requirements
        if requirement.name in STACK and not requirement.marker
    }


def check_packages() -> list[Check]:
    """Compare every installed package of the stack with the lock, and Foundry's runtime with the builder's."""
    checks = []
    for name, wanted in locked_versions().items():
        found = installed_version(name)
        proven = found is not None and Requirement(f"{name}{wanted}").specifier.contains(found, prereleases=True)
        checks.append(
            Check(
                name=name,
                required=wanted.removeprefix("=="),
                found=found or "not installed",
                ok=proven,
                what_to_do="" if proven else f"pip install '{name}{wanted}'",
            )
        )
    return [*checks, *_check_bundled_runtime()]


def _check_bundled_runtime() -> list[Check]:
    pins: dict[str, str] = {}
    for text in _requires("foundry-local-sdk"):
        requirement = Requirement(text)
        if requirement.name in BUNDLED_BY_FOUNDRY and (not requirement.marker or requirement.marker.evaluate()):
            pins[requirement.name] = str(requirement.specifier).removeprefix("==")
    checks = []
    for runtime, builder in BUNDLED_BY_FOUNDRY.items():
        bundled, installed = pins.get(runtime, "unknown"), installed_version(builder) or "not installed"
        # A Windows build of the SDK may contain another patch release; the model format depends on major.minor.
        same = bundled.split(".")[:2] == installed.split(".")[:2]
        checks.append(
            Check(
                name=f"Foundry Local's {runtime}",
                required=f"{installed} (the builder's)",
                found=bundled,
                ok=same,
                what_to_do="" if same else f"Install the {builder} that foundry-local-sdk requires: {bundled}",
            )
        )
    return checks


def check_system(*, source_build: bool = False) -> list[Check]:
    """Check Python and the operating system, and with `source_build` the CMake that genai's own build needs."""
    python = platform.python_version()
    checks = [
        Check(
            name="Python",
            required=f"{'.'.join(map(str, PYTHON_MIN))} to {PYTHON_BELOW[0]}.{PYTHON_BELOW[1] - 1}",
            found=python,
            ok=PYTHON_MIN <= sys.version_info[:2] < PYTHON_BELOW,
            what_to_do="" if PYTHON_MIN <= sys.version_info[:2] < PYTHON_BELOW else "Install Python 3.11",
        ),
        Check(
            name="Operating system",
            required="Linux, macOS or Windows, 64 bit",
            found=f"{platform.system()} {platform.machine()}",
            ok=platform.system() in SYSTEMS and sys.maxsize > 2**32,
            what_to_do="",
        ),
    ]
    if source_build:
        checks.append(_check_cmake())
    return checks


def _check_cmake() -> Check:
    import subprocess

    path = installed_program("cmake")
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout if path else ""
    match = re.search(r"(\d+\.\d+(\.\d+)?)", output)
    found = match.group(1) if match else "not found"
    ok = bool(match) and Release(found) >= CMAKE_MIN
    advice = "" if ok else "pip install 'cmake>=3.31'"
    return Check(name="CMake", required=f">={CMAKE_MIN}", found=found, ok=ok, what_to_do=advice)


def provider_name(name: str) -> str:
    """Return slmops's name of an execution provider of onnxruntime: `cpu` for `CPUExecutionProvider`."""
    return name.removesuffix("ExecutionProvider").lower()


def check_execution_provider(execution_provider: str, available: Iterable[str]) -> Check:
    """Check that onnxruntime can run on an execution provider (`cpu`, `cuda`, `dml`, `webgpu`)."""
    names = [provider_name(name) for name in available]
    ok = execution_provider in names
    return Check(
        name="Execution provider",
        required=execution_provider,
        found=", ".join(names),
        ok=ok,
        what_to_do=""
        if ok
        else f"Install the onnxruntime-genai package for {execution_provider}, or judge on a machine that has it: "
        "deploy --build-only here, regate there.",
    )


def available_providers(settings: Settings) -> tuple[str, ...]:
    """Return the execution providers of the runtime here; Foundry Local loads the same library as the builder."""
    with work_folder(settings) as work:
        child = run_in_child(
            ListExecutionProviders(),
            deadline_s=settings.timeout.measure_s,
            log_path=settings.cache_dir / "logs" / "execution-providers.log",
            work_dir=work,
        )
    return child.value


def check_providers(settings: Settings) -> Check:
    """List the execution providers of the runtime here, and the recipes' providers that it lacks."""
    found = [provider_name(name) for name in available_providers(settings)]
    absent = [name for name in get_args(ExecutionProvider) if name not in found]
    return Check(
        name="execution providers",
        required="cpu",
        found=", ".join(found),
        ok="cpu" in found,
        what_to_do=f"For {', '.join(absent)}: build here with --build-only, judge where it is." if absent else "",
    )


def check_resources(estimates: Sequence[StageEstimate], settings: Settings) -> list[Check]:
    """Compare the estimates with the available memory and the free disk space under the home directory."""
    available = _given(settings.machine.ram_bytes, psutil.virtual_memory().available)
    free = _given(settings.machine.disk_bytes, shutil.disk_usage(_existing_parent(settings.home_dir)).free)
    disk_bytes = sum(estimate.disk_bytes for estimate in estimates)
    peak = max(estimates, key=lambda estimate: estimate.ram_bytes)
    enough_ram = peak.ram_bytes <= available or not settings.machine.ram_check
    return [
        Check(
            name="Memory",
            required=f"{peak.ram_bytes / GB:.1f} GB ({peak.stage})",
            found=f"{available / GB:.1f} GB available",
            ok=enough_ram,
            what_to_do=""
            if enough_ram
            else "Close other programs, leave that precision out, use a larger machine, "
            "or skip this check with SLMOPS_MACHINE__RAM_CHECK=false.",
        ),
        Check(
            name="Disk",
            required=f"{disk_bytes / GB:.1f} GB",
            found=f"{free / GB:.1f} GB free for {settings.home_dir}",
            ok=disk_bytes <= free,
            what_to_do="" if disk_bytes <= free else "Free some space or set SLMOPS_HOME to a folder on another disk.",
        ),
    ]


def require_packages(checks: Sequence[Check]) -> None:
    """Raise `StageFailed` naming every row that is not ok."""
    failed = [check for check in checks if not check.ok]
    if failed:
        faults = "; ".join(f"{check.name} is {check.found}, needed {check.required}" for check in failed)
        raise StageFailed(
            f"The environment is unsuitable: {faults}.",
            "; ".join(check.what_to_do for check in failed),
            code="environment-unsuitable",
        )


def require_resources(checks: Sequence[Check]) -> None:
    """Raise `BadInput` for the first row that is not ok: this checkpoint is too large for this machine."""
    for check in checks:
        if not check.ok:
            raise BadInput(
                f"Too little {check.name.lower()}: this needs {check.required}, there is {check.found}.",
                check.what_to_do,
                code="resources-too-small",
            )


def check_machine(settings: Settings, checkpoint: str | None, *, source_build: bool = False) -> list[Check]:
    """Return every row of `slmops check`, with a checkpoint also those of memory and disk for it.

    Raises `BadInput` when the checkpoint cannot be deployed anywhere.
    """
    inspection = inspect_checkpoint(Path(checkpoint).expanduser()) if checkpoint else None
    checks = [*check_system(source_build=source_build), *check_packages(), check_foundry_runtime(settings)]
    checks += [check_providers(settings), *check_foundry_command(settings), check_store(settings)]
    if inspection and checkpoint:
        checks += [
            Check(name="checkpoint", required="no remarks", found=warning, ok=True) for warning in inspection.warnings
        ]
        checks += check_family(Path(checkpoint).expanduser(), inspection, settings)
        rows = settings.evaluation.max_rows
        stages = estimate_stages(inspection, PRECISIONS, rows=rows, calibrated=CALIBRATED_BY_DEFAULT)
        checks += check_resources(stages, settings)
    return checks


def check_family(folder: Path, inspection: Inspection, settings: Settings) -> list[Check]:
    """Prove a checkpoint's family; no row for an ONNX model or an adapter.

    Raises `BadInput` when it is not built exactly.
    """
    if inspection.kind != "checkpoint":
        return []
    folder = as_loaded(from_gguf(without_marks(folder, settings), settings), inspection, settings)
    with torch_process(settings) as child:
        proof = proof_of(folder, settings, child, lambda done, total, what: None, log="check-family")
    prompts = ", ".join(str(length) for length in proof.lengths)
    found = f"{inspection.architecture}: within {proof.distance:.1g} of their deviation over {prompts} tokens"
    needed = "the logits of transformers at every position"
    return [Check(name="family", required=needed, found=found, ok=True)]


def check_store(settings: Settings) -> Check:
    """Check that the store in the settings can be reached, and report its server's limitations."""
    needed = "reached, writable"
    try:
        objects = open_object_store(settings.store_uri, settings)
        objects.check(by_writing=True)
    except SlmopsError as error:
        return Check(name="store", required=needed, found=error.message, ok=False, what_to_do=error.what_to_do)
    found = " ".join((f"{settings.store_uri}.", *objects.notices()))
    return Check(name="store", required=needed, found=found, ok=True)


def _requires(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def _given(simulated: int | None, measured: int) -> int:
    return measured if simulated is None else simulated


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def check_foundry_runtime(settings: Settings) -> Check:
    """Load Foundry Local's native runtime in a child process and report its version."""
    try:
        with work_folder(settings) as work:
            child = run_in_child(
                DescribeRuntime(),
                deadline_s=settings.timeout.foundry_s,
                log_path=settings.cache_dir / "logs" / "foundry-runtime.log",
                work_dir=work,
            )
    except StageFailed as error:
        advice = error.what_to_do.splitlines()[0]
        return Check(name="Foundry Local", required="runtime loads", found=error.message, ok=False, what_to_do=advice)
    found = f"runtime {child.value.native}"
    return Check(name="Foundry Local", required="runtime loads", found=found, ok=True)


def check_foundry_command(settings: Settings) -> list[Check]:
    """Report which `foundry` command is on the PATH and whether it serves slmops's models; no row if there is none."""
    command = installed_command()
    if command is None:
        return []
    optional = "none, or one that works"
    try:
        version, serves = command.version(), command.serves(settings.foundry_dir)
    except CommandFailed as error:
        advice = "Repair Foundry Local's installation, or remove it from the PATH."
        return [Check(name="foundry command", required=optional, found=str(error), ok=False, what_to_do=advice)]
    cache = "it serves slmops's models" if serves else "it serves another cache"
    advice = "" if serves else f"To use slmops's models there: foundry cache cd {settings.foundry_dir}"
    return [Check(name="foundry command", required=optional, found=f"{version}, {cache}", ok=True, what_to_do=advice)]


@stage("check environment", run_name="check-environment")
def check_environment(execution_provider: str, settings: Settings) -> None:
    """Check Python, the system and the stack; raises `StageFailed` naming every mismatch."""
    checks = [*check_system(), *check_packages()]
    if execution_provider != "cpu":
        checks.append(check_execution_provider(execution_provider, available_providers(settings)))
    require_packages(checks)


@stage("check providers", run_name="check-providers-{version.name}")
def check_runs_here(version: Version) -> None:
    """Raise `StageFailed` for a version with a variant of an execution provider that this machine lacks."""
    providers = {variant.execution_provider for variant in version.variants} - {"cpu"}
    if providers:
        available = available_providers(workshop().settings)
        require_packages([check_execution_provider(provider, available) for provider in sorted(providers)])


@stage("check room", run_name="check-room")
def check_room(
    inspection: Inspection,
    precisions: Sequence[str],
    rows: int,
    settings: Settings,
    *,
    whole_model: Collection[str] = (),
    calibrated: Collection[str] = (),
) -> None:
    """Check memory and disk against this checkpoint's need (`estimate_stages`); raises `BadInput` if too small."""
    positions = settings.evaluation.max_positions
    stages = estimate_stages(
        inspection, precisions, rows=rows, positions=positions, whole_model=whole_model, calibrated=calibrated
    )
    require_resources(check_resources(stages, settings))
