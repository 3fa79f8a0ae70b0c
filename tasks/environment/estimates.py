"""Memory, disk and time that each stage of a deploy takes on this machine, estimated from measurements."""

from collections.abc import Collection, Sequence

from slmops.infra.records import Record
from slmops.tasks.checkpoint.inspection import Inspection

GB = 1_000_000_000


class StageEstimate(Record):
    """The estimate for a stage: wall time in s, peak memory and lasting disk space in bytes."""

    stage: str
    time_s: float
    ram_bytes: int
    disk_bytes: int


# Peak resident memory of a build, in bytes: a floor for Python, torch, Olive and the builder; per parameter what is
# fused before it is written (Q, K and V); and the largest tensor as it is read, in fp32, and quantized.
# tests/benchmarks/build_resources.py prints the error of this estimate.
BUILD_RAM_FLOOR_BYTES = 780_000_000
BUILD_RAM_BYTES_PER_PARAMETER = 0.2
BUILD_RAM_BYTES_PER_ELEMENT_OF_THE_LARGEST_TENSOR = {"fp16": 6.0, "int8": 7.3, "int4": 6.7}
# If all weights are quantized at once (infra/olive/streamed_quantization.py): per parameter, and in addition per
# element of the largest tensor.
BUILD_RAM_BYTES_AT_ONCE = {"int8": (7.3, 11.4), "int4": (6.2, 7.9)}
# Times, in s, are fitted to the stages of deploys on two idle cores: a random model of 0.1 M parameters on 4 rows, the
# demo's 3.4 M on 200, SmolLM2-135M on 50 and a 0.5 B shape of random weights on 50 (docs/performance.md). Of two
# numbers the second is per billion parameters; with `GROWTH`, per billion parameters to that power. GPTQ, the
# checkpoint's answers and the evaluation took 5 to 9 times as long for 0.5 B as for SmolLM2, which has a quarter of its
# parameters: matrices are wider, the vocabulary is larger, and the answers of random weights do not end early.
GROWTH = 1.4
START_S = 4.0  # of the process with torch, at its first work
BUILD_FLOOR_S = 0.8
BUILD_S_PER_BILLION_PARAMETERS = {"fp16": 8.0, "int8": 13.0, "int4": 9.0}
# Bytes per parameter on disk: weights, plus one fp32 scale per block of 32 for int8 and int4.
DISK_BYTES_PER_PARAMETER = {"fp16": 2.0, "int8": 1.13, "int4": 0.66}
# Calibrated recipes, on 4,096 tokens: the checkpoint's own answers, and Olive's pass before the builder. The memory is
# of SmolLM2-135M and of a layer of a Qwen2.5-0.5B shape.
CALIBRATION_S = (1.0, 210.0)  # with `GROWTH`
CALIBRATED_BUILD_S = (1.5, 470.0)  # with `GROWTH`
CALIBRATED_RAM_FLOOR_BYTES = 780_000_000
CALIBRATED_RAM_BYTES_PER_PARAMETER = 0.7
CALIBRATED_RAM_BYTES_PER_ELEMENT_OF_THE_EMBEDDING = 8.0
TOKENIZER_BYTES = 20_000_000
RUNTIME_RAM_FLOOR_BYTES = 600_000_000
# A floor, per row, and per row with `GROWTH`.
REFERENCE_S = (1.0, 0.01, 7.7)
EVALUATION_S = (0.5, 0.01, 5.1)
MEASUREMENT_S = (0.5, 25.0)
SWEEP_S_PER_BILLION_PARAMETERS = 90.0
MAX_SWEEP_S = 20.0  # its budget by default
# Soak and edge inputs, in two runtimes one after the other; side by side they take this share of it. The share is
# SmolLM2's int8, in full and in the short form: 25.6 of 32.4 s and 18.9 of 22.8 s.
ENDURANCE_S = (1.0, 115.0)
SIDE_BY_SIDE_SHARE = 0.8
# Runtimes side by side have this much memory together; a variant that would need more is examined in one after the
# other.
MAX_BYTES_SIDE_BY_SIDE = 2_500_000_000
REGISTRATION_S = (2.0, 10.0)  # its third of start, template parity and report with it


