"""The settings file: `slmops.toml` in the home directory, or the file that SLMOPS_SETTINGS_FILE names.

No other folder's file is read: a checkpoint's folder, which may be a stranger's, must not be able to configure slmops.
"""

import tomllib
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from slmops.infra.errors import BadInput

SETTINGS_FILE = "slmops.toml"
# What decides which file is read, or from which other files: only the environment can say it.
OF_THE_ENVIRONMENT = ("home", "secrets_dir", "settings_file")

Known = Mapping[str, Collection[str]]  # the keys of each section; none for a setting without a section


def read_settings_file(path: Path, known: Known) -> dict[str, Any]:
    """Return the content of a settings file by section.

    Raises `BadInput` for a file that cannot be read, and for keys that are no settings, with the nearest ones.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError and TOMLDecodeError are values' errors
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(
            f"The settings file {path} cannot be read: {reason}.",
            "Correct it; SLMOPS_SETTINGS_FILE names another one.",
            code="settings-file-unreadable",
        ) from None
    faults = [_fault(name, known) for name in _names(content, known)]
    if found := [fault for fault in faults if fault]:
        raise BadInput(
            f"The settings file {path} is not valid: {'; '.join(found)}.",
            "Correct it. Without that file, slmops config lists all settings.",
            code="settings-file-not-valid",
        )
    return content


def _names(content: Mapping[str, Any], known: Known) -> list[str]:
    """Return the settings that a file names, such as `gate.max_kl_divergence`."""
    names = []
    for name, value in content.items():
        inner = isinstance(value, dict) and (known.get(name) or name not in known)
        names += [f"{name}.{key}" for key in value] if inner else [name]
    return names


def _fault(name: str, known: Known) -> str:
    if name in OF_THE_ENVIRONMENT:
        return f"{name} can only be set in the environment"
    settings = [f"{section}.{key}" for section, keys in known.items() for key in keys]
    settings += [name for name, keys in known.items() if not keys and name not in OF_THE_ENVIRONMENT]
    if name in settings:
        return ""
    same_key = [setting for setting in settings if setting.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = same_key[:1] or get_close_matches(name, settings, n=1)
    return f"{name} is not a setting{f', {nearest[0]} is' if nearest else ''}"
