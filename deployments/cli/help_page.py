"""The help of the command line: commands in groups, each with its whole sentence, and examples."""

import inspect
from typing import Any

from typer.core import TyperGroup

EXAMPLES = {
    "deploy": (
        "slmops deploy ./my-model --name helpdesk --dry-run",
        "slmops deploy ./my-model --name helpdesk --quick",
        "slmops deploy ./my-model --name helpdesk --eval rows.jsonl",
        "slmops deploy ./my-model --name helpdesk --precision int4,int8",
        "slmops deploy ./my-model --name helpdesk --budget max-size=400MB",
        "slmops deploy ./my-model --name helpdesk --remote",
        "slmops deploy ./model --name desk --device gpu --provider cuda --build-only",
    ),
    "regate": ("slmops regate helpdesk@3 --max-quality-loss 0.03", "slmops regate helpdesk@3 --eval rows.jsonl"),
    "promote": (
        'slmops promote helpdesk@candidate --reason "knows the garage"',
        "slmops promote helpdesk@candidate --approval",
    ),
    "rollback": ("slmops rollback helpdesk", "slmops rollback helpdesk --to 1"),
    "retrain": (
        "slmops retrain chats.jsonl --base ./my-model --name helpdesk",
        "slmops retrain chats.jsonl --base ./my-model --name helpdesk --no-promotion",
    ),
    "demo": ("slmops demo",),
    "make-demo": ("slmops make-demo ./home-model",),
    "recipes": ("slmops recipes", "slmops recipes --json"),
    "status": ("slmops status", "slmops status --json"),
    "open": ("slmops open helpdesk", "slmops open helpdesk@3"),
    "runs": ("slmops runs", "slmops runs --limit 50 --json"),
    "list": ("slmops list", "slmops list helpdesk", "slmops list --json"),
    "show": ("slmops show helpdesk", "slmops show helpdesk@3", "slmops show helpdesk@staging --json"),
    "history": ("slmops history helpdesk",),
    "diff": ("slmops diff helpdesk@3 helpdesk@4",),
    "logs": ("slmops logs helpdesk@3", "slmops logs -f", "slmops logs -f helpdesk"),
    "benchmark": ("slmops benchmark helpdesk", "slmops benchmark helpdesk@3 --lm-eval-task arc_easy --limit 100"),
    "sbom": ("slmops sbom helpdesk@3 > helpdesk.cdx.json",),
    "serve": ("slmops serve", "slmops serve helpdesk --port 8080"),
    "chat": ("slmops chat helpdesk", "slmops chat helpdesk@3"),
    "catalog": ("slmops catalog",),
    "unregister": ("slmops unregister helpdesk@3",),
    "foundry-dir": ("slmops foundry-dir",),
    "push": ("slmops push helpdesk@3",),
    "pull": ("slmops pull helpdesk@3", "slmops pull helpdesk --foundry-cache DIR"),
    "verify": ("slmops verify helpdesk@3 --repair",),
    "ingest": ("slmops ingest ./my-model",),
    "export": ("slmops export helpdesk@3 helpdesk-3.tar",),
    "import": ("slmops import helpdesk-3.tar",),
    "sign": ("slmops sign helpdesk@3",),
    "alias": ("slmops alias helpdesk@3 staging", "slmops alias helpdesk@3 staging --remove"),
    "tag": ("slmops tag helpdesk@3 team=kitchen", "slmops tag helpdesk@3 team="),
    "note": ('slmops note helpdesk@3 "asks too often"',),
    "delete": ("slmops delete helpdesk@3",),
    "gc": ("slmops gc --keep 5 --dry-run",),
    "check": ("slmops check", "slmops check ./my-model"),
    "config": ("slmops config",),
    "schedule": (
        'slmops schedule home --cron "0 2 * * *" --dataset chats.jsonl --base DIR',
        'slmops schedule helpdesk --cron "0 3 * * 0" --benchmark',
        "slmops schedule helpdesk --remove",
    ),
    "pool": (
        "slmops pool boxes --type docker --image slmops:1 --memory 8GB",
        "slmops pool cluster --type kubernetes --image slmops:1 --limit 4",
    ),
    "up": ("slmops up", "slmops up --check"),
}


def examples(command: str) -> str:
    """Return the end of a command's help: its examples, one per line (`\\b` keeps them from being joined)."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in EXAMPLES[command])))


class GroupedCommands(TyperGroup):
    """Lists the commands by their panel. The first sentence of each is never cut."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section per panel, with one column of names for all."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            sentence = inspect.cleandoc(command.help or "").split("\n\n")[0]
            panel = getattr(command, "rich_help_panel", None) or "Commands"
            panels.setdefault(str(panel), []).append((name.ljust(max(map(len, self.commands))), sentence))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)