def estimate_stages(
    inspection: Inspection,
    precisions: Sequence[str],
    *,
    rows: int,
    positions: int = 1024,
    whole_model: Collection[str] = (),
    calibrated: Collection[str] = (),
) -> list[StageEstimate]:
    """Estimate each stage of a deploy on two cores; the memory of a stage is that of its child process.

    `calibrated` are the precisions whose recipes are calibrated, on the default number of tokens; `whole_model` are
    those whose weights are quantized all at once (`slmops.tasks.build.recipes.Recipe`). Stages have the names that
    their progress is reported by; soak and edge inputs are one stage where two runtimes have room side by side.
    """
    parameters = inspection.parameters
    billions = parameters / 1e9
    builds = [] if inspection.kind == "genai" else list(precisions)
    estimates = [_calibration(inspection)] if builds and calibrated else []
    started_by = builds[0] if builds and not calibrated else None
    estimates += [
        StageEstimate(
            stage=f"build {precision}",
            time_s=_build_time(parameters, precision, calibrated=precision in calibrated)
            + START_S * (precision == started_by),
            ram_bytes=max(
                estimate_build_ram(inspection, precision, whole_model=precision in whole_model),
                _calibrated_ram(inspection) if precision in calibrated else 0,
            ),
            disk_bytes=int(DISK_BYTES_PER_PARAMETER[precision] * parameters) + TOKENIZER_BYTES,
        )
        for precision in builds
    ]
    if inspection.kind != "genai":
        estimates.append(
            StageEstimate(
                stage="reference",
                time_s=_of_rows(REFERENCE_S, billions, rows),
                ram_bytes=_answering_ram(inspection),
                disk_bytes=4 * positions * inspection.vocabulary_size,
            )
        )
    for precision in precisions:
        size = inspection.size_bytes if not builds else int(DISK_BYTES_PER_PARAMETER[precision] * parameters)
        measured_s = _linear(MEASUREMENT_S, billions) + min(MAX_SWEEP_S, SWEEP_S_PER_BILLION_PARAMETERS * billions)
        times = {
            f"measure {precision}": measured_s,
            f"evaluate {precision}": _of_rows(EVALUATION_S, billions, rows),
            **_exercises(precision, size, billions),
            f"register and prove {precision}": _linear(REGISTRATION_S, billions),
        }
        estimates += [
            StageEstimate(stage=stage, time_s=time_s, ram_bytes=runtime_ram(size), disk_bytes=0)
            for stage, time_s in times.items()
        ]
    return estimates


def _exercises(precision: str, size_bytes: int, billions: float) -> dict[str, float]:
    """Estimate soak and edge inputs in two runtimes, by their stages."""
    time_s = _linear(ENDURANCE_S, billions)
    if have_room_side_by_side(size_bytes, 2):
        return {f"exercise {precision} in genai and foundry": SIDE_BY_SIDE_SHARE * time_s}
    return {f"exercise {precision} in {runtime}": time_s / 2 for runtime in ("genai", "foundry")}


def runtime_ram(size_bytes: int, processes: int = 1) -> int:
    """Estimate the memory of processes that each run a model of that size on disk."""
    return processes * (RUNTIME_RAM_FLOOR_BYTES + 2 * size_bytes)


def have_room_side_by_side(size_bytes: int, processes: int) -> bool:
    """Whether processes that each run a model of that size on disk may run at the same time."""
    return runtime_ram(size_bytes, processes) <= MAX_BYTES_SIDE_BY_SIDE


def _calibration(inspection: Inspection) -> StageEstimate:
    """Estimate the checkpoint's own answers, on which recipes are calibrated."""
    return StageEstimate(
        stage="calibrate",
        time_s=START_S + _growing(CALIBRATION_S, inspection.parameters / 1e9),
        ram_bytes=_answering_ram(inspection),
        disk_bytes=0,
    )


def _answering_ram(inspection: Inspection) -> int:
    """Estimate the memory in which the checkpoint answers: its matrices stay as they are stored."""
    return RUNTIME_RAM_FLOOR_BYTES + inspection.size_bytes


def _build_time(parameters: int, precision: str, *, calibrated: bool) -> float:
    billions = parameters / 1e9
    plain_s = BUILD_FLOOR_S + BUILD_S_PER_BILLION_PARAMETERS[precision] * billions
    return plain_s + (_growing(CALIBRATED_BUILD_S, billions) if calibrated else 0)


def _linear(times: tuple[float, float], size: float) -> float:
    floor_s, rate = times
    return floor_s + rate * size


def _growing(times: tuple[float, float], billions: float) -> float:
    return _linear(times, billions**GROWTH)


def _of_rows(times: tuple[float, float, float], billions: float, rows: int) -> float:
    floor_s, per_row_s, rate = times
    return floor_s + rows * _growing((per_row_s, rate), billions)


def _calibrated_ram(inspection: Inspection) -> int:
    elements = inspection.vocabulary_size * inspection.hidden_size
    return int(
        CALIBRATED_RAM_FLOOR_BYTES
        + CALIBRATED_RAM_BYTES_PER_PARAMETER * inspection.parameters
        + CALIBRATED_RAM_BYTES_PER_ELEMENT_OF_THE_EMBEDDING * elements
    )


def estimate_build_ram(inspection: Inspection, precision: str, *, whole_model: bool = False) -> int:
    """Estimate the peak resident memory of a build, in bytes."""
    # An adapter's tensors do not show those of its base. The embedding is the largest tensor of nearly every small
    # model.
    largest = max(inspection.largest_tensor_elements, inspection.vocabulary_size * inspection.hidden_size)
    per_parameter, per_element = (
        BUILD_RAM_BYTES_PER_PARAMETER,
        BUILD_RAM_BYTES_PER_ELEMENT_OF_THE_LARGEST_TENSOR[precision],
    )
    if whole_model:
        per_parameter, per_element = BUILD_RAM_BYTES_AT_ONCE[precision]
    return int(BUILD_RAM_FLOOR_BYTES + per_parameter * inspection.parameters + per_element * largest)
