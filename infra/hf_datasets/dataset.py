"""Read a dataset of the `datasets` library, from the Hub or from a folder; code of a dataset is not run."""

import json
from pathlib import Path

from slmops.infra.errors import BadInput
from slmops.infra.foreign_files import check_files
from slmops.infra.process.call import Call, Progress
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.records import AbsolutePath
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import work_folder

SPLIT = "train"
ONLINE = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}


def read_hf_dataset(name: str, settings: Settings) -> list[dict[str, object]]:
    """Return the rows of a dataset's split `train` unchanged; raises `BadInput` if there is no such dataset."""
    local = Path(name).expanduser().is_dir()
    if local:
        check_files(sorted(Path(name).expanduser().rglob("*")))
    with work_folder(settings) as work:
        run_in_child(
            ExportRows(name=str(Path(name).expanduser().absolute()) if local else name, output=work / "rows.jsonl"),
            deadline_s=settings.timeout.fine_tune_s,
            log_path=settings.cache_dir / "logs" / "dataset.log",
            work_dir=work,
            # A folder needs no network, and the library's converted copy of it is not kept.
            environment={"HF_DATASETS_CACHE": str(work / "cache")} if local else ONLINE,
        )
        with (work / "rows.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


class ExportRows(Call[int]):
    """Write the rows of a dataset (Hub id or absolute folder) as JSON Lines; the answer is their number."""

    name: str
    output: AbsolutePath

    def perform(self, progress: Progress) -> int:
        """Raises `BadInput` if there is no such dataset."""
        from datasets import load_dataset

        progress(0, 1, f"reading {self.name}")
        try:
            dataset = load_dataset(self.name, split=SPLIT)
        except Exception as error:  # the library's own errors have no common class
            text = " ".join(str(error).split())[:300]
            raise BadInput(
                f"There is no dataset {self.name}: {text}",
                "Name a JSON Lines file, an s3:// object, a folder of data files, or the id of a dataset on the Hub.",
                code="dataset-missing",
            ) from error
        with self.output.open("w", encoding="utf-8", newline="\n") as file:
            for row in dataset:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        return len(dataset)
