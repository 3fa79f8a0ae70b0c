"""Give Olive's passes the calibration data of a build instead of data sets from the Hub."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slmops.infra.olive.lean_import import import_olive_workflows

_rows: list[tuple[int, ...]] = []


@contextmanager
def calibrating_with(rows: Sequence[tuple[int, ...]]) -> Iterator[None]:
    """Patch Olive in this process, so that passes are calibrated on these rows of token ids.

    A data configuration that names local files is used unchanged.
    """
    import_olive_workflows()
    train_utils: Any = importlib.import_module("olive.passes.pytorch.train_utils")
    stock = getattr(train_utils.get_calibration_dataset, "stock", train_utils.get_calibration_dataset)

    def calibration_dataset(model: Any, data_config: Any = None, **options: Any) -> list[dict[str, Any]]:
        import torch

        if data_config and not _is_on_hub(data_config):
            return list(stock(model, data_config, **options))
        ids = [torch.tensor([row]) for row in _rows]
        return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]

    calibration_dataset.stock = stock  # type: ignore[attr-defined]
    train_utils.get_calibration_dataset = calibration_dataset
    for name in ("quant_utils", "selective_mixed_precision"):
        importlib.import_module(f"olive.passes.pytorch.{name}").get_calibration_dataset = calibration_dataset  # type: ignore[attr-defined]
    _rows[:] = rows
    try:
        yield
    finally:
        _rows.clear()


def _is_on_hub(data_config: Any) -> bool:
    given = data_config if isinstance(data_config, dict) else data_config.model_dump()
    loading = given.get("load_dataset_config") or {}
    options = {**loading, **(loading.get("params") or {})}
    name = options.get("data_name")
    return name is not None and not options.get("data_files") and not Path(name).exists()
