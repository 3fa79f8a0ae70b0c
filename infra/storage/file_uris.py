"""Paths that `file` URIs name, by the rules of this machine's system."""

import re
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from urllib.parse import unquote, urlsplit

from slmops.infra.storage.holders import WINDOWS


def path_of(uri: str) -> Path | None:
    """Return the absolute path that a URI names; None if it is no `file` URI, or one of another machine."""
    found = pure_path_of(uri, windows=WINDOWS)
    return None if found is None else Path(found)


def pure_path_of(uri: str, *, windows: bool) -> PurePath | None:
    """Return what `path_of` returns on Windows or elsewhere.

    `Path.as_uri` makes `file:///C:/folder` of a drive's path, and `file://server/share` of a shared folder's.
    """
    try:
        parts = urlsplit(uri)
    except ValueError:  # brackets without an address
        return None
    host, path = parts.netloc.removeprefix("localhost"), unquote(parts.path)
    if parts.scheme != "file" or not path.startswith("/") or (host and not windows):
        return None
    if not windows:
        return PurePosixPath(path)
    if host:
        return PureWindowsPath(f"//{host}{path}")
    return PureWindowsPath(path.removeprefix("/") if re.match(r"/[A-Za-z]:", path) else path)
