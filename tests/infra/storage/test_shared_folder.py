"""A folder that several deploys use at once: it stays until the last of them has finished."""

import subprocess
import sys
from pathlib import Path

import pytest

from slmops.infra.storage.folders import shared_folder

ROOT = Path(__file__).resolve().parents[3]
USER = """
import sys
from pathlib import Path
from slmops.infra.storage.folders import shared_folder
with shared_folder(Path(sys.argv[1])):
    print("in use", flush=True)
    sys.stdin.read()
"""


def other_user(folder: Path) -> "subprocess.Popen[str]":
    """Start another process that uses a folder until its standard input is closed."""
    command = [sys.executable, "-c", USER, str(folder)]
    user = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdout
    assert user.stdout.readline() == "in use\n"
    return user


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "references" / "one"
    made.mkdir(parents=True)
    (made / "logits.npy").write_bytes(b"large")
    return made


def test_the_last_user_removes_it(folder: Path) -> None:
    other = other_user(folder)
    with shared_folder(folder):
        pass
    assert (folder / "logits.npy").read_bytes() == b"large"
    other.communicate(timeout=60)
    assert other.returncode == 0
    assert not folder.exists()


def test_the_last_user_may_be_the_same_process(folder: Path) -> None:
    with shared_folder(folder):
        with shared_folder(folder):
            pass
        assert folder.is_dir()
    assert not folder.exists()


def test_a_user_that_was_killed_holds_nothing(folder: Path) -> None:
    other = other_user(folder)
    other.kill()
    other.wait()
    with shared_folder(folder):
        assert folder.is_dir()
    assert not folder.exists()


def test_what_a_failed_user_made_waits_for_its_next_try(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), shared_folder(folder):
        raise ZeroDivisionError
    assert folder.is_dir()


def test_it_need_not_be_there(tmp_path: Path) -> None:
    with shared_folder(tmp_path / "references" / "none"):
        pass
    assert not (tmp_path / "references" / "none").exists()
