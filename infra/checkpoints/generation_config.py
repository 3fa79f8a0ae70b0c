"""The numbers in a checkpoint's generation_config.json, which the builder copies into the model."""

import math
from pathlib import Path

from slmops.infra.checkpoints.folder import read_json
from slmops.infra.errors import BadInput

GENERATION_CONFIG = "generation_config.json"
# A repetition penalty that is not valid is left out (slmops.tasks.exams.decoding).
NUMBERS = ("temperature", "top_k", "top_p", "min_p", "max_length", "max_new_tokens")


def check_generation_config(folder: Path) -> None:
    """Raise `BadInput` for a value that is not a finite number: it would make a model that no runtime loads."""
    path = folder / GENERATION_CONFIG
    found = read_json(path) if path.is_file() else {}
    for name in NUMBERS:
        value = found.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and math.isfinite(value)):
            raise BadInput(
                f"{path} has the value {str(value)[:40]!r} for {name}, which is not a number.",
                "Correct or remove it.",
                code="generation-config-not-valid",
            )
