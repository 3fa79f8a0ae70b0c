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
BUILD_S_PER_BILLION_PARAMETERS = {"fp16": 18.0, "int8": 48.0, "int4": 48.0}
BUILD_FLOOR_S = 8.0
# Bytes per parameter on disk: weights, plus one fp32 scale per block of 32 for int8 and int4.
DISK_BYTES_PER_PARAMETER = {"fp16": 2.0, "int8": 1.13, "int4": 0.66}
# Calibrated recipes, on 4,096 tokens: the checkpoint's own answers, and Olive's pass before the builder. The times
# are of SmolLM2-135M on two cores, the memory is of it and of a layer of a Qwen2.5-0.5B shape. Up to this size, the
# checkpoint answers in float32, which is faster on a CPU without instructions for bfloat16.
MAX_FLOAT32_PARAMETERS = 1_000_000_000
CALIBRATION_S_PER_BILLION_PARAMETERS = 150.0
CALIBRATED_BUILD_S_PER_BILLION_PARAMETERS = 200.0
CALIBRATED_RAM_FLOOR_BYTES = 780_000_000
CALIBRATED_RAM_BYTES_PER_PARAMETER = 0.7
CALIBRATED_RAM_BYTES_PER_ELEMENT_OF_THE_EMBEDDING = 8.0
TOKENIZER_BYTES = 20_000_000
RUNTIME_RAM_FLOOR_BYTES = 600_000_000
REFERENCE_BYTES_PER_PARAMETER = 4  # it always runs in float32
REFERENCE_S_PER_BILLION_PARAMETERS_AND_ROW = 4.0
VARIANT_S_PER_BILLION_PARAMETERS_AND_ROW = 3.0
ENDURANCE_S_PER_BILLION_PARAMETERS = 600.0  # soak and edge inputs, in two runtimes


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
    those whose weights are quantized all at once (`slmops.tasks.build.recipes.Recipe`).
    """
    parameters = inspection.parameters
    billions = parameters / 1e9
    builds = [] if inspection.kind == "genai" else list(precisions)
    estimates = [_calibration(inspection)] if builds and calibrated else []
    estimates += [
        StageEstimate(
            stage=f"build {precision}",
            time_s=_build_time(parameters, precision, calibrated=precision in calibrated),
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
                time_s=10 + REFERENCE_S_PER_BILLION_PARAMETERS_AND_ROW * billions * rows,
                ram_bytes=RUNTIME_RAM_FLOOR_BYTES + REFERENCE_BYTES_PER_PARAMETER * parameters,
                disk_bytes=4 * positions * inspection.vocabulary_size,
            )
        )
    for precision in precisions:
        size = inspection.size_bytes if not builds else int(DISK_BYTES_PER_PARAMETER[precision] * parameters)
        estimates += [
            StageEstimate(
                stage=f"{work} {precision}",
                time_s=time_s,
                ram_bytes=RUNTIME_RAM_FLOOR_BYTES + 2 * size,
                disk_bytes=0,
            )
            for work, time_s in (
                ("measure", 5 + 80 * billions),
                ("evaluate", 5 + VARIANT_S_PER_BILLION_PARAMETERS_AND_ROW * billions * rows),
                ("exercise", 6 + ENDURANCE_S_PER_BILLION_PARAMETERS * billions),
                ("register and prove", 5 + 5 * billions),
            )
        ]
    return estimates


def _calibration(inspection: Inspection) -> StageEstimate:
    """Estimate the checkpoint's own answers, on which recipes are calibrated."""
    width = 4 if inspection.parameters <= MAX_FLOAT32_PARAMETERS else 2
    return StageEstimate(
        stage="calibrate",
        time_s=10 + CALIBRATION_S_PER_BILLION_PARAMETERS * inspection.parameters / 1e9,
        ram_bytes=RUNTIME_RAM_FLOOR_BYTES + width * inspection.parameters,
        disk_bytes=0,
    )


def _build_time(parameters: int, precision: str, *, calibrated: bool) -> float:
    rate = BUILD_S_PER_BILLION_PARAMETERS[precision]
    rate += CALIBRATED_BUILD_S_PER_BILLION_PARAMETERS if calibrated else 0
    return BUILD_FLOOR_S + rate * parameters / 1e9


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
