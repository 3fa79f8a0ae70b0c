"""The process environment in which Prefect is imported: which API, where its files go, nothing sent home."""

import os
import tomllib
from pathlib import Path

from infra.settings import Settings

LOOPBACK = "127.0.0.1,localhost"

# Prefect's server and its SDK report usage by two channels; these two silence them. The temporary server
# migrates its database the first time it starts, which takes longer than Prefect's default patience.
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
}
EMBEDDED = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
}


def prepare_prefect(settings: Settings, *, log_level: str | None = None) -> None:
    """Set Prefect's environment variables; call it before Prefect is imported.

    The API is the one of `PREFECT_API_URL` or of the user's active profile; without one, Prefect starts a
    temporary server on loopback whose database lives under the home directory.
    """
    for variable, value in _profile().items():
        os.environ.setdefault(variable, value)
    os.environ["PREFECT_HOME"] = str(prefect_home(settings))
    os.environ.pop("PREFECT_PROFILE", None)  # its settings are in the environment now; our home has no profiles
    os.environ.update(QUIET)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", (log_level or "INFO").upper())
    # Without --log-level, what a run logs goes to its API; the terminal shows the stages' progress instead.
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = (log_level or "CRITICAL").upper()
    if not os.environ.get("PREFECT_API_URL"):
        os.environ.update(EMBEDDED)
        bypass = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = f"{bypass},{LOOPBACK}" if bypass else LOOPBACK


def prefect_home(settings: Settings) -> Path:
    """Return the folder of Prefect's own files; it must exist before a flow runs, for its database."""
    return settings.home_dir / "prefect"


def _profile() -> dict[str, str]:
    """Return the settings of the user's active Prefect profile, or nothing."""
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser()
    if not path.is_file():
        return {}
    document = tomllib.loads(path.read_text("utf-8"))
    active = os.environ.get("PREFECT_PROFILE") or document.get("active")
    profile = document.get("profiles", {}).get(active, {})
    return {name: str(value) for name, value in profile.items()}
