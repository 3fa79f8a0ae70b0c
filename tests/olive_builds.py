"""What `slmops.infra.olive.engine:build` is asked for in tests."""

from pathlib import Path
from typing import Any


def build_request(checkpoint: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Return the request of a build by ModelBuilder alone, with these options; its cache lies beside `output`."""
    return {
        "olive_config": {
            "input_model": {"type": "HfModel", "task": "text-generation"},
            "passes": {"builder": {"type": "ModelBuilder", **options}},
        },
        "checkpoint_dir": str(checkpoint),
        "output_dir": str(output),
        "cache_dir": str(output.parent / "cache"),
        "threads": 2,
    }
