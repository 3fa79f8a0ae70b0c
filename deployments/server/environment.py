"""The process environment in which Prefect is imported: its API, the place of its files, no telemetry."""

import json
import os
import sys
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from slmops.deployments.server.access import kept_password, make_private
from slmops.deployments.server.current_folder import read_no_settings_here
from slmops.deployments.server.embedded import EmbeddedServer
from slmops.deployments.server.up_check import server_fault
from slmops.infra.errors import BadInput, SlmopsError, StageFailed
from slmops.infra.files import write_whole
from slmops.infra.settings import Settings
from slmops.infra.storage.holders import has_ended, this_process

LOOPBACK = ("127.0.0.1", "localhost")
PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")  # those of httpx

# Prefect's server and its SDK report usage by two channels; these two silence them.
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
}


def prepare_prefect(settings: Settings, *, log_level: str | None = None) -> None:
    """Set Prefect's environment variables; call it before Prefect is imported.

    The API is that of `PREFECT_API_URL` or of the user's active profile, else that of a running `slmops up` of this
    home directory. Without any, `prefect_api` starts one on loopback with its database under the home directory.
    """
    _check_proxies()
    _reach_loopback_directly()
    for variable, value in _profile().items():
        os.environ.setdefault(variable, value)
    if not os.environ.get("PREFECT_API_URL") and (url := running_server(settings)):
        os.environ["PREFECT_API_URL"] = url
        if not os.environ.get("PREFECT_API_AUTH_STRING"):
            own = os.environ.get("PREFECT_SERVER_API_AUTH_STRING")
            if password := own or kept_password(prefect_home(settings)):
                os.environ["PREFECT_API_AUTH_STRING"] = password
    # Prefect makes its home at its import, which fails if slmops's home does not exist yet; bad input must not create
    # it.
    warnings.filterwarnings("ignore", "Failed to create the Prefect home directory")
    os.environ["PREFECT_HOME"] = str(prefect_home(settings))
    os.environ.pop("PREFECT_PROFILE", None)  # its settings are in the environment now; our home has no profiles
    os.environ["PREFECT_PROFILES_PATH"] = str(prefect_home(settings) / "profiles.toml")
    read_no_settings_here()
    os.environ.update(QUIET)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", (log_level or "INFO").upper())
    # Without --log-level, a run's log goes only to its API; the terminal shows the stages' progress instead.
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = (log_level or "CRITICAL").upper()


def _check_proxies() -> None:
    # httpx makes a client for every proxy of the environment at once, also for calls that go to none of them.
    for variable in PROXIES:
        proxy = os.environ.get(variable, os.environ.get(variable.lower(), ""))
        scheme = proxy.partition("://")[0].lower() if "://" in proxy else "http"
        if scheme not in PROXY_SCHEMES:
            raise SlmopsError(
                f"{variable} names a proxy of the kind {scheme}.",
                f"Unset the variable, or name one of {', '.join(PROXY_SCHEMES)}.",
                code="proxy-kind",
            )
        if scheme.startswith("socks") and not find_spec("socksio"):
            raise SlmopsError(
                f"{variable} names a SOCKS proxy, and the package socksio, which reaches one, is not installed.",
                "Install it (pip install socksio), unset the variable, or name an HTTP proxy.",
                code="socks-proxy",
            )


def _reach_loopback_directly() -> None:
    bypass = (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").split(",")
    hosts = dict.fromkeys(host for host in (*bypass, *LOOPBACK) if host)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(hosts)


def running_server(settings: Settings) -> str | None:
    """Return the API's URL of the server that a running `slmops up` of this home directory started, or None."""
    try:
        record = json.loads(_server_record(settings).read_bytes())
        return None if has_ended(record["process"]) else str(record["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def announced_server(settings: Settings, url: str) -> Iterator[None]:
    """Let other commands of this home directory find the server that this process started."""
    path = _server_record(settings)
    write_whole(path, json.dumps({"process": this_process(), "url": url}), mode=0o600)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _server_record(settings: Settings) -> Path:
    return prefect_home(settings) / "server.json"


def prefect_home(settings: Settings) -> Path:
    """Return the folder of Prefect's own files."""
    return settings.home_dir / "prefect"


def begin_embedded_server() -> EmbeddedServer | None:
    """Begin to start an embedded server, for `prefect_api`, if no API is configured."""
    return None if os.environ.get("PREFECT_API_URL") else EmbeddedServer()


def unusable_api(url: str, fault: str) -> StageFailed:
    """Return the error of a configured API that does not answer as Prefect's does."""
    return StageFailed(
        f"Prefect's API at {url} cannot be used: {fault}.",
        "Start it, correct PREFECT_API_URL or PREFECT_API_AUTH_STRING, or unset them.",
        code="prefect-api-unusable",
    )


def lost_api(error: BaseException) -> StageFailed | None:
    """Return the error of an API that stopped to answer, if that is what `error` says, else None.

    Prefect's client has tried again for a minute then. Faults of a run's own connections are in its final state.
    """
    httpx = sys.modules.get("httpx")
    if httpx is None or not isinstance(error, httpx.HTTPError):
        return None
    fault = str(error)
    if isinstance(error, httpx.HTTPStatusError):
        if error.response.is_client_error:
            return None
        fault = f"it answers with status {error.response.status_code}"
    return StageFailed(
        f"Prefect's API stopped to answer: {fault}. The end of this command is not recorded there.",
        "Start the server again. What was complete is in the store: the same command goes on from it.",
        code="prefect-api-lost",
    )


@contextmanager
def prefect_api(settings: Settings, begun: EmbeddedServer | None = None) -> Iterator[None]:
    """Provide an API for flow runs: the configured one, or an embedded one, which may have `begun` to start."""
    url = os.environ.get("PREFECT_API_URL")
    if url and (fault := server_fault(url)):
        raise unusable_api(url, fault)
    make_private(prefect_home(settings))  # the server makes its database there, but not the folder
    if url:
        yield
        return
    server = begun or EmbeddedServer()
    from prefect import settings as prefect

    log = settings.cache_dir / "logs" / "prefect-server.log"
    here = {
        prefect.PREFECT_API_URL: server.serve(log, settings.user_cache_dir),
        prefect.PREFECT_API_AUTH_STRING: server.password,
        # Nothing reads heartbeats there, and a run that sends them ends up to a second later.
        prefect.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
    }
    with prefect.temporary_settings(here):
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
            f"Prefect's profiles in {path} cannot be read: {error}.",
            "Correct them, or set PREFECT_API_URL.",
            code="prefect-profiles-unreadable",
        ) from None
    active = os.environ.get("PREFECT_PROFILE") or document.get("active")
    profile = document.get("profiles", {}).get(active, {})
    return {name: str(value) for name, value in profile.items()}
