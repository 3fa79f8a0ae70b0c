"""The rules of Windows and macOS that can be checked on any machine: calls, and files that are open."""

import ast
from pathlib import Path

import pytest

from slmops.infra.files import write_whole
from slmops.infra.storage import holders

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
