"""Foundry Local's `foundry` command, if it is installed: whether it lists slmops's models, and a model's answer.

It is installed separately (winget, brew) and serves one cache per user, which `foundry cache cd` sets. This module
reads that setting and never changes it.
https://learn.microsoft.com/azure/ai-foundry/foundry-local/reference/reference-cli
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from slmops.infra.process.channel import QUIET_ENVIRONMENT
from slmops.infra.process.programs import installed_program

ASKING_DEADLINE_S = 60  # its service may have to start first


class CommandFailed(Exception):
    """The command failed; the text is one sentence."""


@dataclass(frozen=True)
class FoundryCommand:
    """The command's path."""

    path: str

    def version(self) -> str:
        """Return its version. Raises `CommandFailed`."""
        return self._run("--version").strip()

    def serves(self, cache_dir: Path) -> bool:
        """Whether this directory is the cache that it serves. Raises `CommandFailed`."""
        wanted = re.escape(os.path.normcase(cache_dir))
        return bool(re.search(rf"{wanted}[\\/]?\s*$", os.path.normcase(self._run("cache", "location")), re.MULTILINE))

    def lists(self, model_id: str) -> bool:
        """Whether its cache has the model. Raises `CommandFailed`."""
        return model_id in self._run("cache", "ls").split()

    def answer(self, model_id: str, question: str, deadline_s: float) -> str:
        """Return its output for a question to the model, which has more than the answer. Raises `CommandFailed`."""
        return self._run("model", "run", model_id, "--prompt", question, deadline_s=deadline_s).strip()

    def _run(self, *arguments: str, deadline_s: float = ASKING_DEADLINE_S) -> str:
        shown = " ".join(("foundry", *arguments[:2]))
        try:
            done = subprocess.run(
                [self.path, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env={**os.environ, **QUIET_ENVIRONMENT},
                encoding="utf-8",
                errors="replace",
                timeout=deadline_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"`{shown}` did not end within {deadline_s:.0f} s.") from None
        except OSError as error:
            raise CommandFailed(f"`{shown}` cannot be run: {error.strerror}.") from None
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise CommandFailed(
                f"`{shown}` ended with {done.returncode}{': ' if reason else '.'}{''.join(reason)[:200]}"
            )
        return done.stdout


def installed_command() -> FoundryCommand | None:
    """Return the command if it is on the PATH."""
    path = installed_program("foundry")
    return FoundryCommand(path) if path else None


def seen_by_command(cache_dir: Path, model_id: str, question: str, deadline_s: float) -> str:
    """Return one sentence on whether the command can use a model in this cache; empty if it can.

    A command that serves another cache or is not installed is not a fault of the model.
    """
    command = installed_command()
    try:
        if command is None or not command.serves(cache_dir):
            return ""
        if not command.lists(model_id):
            return f"The foundry command does not list {model_id} in its cache."
        if not command.answer(model_id, question, deadline_s):
            return f"The foundry command prints no answer of {model_id}."
    except CommandFailed as error:
        return f"The foundry command fails with {model_id}: {error}"
    return ""
