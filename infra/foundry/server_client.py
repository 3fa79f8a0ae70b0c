"""The model servers on this machine, and the notification of a new champion.

A serving process keeps `SLMOPS_HOME/serve/<pid>.json`, which only its user can read:
`{"process": slmops.infra.storage.holders.this_process(), "url": "http://127.0.0.1:PORT", "control_token": "..."}`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.infra.errors import StageFailed
from slmops.infra.storage.holders import has_ended

FOLDER = "serve"
ASK_TIMEOUT_S = 30.0
HAND_OVER_TIMEOUT_S = 900.0  # the server loads the new version before it unloads the old one


@dataclass(frozen=True)
class RunningServer:
    """A serving process of this home; every method raises `StageFailed` when it refuses or does not answer."""

    url: str
    control_token: str = field(repr=False)
    hand_over_timeout_s: float = HAND_OVER_TIMEOUT_S

    def serves(self, name: str) -> int | None:
        """Return the version that it serves under a name, or None if it does not serve that name."""
        return self.models().get(name)

    def models(self, timeout_s: float = ASK_TIMEOUT_S) -> dict[str, int]:
        """Return the version that it serves under each name."""
        models = self._ask("GET", "/slmops/v1/models", timeout_s).get("models", [])
        return {str(model["name"]): int(model["version"]) for model in models}

    def hand_over(self, name: str, version: int, precision: str) -> int | None:
        """Make it serve a version under a name; returns the version that it served before."""
        path, asked = f"/slmops/v1/models/{name}/champion", {"version": version, "precision": precision}
        former = self._ask("POST", path, self.hand_over_timeout_s, asked).get("former")
        return None if former is None else int(former)

    def _ask(self, method: str, path: str, timeout_s: float, asked: dict[str, object] | None = None) -> dict[str, Any]:
        import httpx

        headers = {"Authorization": f"Bearer {self.control_token}"}
        try:
            # Without the environment, because the token must not reach a proxy that the user configured.
            with httpx.Client(trust_env=False, timeout=httpx.Timeout(timeout_s, connect=ASK_TIMEOUT_S)) as client:
                answer = client.request(method, self.url + path, json=asked, headers=headers)
            document = answer.json()
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise StageFailed(
                f"The server at {self.url} does not answer: {reason}.",
                "Try again, or end that server first.",
                code="server-unreachable",
            ) from error
        except ValueError:
            document = None
        if answer.status_code == 200 and isinstance(document, dict):
            return document
        fault = document.get("error") if isinstance(document, dict) else None
        if not isinstance(fault, dict) or "message" not in fault:
            fault = {"message": f"it answered with status {answer.status_code}."}
        refusal = f"The server at {self.url} refused: {fault['message']}"
        raise StageFailed(refusal, str(fault.get("what_to_do", "")), code="server-refused")


def running_servers(home: Path, hand_over_timeout_s: float = HAND_OVER_TIMEOUT_S) -> list[RunningServer]:
    """Return the serving processes of a home directory that have not ended; files of killed ones are removed.

    Raises `StageFailed` for a server's file that cannot be read: that server would continue with the old version.
    """
    servers = []
    for path in sorted((home / FOLDER).glob("*.json")):
        try:
            record = json.loads(path.read_text("utf-8"))
            process, url, token = str(record["process"]), str(record["url"]), str(record["control_token"])
        except FileNotFoundError:  # the server ended after it was listed
            continue
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StageFailed(
                f"{path} does not name a running server: {error!r}.",
                "Remove the file if no slmops serve of this home is running.",
                code="server-file-not-valid",
            ) from None
        if has_ended(process):  # it was killed
            path.unlink(missing_ok=True)
        else:
            servers.append(RunningServer(url.rstrip("/"), token, hand_over_timeout_s))
    return servers
