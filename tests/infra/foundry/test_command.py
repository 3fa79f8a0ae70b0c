"""The `foundry` command, which has no build for Linux: a script with the same output replaces it."""

import os
import stat
import sys
from pathlib import Path

import pytest

from slmops.infra.foundry.command import installed_command, seen_by_command

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows starts no script by its first line")

MODEL_ID = "home-int4-generic-cpu:3"
SCRIPT = """#!{python}
import sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("0.8.119+d4f8f0b4b4")
elif arguments == ["cache", "location"]:
    print("💾 Cache directory path: {cache}")
elif arguments == ["cache", "ls"]:
    print("Models cached on device:\\n   Alias      Model ID\\n💾 home       {listed}")
elif arguments[:4] == ["model", "run", "{model_id}", "--prompt"]:
    {run}
else:
    sys.exit("Unrecognized command")
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """slmops's Foundry cache."""
    return tmp_path / "foundry"


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, listed: str = MODEL_ID, run: str = "print('🟢 on')"
) -> None:
    """Put the stand-in on the PATH."""
    script = folder / "bin" / "foundry"
    script.parent.mkdir(exist_ok=True)
    text = SCRIPT.format(python=sys.executable, cache=cache, listed=listed, model_id=MODEL_ID, run=run)
    script.write_text(text, "utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONUTF8", "1")


def seen(cache: Path) -> str:
    """Its view of the model."""
    return seen_by_command(cache, MODEL_ID, "Turn on the light", 30)


def test_without_it_there_is_no_note(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installed_command() is None
    assert seen(cache) == ""


def test_a_model_that_it_lists_and_that_answers(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(tmp_path, monkeypatch, cache)
    command = installed_command()
    assert command
    assert command.version() == "0.8.119+d4f8f0b4b4"
    assert command.serves(cache)
    assert command.lists(MODEL_ID)
    assert not command.lists("home-int4-generic-cpu")
    assert "on" in command.answer(MODEL_ID, "Turn on the light", 30)
    assert seen(cache) == ""


def test_one_in_the_current_directory_is_not_run(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(tmp_path, monkeypatch, cache)
    monkeypatch.chdir(tmp_path / "bin")
    monkeypatch.setenv("PATH", ".")  # what Windows does by itself
    assert installed_command() is None


@pytest.mark.parametrize("other", ["", "-2", "/models"])
def test_another_cache_is_not_queried(other: str, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(tmp_path, monkeypatch, Path(f"{cache}{other}") if other else tmp_path, listed="none")
    command = installed_command()
    assert command
    assert not command.serves(cache)
    assert seen(cache) == ""


@pytest.mark.parametrize(
    ("listed", "run", "said"),
    [
        ("home-int4-generic-cpu:2", "print('on')", "does not list"),
        (MODEL_ID, "pass", "prints no answer"),
        (MODEL_ID, "sys.exit('Exception: it was not found in the catalog')", "1: Exception: it was not found"),
        (MODEL_ID, "import time; time.sleep(60)", "did not end within 1 s"),
    ],
)
def test_what_stands_against_a_model_is_one_sentence(
    listed: str, run: str, said: str, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(tmp_path, monkeypatch, cache, listed, run)
    found = seen_by_command(cache, MODEL_ID, "Turn on the light", 1 if "sleep" in run else 30)
    assert said in found
    assert "\n" not in found


def test_one_that_cannot_be_run(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(tmp_path, monkeypatch, cache)
    (tmp_path / "bin" / "foundry").write_text("#!/no/such/interpreter\n", "utf-8")
    assert "cannot be run" in seen(cache)
