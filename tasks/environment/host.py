"""This machine and its installed packages, in the form of records and keys."""

import platform
from importlib import metadata

import psutil


def builder_versions() -> dict[str, str]:
    """Return the versions of the packages that determine a build's files; they are part of a version's identity."""
    return {
        name: installed_version(name) or "" for name in ("olive-ai", "onnxruntime-genai", "onnx-ir", "transformers")
    }


def host_facts() -> dict[str, str | int]:
    """Return the facts about this machine for evidence, without host name and user name."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": psutil.cpu_count(logical=False) or 0,
        "ram_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
    }


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
