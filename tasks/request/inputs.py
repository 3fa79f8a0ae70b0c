"""A run's input files other than its checkpoint: on this machine, on S3, or in the store."""

from pathlib import Path
from typing import Any

from slmops.infra.checkpoints.s3 import fetch_file_from_s3
from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.infra.storage.inputs import fetch_input, is_input_address, read_input
from slmops.infra.storage.opening import open_registry
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import workshop

FILE_PARAMETERS = (
    "evaluation_file",
    "calibration_file",
    "output_schema_file",
    "text_file",
    "chat_template_file",
    "olive_config_file",
)


def with_local_files(parameters: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return flow parameters in which every file is local: remote files are fetched.

    A file is a path, `s3://BUCKET/KEY` or `store://<64 hex>`. Raises `BadInput` for a missing one.
    """
    named = {name: parameters[name] for name in FILE_PARAMETERS if parameters.get(name)}
    return {**parameters, **{name: local_file(text, settings) for name, text in named.items()}}


@stage("fetch inputs", run_name="fetch-inputs")
def fetch_inputs(parameters: dict[str, Any]) -> dict[str, Any]:
    """See `with_local_files`."""
    return with_local_files(parameters, workshop().settings)


def local_file(text: str, settings: Settings) -> str:
    """Return the path of a file on this machine; a remote file is fetched first."""
    if is_input_address(text):
        registry = open_registry(settings)
        if read_input(registry, text).kind != "file":
            raise BadInput(
                f"{text} is a folder, not a file.",
                "Ingest the file itself, and give its address.",
                code="input-is-folder",
            )
        return str(fetch_input(registry, text, inputs_dir(settings)))
    if text.startswith("s3://"):
        return str(fetch_file_from_s3(text, settings, settings.cache_dir / "s3"))
    return text


def inputs_dir(settings: Settings) -> Path:
    """Return the folder of fetched inputs on this machine."""
    return settings.cache_dir / "inputs"
