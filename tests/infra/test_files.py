"""Files that are there whole or not at all, whoever else writes them."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from slmops.infra.files import write_whole

WRITER = """
import sys
from pathlib import Path
from slmops.infra.files import write_whole

letter, path = sys.argv[1], Path(sys.argv[2])
for _ in range(200):
    write_whole(path, letter * 100_000)
"""


def test_a_file_and_its_folder_are_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "record.json"
    write_whole(path, "Grüße\n")
    assert path.read_bytes() == "Grüße\n".encode()
    write_whole(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_the_permissions_are_the_requested_ones(tmp_path: Path) -> None:
    write_whole(tmp_path / "secret", "x", mode=0o600)
    write_whole(tmp_path / "plain", "x")
    (tmp_path / "usual").write_text("x")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes["secret"] == 0o600
    assert modes["plain"] == modes["usual"]


def test_what_cannot_be_written_leaves_the_former_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_whole(path, "before")

    def is_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", is_full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_two_processes_that_write_one_file_never_leave_a_mixture_and_neither_fails(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, letter, str(path)]) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(path.read_text())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {"a" * 100_000, "b" * 100_000}
    assert path.read_text() in seen | {"a" * 100_000, "b" * 100_000}
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]
