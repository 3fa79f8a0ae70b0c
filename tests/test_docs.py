"""README and docs/: links lead somewhere, commands exist with the options that are shown, lines are short."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from slmops.deployments.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST_LINE = 120
GROUP: Any = typer.main.get_command(app)
CONTEXT: Any = GROUP.context_class(GROUP, info_name="slmops")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

pages = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.name if page.parent == ROOT else f"docs/{page.name}"
)


def parts(page: Path) -> tuple[str, str]:
    """Return a page's text without its code blocks, and the code blocks."""
    text, code, fenced = [], [], False
    for line in page.read_text("utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    slmops "):
            code.append(line)
        else:
            text.append(line)
    return "\n".join(text), "\n".join(code)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", parts(page)[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shown_commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `slmops` command in a page's code blocks."""
    for line in re.sub(r"\\\n\s*", " ", parts(page)[1]).splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a line of another language
            continue
        yield from arguments(words)


def mentioned_commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `slmops` command in a page's running text, which may leave some out."""
    for span in re.findall(r"`([^`]+)`", parts(page)[0]):
        words = span.split()
        if words[0] == "slmops" and len(words) > 1:
            yield words[1:]


def arguments(words: list[str]) -> Iterator[list[str]]:
    while "slmops" in words:
        words = words[words.index("slmops") + 1 :]
        end = next((index for index, word in enumerate(words) if word in {"&&", "|", ">", ";"}), len(words))
        yield words[:end]
        words = words[end:]


@pages
def test_a_link_leads_to_a_file_and_a_heading_of_it(page: Path) -> None:
    for target in LINK.findall(parts(page)[0]):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in LINK.findall(index.read_text("utf-8"))}
    assert {page for page in PAGES if page != index} <= linked


@pages
def test_a_shown_command_is_accepted(page: Path) -> None:
    for words in shown_commands(page):
        if words[:1] == ["--help"] or not words:
            continue
        command = GROUP.commands[words[0]]
        command.make_context(words[0], words[1:], parent=CONTEXT)  # raises what a user would see


@pages
def test_a_mentioned_command_exists_with_its_options(page: Path) -> None:
    for words in mentioned_commands(page):
        known = {name for option in CONTEXT.command.params for name in option.opts} | {"--help"}
        if not words[0].startswith("-"):
            known |= {name for option in GROUP.commands[words[0]].params for name in option.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, words


@pages
def test_lines_of_text_are_short(page: Path) -> None:
    lines = parts(page)[0].splitlines()
    assert [line for line in lines if len(line) > LONGEST_LINE and not line.startswith("|")] == []


def test_the_readme_is_short() -> None:
    assert len(PAGES[0].read_text("utf-8").splitlines()) <= 150


def test_the_tests_that_the_threat_model_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "security.md").read_text("utf-8"))
    rows = [line for line in parts(ROOT / "docs" / "security.md")[0].splitlines() if line.startswith("|")]
    assert len(named) == len(rows) - 2  # each line but the table's head
    missing = [name for path, name in named if f"def {name}(" not in (ROOT / path).read_text("utf-8")]
    assert not missing
