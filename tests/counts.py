"""Counts of the code's structure: `python -m tests.counts` prints them, tests/test_counts.py checks the limits."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("deployments", "flows", "tasks", "infra")


@dataclass(frozen=True)
class Count:
    """A count, its limit, and what it counts; `where` names each occurrence."""

    what: str
    limit: float
    found: float
    where: tuple[str, ...] = ()


def sources(*rooms: str) -> Iterator[Path]:
    """Yield the product's modules in these folders, or all modules."""
    for room in rooms or ROOMS:
        yield from sorted((ROOT / room).rglob("*.py"))


def lines_of(path: Path) -> int:
    """Return the lines of a module."""
    return len(path.read_text("utf-8").splitlines())


def _longer_than(limit: int, *rooms: str) -> tuple[str, ...]:
    long = [(path, lines_of(path)) for path in sources(*rooms)]
    return tuple(f"{path.relative_to(ROOT)} ({lines})" for path, lines in long if lines > limit)


def _nodes(is_counted: Callable[[ast.AST], bool]) -> tuple[str, ...]:
    return tuple(
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if is_counted(node)
    )


def _takes_settings_and_registry(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    arguments = node.args
    names = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    return {"settings", "registry"} <= names


def _is_any(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "Any"


def _calls_a_child_by_string(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not node.args:
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    first = node.args[0]
    return name in ("run_in_child", "call") and isinstance(first, ast.Constant) and isinstance(first.value, str)


def counts() -> tuple[Count, ...]:
    """Count all of it."""
    rooms = tuple(sorted(path.parent.name for path in (ROOT / "tasks").glob("*/__init__.py")))
    lines = sum(map(lines_of, sources()))
    anys = _nodes(_is_any)
    long, flows = _longer_than(400), _longer_than(130, "flows")
    both, by_string = _nodes(_takes_settings_and_registry), _nodes(_calls_a_child_by_string)
    return (
        Count("files of more than 400 lines", 0, len(long), long),
        Count("flows of more than 130 lines", 0, len(flows), flows),
        Count("folders in tasks/", 14, len(rooms), rooms),
        Count("functions that take both settings and registry", 2, len(both), both),
        Count("Any per 1,000 lines", 8, round(1000 * len(anys) / lines, 1)),
        Count("calls of a child by string", 0, len(by_string), by_string),
        Count("lines of the product", 50_150, lines),
    )


if __name__ == "__main__":
    for count in counts():
        print(f"{count.found:>8,} of {count.limit:>6,}  {count.what}")
        if count.found > count.limit and count.where:
            print("".join(f"{'':>21}{place}\n" for place in count.where), end="")
