"""Help for a person at a terminal of 80 columns: groups, examples, completion, and errors that lead on."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from slmops.deployments.cli import completion
from slmops.deployments.cli.app import PANELS, run
from slmops.deployments.cli.help_page import EXAMPLES
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import CANDIDATE, CHAMPION, ModelRegistry
from tests.deployments.cli.test_command_line import CONTEXT, GROUP
from tests.support.versions import store_version


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path / "home"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    run(arguments)
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize("command", ["", *GROUP.commands])
def test_nothing_is_cut_off_at_80_columns(home: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    for flag in ("-h", "--help"):
        text = shown(capsys, *command.split(), flag)
        assert "Usage: slmops" in text
        lines = [line for line in text.splitlines() if not line.startswith("Usage:")]
        assert not [line for line in lines if line.rstrip().endswith(("...", "…")) or len(line) > 80]


def test_commands_are_listed_in_groups_with_their_whole_sentences(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, "--help")
    assert [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")] == [
        "Options",
        *PANELS,
    ]
    assert "Judge a version again, without building it, and register or unregister its variants accordingly." in (
        " ".join(text.split())
    )


@pytest.mark.parametrize("command", GROUP.commands)
def test_each_command_has_examples_that_it_accepts(command: str) -> None:
    for example in EXAMPLES[command]:
        program, name, *arguments = shlex.split(example.partition(" > ")[0])
        assert (program, name) == ("slmops", command)
        GROUP.commands[name].make_context(name, arguments, parent=CONTEXT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deplyo",), "Did you mean 'deploy', 'demo'?\nSee slmops --help."),
        (("deploy", "x", "--nam", "y"), "--name).\nSee slmops deploy --help."),
        (("show",), "See slmops show --help."),
    ],
)
def test_a_usage_error_points_to_the_help_of_its_command(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in shown(capsys, *arguments)


def test_a_misspelt_name_is_told_the_nearest(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store_version(open_registry(Settings(home=home)), tmp_path / "variant")
    assert "Did you mean home?" in shown(capsys, "show", "hoem")


def test_slmops_alone_names_the_next_step_of_this_home(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "Begin with: slmops demo" in shown(capsys)
    registry: ModelRegistry = open_registry(Settings(home=home))
    version = store_version(registry, tmp_path / "variant")
    assert "See why: slmops show home" in shown(capsys)
    registry.set_alias("home", CHAMPION, version.version, "test")
    assert "slmops chat home" in shown(capsys)
    other = store_version(registry, tmp_path / "other", {"model.onnx": b"other"})
    registry.set_alias("home", CANDIDATE, other.version, "test")
    assert "slmops diff home@1 home@2" in shown(capsys)


def test_the_shell_completes_names_references_recipes_checks_and_scorers(home: Path, tmp_path: Path) -> None:
    registry = open_registry(Settings(home=home))
    version = store_version(registry, tmp_path / "variant")
    registry.set_alias("home", CHAMPION, version.version, "test")
    assert completion.names("h") == ["home"]
    assert completion.references("ho") == ["home"]
    assert completion.references("home@") == ["home@champion", "home@1"]
    assert "int4-mixed" in completion.recipes("int4-m")
    assert completion.checks("kl") == ["kl_divergence"]
    assert completion.checks("voc") == []
    assert completion.scorers("num") == ["numeric"]


def test_a_broken_home_completes_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write_text("a file where the folder should be")
    assert completion.names("") == []
    monkeypatch.setenv("SLMOPS_STORE__URI", "nonsense")
    assert completion.references("home@") == []


def test_bash_gets_the_completions(home: Path) -> None:
    asked = {"_SLMOPS_COMPLETE": "complete_bash", "COMP_WORDS": "slmops deploy x --device ", "COMP_CWORD": "4"}
    done = subprocess.run(
        [sys.executable, "-m", "slmops"], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["cpu", "gpu"]


def test_precisions_may_be_given_with_commas(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "deploy", "x", "--name", "home", "--precision", "int4,int5", "--dry-run", "--json")
    assert "int5" in json.loads(text)["error"]["message"]
