"""The process environment in which Prefect is imported: which API, where its files go, nothing sent home."""

import os
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deployments.embedded_server import start_embedded_api
from infra.errors import BadInput
from infra.settings import Settings

LOOPBACK = ("127.0.0.1", "localhost")

# Prefect's server and its SDK report usage by two channels; these two silence them.
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
}


def prepare_prefect(settings: Settings, *, log_level: str | None = None) -> None:
    """Set Prefect's environment variables; call it before Prefect is imported.

    The API is the one of `PREFECT_API_URL` or of the user's active profile; without one, `prefect_api` starts one on
    loopback whose database lives under the home directory.
    """
    for variable, value in _profile().items():
        os.environ.setdefault(variable, value)
    # Prefect makes its home at its import. Where ours is not there yet that fails, and bad input must not make it.
    warnings.filterwarnings("ignore", "Failed to create the Prefect home directory")
    os.environ["PREFECT_HOME"] = str(prefect_home(settings))
    os.environ.pop("PREFECT_PROFILE", None)  # its settings are in the environment now; our home has no profiles
    os.environ.update(QUIET)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", (log_level or "INFO").upper())
    # Without --log-level, what a run logs goes to its API; the terminal shows the stages' progress instead.
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = (log_level or "CRITICAL").upper()
    if not os.environ.get("PREFECT_API_URL"):
        bypass = (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").split(",")
        hosts = dict.fromkeys(host for host in (*bypass, *LOOPBACK) if host)
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(hosts)


def prefect_home(settings: Settings) -> Path:
    """Return the folder of Prefect's own files."""
    return settings.home_dir / "prefect"


@contextmanager
def prefect_api(settings: Settings) -> Iterator[None]:
    """Have an API for flow runs: the configured one, or an embedded one."""
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    from prefect.settings import PREFECT_API_URL, temporary_settings

    prefect_home(settings).mkdir(parents=True, exist_ok=True)  # the server makes its database there, but no folder
    log = settings.cache_dir / "logs" / "prefect-server.log"
    with temporary_settings({PREFECT_API_URL: start_embedded_api(log)}):
        yield


def _profile() -> dict[str, str]:
    """Return the settings of the user's active Prefect profile, or nothing; raises `BadInput` if it cannot be read."""
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser()
    if not path.is_file():
        return {}
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"Prefect's profiles in {path} cannot be read: {error}.", "Correct them, or set PREFECT_API_URL."
        ) from None
    active = os.environ.get("PREFECT_PROFILE") or document.get("active")
    profile = document.get("profiles", {}).get(active, {})
    return {name: str(value) for name, value in profile.items()}
