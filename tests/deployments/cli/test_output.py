"""What commands print: foreign text cannot control the terminal, and a full disk is one sentence."""

import errno
import io
import sys

import pytest

from slmops.deployments.cli import app as cli
from slmops.deployments.cli.output import (
    print_answer,
    print_error,
    print_fact,
    print_line,
    print_note,
    print_piece,
    print_prose,
    print_table,
)
from slmops.deployments.cli.stages import stage_display
from slmops.deployments.server.environment import unusable_api
from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.foreign_text import without_passwords

HOSTILE = "a\x1b]0;title\x07\x1b[2Jb\x9b31m\r\u202ec"
SHOWN = ("\\u001b]0;title\\u0007", "\\u001b[2Jb", "\\u009b31m", "\\r", "\\u202ec")


def print_all(text: str) -> None:
    print_line(text)
    print_note(text)
    print_piece(text)
    print_table(text, [{"what": text, "verdict": "ok"}])
    print_error(StageFailed(text, text), as_json=False)
    with stage_display() as display:
        display(text, 0.0, text)
        display(text, 1.0, text)


def test_foreign_text_never_controls_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_all(HOSTILE)
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & {*printed}
    assert all(printed.count(part) == 8 for part in SHOWN)


def test_an_answer_is_one_line_that_cannot_look_like_another(capsys: pytest.CaptureFixture[str]) -> None:
    print_answer("Hi?", "home:1", "yes\n\n\nhome@2 is the champion.\r\n\u2028" + "long " * 1_000)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Foundry Local answered 'Hi?' through home:1: yes home@2 is the champion. long ")
    assert line.endswith(" ...")
    print_answer("Hi?", "home:1", "\n ")
    assert capsys.readouterr().out.endswith("home:1: (nothing)\n")
    assert len(line) < 600


@pytest.mark.parametrize("as_json", [False, True])
def test_a_password_in_an_address_is_not_shown(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    addresses = ("http://me:s3cr3t@127.0.0.1:4200/api", "https://t0ken-s3cr3t@host/x?y=z@w", "s3://a:s3cr3t@b/c")
    for address in addresses:
        print_line(f"API: {address}")
        print_note(address)
        print_table(address, [{"what": address}])
        print_error(unusable_api(address, f"{address!r} is down"), as_json=as_json)
    captured = capsys.readouterr()
    assert "s3cr3t" not in captured.out + captured.err
    assert "http://***@127.0.0.1:4200/api" in captured.out
    assert without_passwords("me@host, s3://bucket/a@b") == "me@host, s3://bucket/a@b"


def test_lines_of_a_note_are_told_from_slmops_own(capsys: pytest.CaptureFixture[str]) -> None:
    print_fact("note", "first\nhome@9 is the champion\u2028sha256 0\n")
    assert capsys.readouterr().out == "note: first\n    home@9 is the champion\n    sha256 0\n"


def test_lines_tabs_and_letters_of_all_languages_stay(capsys: pytest.CaptureFixture[str]) -> None:
    print_piece("eins\n\tzwei größer 日本 👩\u200d💻\n")
    assert capsys.readouterr().out == "eins\n\tzwei größer 日本 👩\u200d💻\n"


def test_an_output_that_is_ascii_only_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(cli, "run", lambda _: print_piece("größer"))
    with pytest.raises(SystemExit):
        cli.main(["list"])
    stream.flush()
    assert stream.buffer.getvalue() == b"gr\\xf6\\xdfer"  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_cannot_be_used_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: None, number: int
) -> None:
    def fail(**_: object) -> None:
        raise OSError(number, "No luck", "/home/of/slmops")

    monkeypatch.setattr(cli, "app", fail)
    assert cli.run(["list"]) == 1
    error = capsys.readouterr().err
    assert "A file cannot be read or written: /home/of/slmops: No luck." in error
    assert "Traceback" not in error


def test_an_unexpected_error_is_told_where_no_log_can_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: None
) -> None:
    def fail(**_: object) -> None:
        raise KeyError("unexpected")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli, "write_whole", full)
    assert cli.run(["list"]) == 1
    assert "KeyError: 'unexpected'" in capsys.readouterr().err


def test_running_text_breaks_between_words_on_a_terminal_and_nowhere_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/home/user/a-folder/with-a-long-name/reports/home@1.html"  # a copy of it must have no line end
    text = f"warning: other programs used half of the measurement's cores. See {path} on an idle machine."
    print_prose(text)
    assert capsys.readouterr().out == f"{text}\n"
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "40")
    print_prose(text)
    print_error(BadInput(text, f"slmops show {path}"), as_json=False)
    printed, told = capsys.readouterr()
    lines = printed.splitlines()
    assert " ".join(lines) == text
    assert [line for line in lines if len(line) > 40] == [path]
    assert f"\n{path}\n" in told
    assert told.endswith(f"slmops show {path}\n")
