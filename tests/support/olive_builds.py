"""Requests of Olive builds in tests."""

from pathlib import Path
from typing import Any

from slmops.infra.olive.calls import Build


def build_request(checkpoint: Path, output: Path, **options: Any) -> Build:
    """Return a build by ModelBuilder alone, with these options; its cache lies beside `output`."""
    return Build(
        olive_config={
            "input_model": {"type": "HfModel", "task": "text-generation"},
            "passes": {"builder": {"type": "ModelBuilder", **options}},
        },
        checkpoint_dir=checkpoint,
        output_dir=output,
        cache_dir=output.parent / "cache",
        threads=2,
    )
