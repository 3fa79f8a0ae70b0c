"""The rules of Windows and macOS that can be checked on any machine: calls, and files that are open."""

import ast
import errno
import os
import stat
from pathlib import Path, PureWindowsPath

import pytest

from slmops.infra.files import write_whole
from slmops.infra.storage import holders
from slmops.infra.storage.file_uris import pure_path_of
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import digest_of_file
from slmops.infra.storage.objects import Blob

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("infra", "tasks", "flows", "deployments")
POSIX_MODULES = {"crypt", "fcntl", "grp", "posix", "pwd", "pty", "resource", "syslog", "termios", "tty"}
POSIX_CALLS = {
    "os": {
        *("fork", "forkpty", "killpg", "getpgid", "getpgrp", "setpgid", "setsid", "getuid", "geteuid", "getgid"),
        *("chown", "mkfifo", "mknod", "nice", "sysconf", "statvfs", "uname", "getloadavg", "sched_getaffinity"),
        *("sched_setaffinity", "posix_fadvise", "O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY", "pread", "pwrite", "wait4"),
    },
    "signal": {"SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGSTOP", "SIGCONT", "SIGALRM", "SIGPIPE", "alarm", "pause"},
    "socket": {"AF_UNIX", "SO_REUSEPORT"},
}
# Each is guarded there by the name of the system, or by an import that may fail.
GUARDED = {
    "infra/checkpoints/rendering.py": {"resource"},
    "infra/foundry/connections.py": {"resource"},
    "infra/process/child.py": {"os.killpg", "os.getpgrp", "signal.SIGKILL"},
}


def posix_only(path: Path) -> set[str]:
    """Return the modules and attributes in a file that Windows lacks."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & POSIX_MODULES
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {module} & POSIX_MODULES
            found |= {f"{module}.{alias.name}" for alias in node.names if alias.name in POSIX_CALLS.get(module, ())}
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.attr in POSIX_CALLS.get(node.value.id, ())
        ):
            found.add(f"{node.value.id}.{node.attr}")
    return found


def test_what_only_posix_has_stays_in_its_guarded_places() -> None:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    found = {path.relative_to(ROOT).as_posix(): posix_only(path) for path in paths}
    assert {path: names for path, names in found.items() if names} == GUARDED


def other_line_ends(path: Path) -> list[int]:
    """Return the lines that write text with the line ends of Windows there: a version's files would differ."""
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if _writes_text(call) and "newline" not in {k.arg for k in call.keywords}]


def _writes_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    texts = {value.value for value in call.args if isinstance(value, ast.Constant)}
    return name == "write_text" or (name == "open" and bool(texts & {"w", "a", "x", "w+", "a+", "x+"}))


def test_text_has_the_same_line_ends_everywhere() -> None:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    found = {path.relative_to(ROOT).as_posix(): other_line_ends(path) for path in paths}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "path", [r"C:\slmops\store", r"\\server\share\a store", r"D:\größe 100%\#1", r"\\server\share\x"]
)
def test_a_folder_of_windows_is_the_one_that_its_uri_names(path: str) -> None:
    folder = PureWindowsPath(path)
    assert pure_path_of(folder.as_uri(), windows=True) == folder


@pytest.mark.parametrize(
    ("uri", "windows", "path"),
    [
        ("file:///C|/x", True, r"\C|\x"),
        ("file://localhost/C:/x", True, r"C:\x"),
        ("file:///srv/a%20store", False, "/srv/a store"),
        ("file://server/share", False, None),
        ("file://[/x", True, None),
        ("file:relative", True, None),
        ("s3://bucket/x", True, None),
    ],
)
def test_a_uri_names_a_folder_by_the_rules_of_the_system(uri: str, windows: bool, path: str | None) -> None:
    found = pure_path_of(uri, windows=windows)
    assert (found and str(found)) == path


@pytest.mark.parametrize("windows", [True] if os.name == "nt" else [False, True])
def test_a_blob_is_read_only_except_where_no_name_of_it_could_be_removed_then(
    windows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holders, "WINDOWS", windows)
    store, source = LocalObjectStore(tmp_path / "store"), tmp_path / "model.onnx"
    source.write_bytes(b"graph")
    blob = Blob(digest_of_file(source), 5)
    for _ in range(2):  # the second time in place of the first one
        store.put_blobs([(blob, source)])
    (kept,) = (tmp_path / "store").rglob(blob.sha256)
    assert bool(kept.stat().st_mode & stat.S_IWRITE) is windows
    store.delete([blob.key])
    assert not kept.exists()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_store_on_a_disk_without_hard_links_still_takes_each_number_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    store, key = LocalObjectStore(tmp_path), "models/home/1/manifest.json"
    assert [store.put_bytes_if_absent(key, data) for data in (b"first", b"first", b"other")] == [True, True, False]
    assert store.read_bytes(key) == b"first"


def test_a_file_that_another_process_reads_is_replaced_when_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "alias.json"
    path.write_text("former")
    refusals = [PermissionError(13, "The process cannot access the file")] * 2  # as Windows does
    replace = Path.replace

    def refused_twice(self: Path, target: Path) -> Path:
        if refusals:
            raise refusals.pop()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refused_twice)
    with pytest.raises(PermissionError):
        write_whole(path, "new")  # elsewhere it is a lack of rights, which stays
    monkeypatch.setattr(holders, "WINDOWS", True)
    write_whole(path, "new")
    assert (path.read_text(), refusals, len(list(tmp_path.iterdir()))) == ("new", [], 1)
