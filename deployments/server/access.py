"""Access to the Prefect API that slmops starts: it requires a password, and refuses pages of other origins.

A client with access to the API can run programs as the worker's user, because it can register deployments.
"""

import base64
import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from slmops.infra.errors import BadInput
from slmops.infra.storage.leftovers import made_aside

AUTH_FILE = "auth-string"
OTHERS_MAY_NOTHING = 0o077  # as a umask


def new_password() -> str:
    """Return a new user and password in the form of `PREFECT_API_AUTH_STRING`."""
    return f"slmops:{secrets.token_urlsafe(32)}"


def closed_to_others(password: str) -> dict[str, str]:
    """Return the environment in which a Prefect server requires the password, and accepts pages of its own UI only.

    Prefect's protection against forged requests stays off: it protects passwords that a browser sends automatically,
    but the UI's script sends this one. With it, each call of a client that is not Prefect's would need two requests.
    """
    return {
        "PREFECT_SERVER_API_AUTH_STRING": password,
        # No other origin. The UI calls the server that it was loaded from, under any name or through any tunnel.
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": "",
        "PREFECT_SERVER_UI_API_URL": "/api",
    }


def authorization(password: str) -> dict[str, str]:
    """Return the HTTP header that carries a user and password."""
    return {"Authorization": f"Basic {base64.b64encode(password.encode()).decode()}"}


def kept_password(folder: Path) -> str | None:
    """Return the password that is kept in Prefect's home, or None if there is none."""
    try:
        return (folder / AUTH_FILE).read_text("utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def make_password(folder: Path) -> str:
    """Return the password that is kept in Prefect's private home, and make one if there is none.

    Raises `BadInput` where it cannot be written.
    """
    if found := kept_password(folder):
        return found
    path = folder / AUTH_FILE
    with _ours(folder), made_aside(path) as aside:
        aside.touch(0o600, exist_ok=False)
        aside.write_text(new_password() + "\n", "utf-8", newline="\n")
        try:
            os.link(aside, path)  # unlike a rename, a link never replaces what another command has written
        except OSError:  # another command was first, the file system has no links, or the file is empty
            if not kept_password(folder):
                aside.replace(path)
        return path.read_text("utf-8").strip()


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can enter, and remove others' permissions on its content.

    Raises `BadInput` where that is not possible.
    """
    with _ours(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.name != "posix":  # a user's folders are private there
            return
        for path in (folder, *(path for path in folder.iterdir() if not path.is_symlink())):
            with contextlib.suppress(FileNotFoundError):  # a file of SQLite, or a temporary one
                path.chmod(path.stat().st_mode & 0o700)


@contextlib.contextmanager
def _ours(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"{folder} cannot be made private: {error}.",
            "Make its owner the user who runs slmops, or set SLMOPS_HOME to another folder.",
            code="folder-not-private",
        ) from None
