"""Faults of settings that no type can tell: a variable that is nearly named like a setting, an unusable home."""

import os
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# SLMOPS_STORE_URI is 0.97 like SLMOPS_STORE__URI; docker-compose.yml's own variables are below 0.85 like any setting.
SIMILARITY_OF_NEAR_MISSES = 0.9


def near_misses(known: Collection[str], prefix: str, delimiter: str) -> Iterator[str]:
    """Yield a sentence on each variable of the environment that would be ignored for its spelling."""
    sections = {variable.partition(delimiter)[0] for variable in known}
    for name in sorted(os.environ):
        # The section refuses its unknown keys itself.
        if not name.upper().startswith(prefix) or name.upper().partition(delimiter)[0] in sections:
            continue
        for wanted in get_close_matches(name.upper(), known, n=1, cutoff=SIMILARITY_OF_NEAR_MISSES):
            yield f"{name} is not a setting, {wanted} is"


def not_a_setting(name: str, known: Collection[str]) -> str:
    """Return a sentence on a variable of a known section that is no setting, with the nearest one."""
    section = name.upper().rpartition("__")[0]
    of_section = [variable for variable in known if variable.rpartition("__")[0] == section]
    nearest = get_close_matches(name.upper(), of_section or known, n=1)
    return f"{name} is not a setting{f', {nearest[0]} is' if nearest else ''}"


def found_value(fault: "ErrorDetails") -> str:
    """Return what was found in place of a valid value, or nothing where it may be a secret."""
    # The value of a misspelled variable or of a whole section may be a secret.
    open_keys = ("uri", "endpoint_url", "addressing_style", "require_signature")
    of_store = fault["loc"][:1] == ("store",) and fault["loc"][1:2] not in tuple((key,) for key in open_keys)
    is_token = fault["loc"][:1] in (("serve",), ("catalog",)) and fault["loc"][1:2] in ((), ("token",))
    of_notices = fault["loc"][:1] == ("notices",)
    return "" if of_store or is_token or of_notices else f", found {fault['input']!r}"


def fault_of_home(home: Path) -> str:
    """Return why this folder, which may not exist yet, cannot be the home directory; empty if it can."""
    try:
        folder = home.expanduser().absolute()
        found = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        if not found.is_dir():
            return f"SLMOPS_HOME: {found} is a file, found {str(home)!r}"
        if found == folder:
            next(folder.iterdir(), None)
    except RuntimeError:  # neither HOME nor the system's list of users says where it is
        return "SLMOPS_HOME: this user has no home directory, so set it"
    except OSError as error:
        return f"SLMOPS_HOME: {error.strerror}, found {str(home)!r}"
    return ""
