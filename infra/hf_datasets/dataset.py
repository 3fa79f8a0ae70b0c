"""Read a dataset of the `datasets` library, from the Hub or from a folder; no code of a dataset's is run."""

import json
from pathlib import Path
from typing import Any

from slmops.infra.errors import BadInput
from slmops.infra.process.call import Progress
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import work_folder

SPLIT = "train"
ONLINE = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}


def read_hf_dataset(name: str, settings: Settings) -> list[dict[str, Any]]:
    """Return the rows of a dataset's split `train`, as they are; raises `BadInput` where there is no such dataset."""
    local = Path(name).expanduser().is_dir()
    with work_folder(settings) as work:
        run_in_child(
            "slmops.infra.hf_datasets.dataset:export_rows",
            {"name": str(Path(name).expanduser().absolute()) if local else name, "output": str(work / "rows.jsonl")},
            deadline_s=settings.timeout.fine_tune_s,
            log_path=settings.cache_dir / "logs" / "dataset.log",
            work_dir=work,
            # A folder needs no network; what the library makes of it is nobody's cache.
            environment={"HF_DATASETS_CACHE": str(work / "cache")} if local else ONLINE,
        )
        with (work / "rows.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def export_rows(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Write the rows of a dataset as JSON Lines; a child function.

    Request: `name` (Hub id or absolute folder), `output` (path). Result: `rows`, their number. Raises `BadInput`.
    """
    from datasets import load_dataset

    progress(0, 1, f"reading {request['name']}")
    try:
        dataset = load_dataset(request["name"], split=SPLIT)
    except Exception as error:  # the library's own errors have no common class
        text = " ".join(str(error).split())[:300]
        raise BadInput(
            f"There is no dataset {request['name']}: {text}",
            "Name a JSON Lines file, an s3:// object, a folder of data files, or a Hub id that can be reached.",
        ) from error
    with Path(request["output"]).open("w", encoding="utf-8") as file:
        for row in dataset:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    return {"rows": len(dataset)}
