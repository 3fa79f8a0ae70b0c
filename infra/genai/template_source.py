"""A Jinja syntax tree written as a template that jinja2 and onnxruntime-genai render alike.

transformers' jinja2 removes a line feed after a block and blanks before it; onnxruntime-genai does neither. White space
that jinja2 would remove is therefore written as an expression. Comments are left out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import nodes

from slmops.infra.foreign_files import BYTE_ORDER_MARK

Node = Any  # one of jinja2's nodes, whose fields depend on its class
OPERATORS = {"eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in"}
BINARY: dict[type[nodes.Node], str] = {
    nodes.Add: "+", nodes.Sub: "-", nodes.Mul: "*", nodes.Div: "/", nodes.FloorDiv: "//", nodes.Mod: "%",
    nodes.Pow: "**", nodes.And: "and", nodes.Or: "or",
}  # fmt: skip
UNARY: dict[type[nodes.Node], str] = {nodes.Neg: "-", nodes.Pos: "+", nodes.Not: "not "}
ESCAPES = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "'": "\\'"}
# Expressions in parentheses, which are only needed inside other expressions.
WRAPPED = (nodes.BinExpr, nodes.UnaryExpr, nodes.Compare, nodes.Test, nodes.CondExpr, nodes.Concat, nodes.Filter)
TAG_BEGINS = ("{{", "{%", "{#")


class NotWritable(Exception):
    """A tree has a node that cannot be written; the argument is its name."""


@dataclass(frozen=True)
class _Piece:
    kind: Literal["data", "block", "print"]
    text: str


def template_source(template: nodes.Template) -> str:
    """Return a template that renders as the syntax tree does; raises `NotWritable`."""
    pieces: list[_Piece] = []
    for piece in _statements(template.body):
        if piece.kind == "data" and pieces and pieces[-1].kind == "data":
            pieces[-1] = _Piece("data", pieces[-1].text + piece.text)
        elif piece.text:
            pieces.append(piece)
    kinds = [None, *(piece.kind for piece in pieces), None]
    return "".join(
        _data(piece.text, kinds[place], kinds[place + 2]) if piece.kind == "data" else piece.text
        for place, piece in enumerate(pieces)
    )


def _data(text: str, before: str | None, behind: str | None) -> str:
    """Return text between tags; parts that a runtime would remove, or read as a tag, become expressions."""
    if any(begin in text for begin in TAG_BEGINS) or text.endswith("{"):
        return f"{{{{ {_string(text)} }}}}"
    head = tail = ""
    if text.startswith("\n" if before == "block" else BYTE_ORDER_MARK):
        head, text = text[0], text[1:]
    line = text.rpartition("\n")[2]
    at_line_start = "\n" in text or (before is None and not head)
    if behind == "block" and line and not line.strip() and at_line_start:
        text, tail = text.removesuffix(line), line
    elif behind is None and text.endswith("\n"):
        text, tail = text[:-1], "\n"
    return "".join([_printed(head), text, _printed(tail)])


def _printed(text: str) -> str:
    return f"{{{{ {_string(text)} }}}}" if text else ""


def _block(text: str) -> _Piece:
    return _Piece("block", f"{{% {text} %}}")


def _statements(body: Sequence[nodes.Node]) -> Iterator[_Piece]:
    for node in body:
        write = _STATEMENTS.get(type(node))
        if write is None:
            raise NotWritable(type(node).__name__)
        yield from write(node)


def _output(node: Node) -> Iterator[_Piece]:
    for child in node.nodes:
        is_data = isinstance(child, nodes.TemplateData)
        yield _Piece("data", child.data) if is_data else _Piece("print", f"{{{{ {_outer(child)} }}}}")


def _scope(node: nodes.Scope) -> Iterator[_Piece]:
    yield from _statements(node.body)


def _if(node: nodes.If) -> Iterator[_Piece]:
    yield _block(f"if {_outer(node.test)}")
    yield from _statements(node.body)
    for branch in node.elif_:
        yield _block(f"elif {_outer(branch.test)}")
        yield from _statements(branch.body)
    yield from _else(node.else_)
    yield _block("endif")


def _else(body: Sequence[nodes.Node]) -> Iterator[_Piece]:
    if body:
        yield _block("else")
        yield from _statements(body)


def _for(node: nodes.For) -> Iterator[_Piece]:
    condition = f" if {expression(node.test)}" if node.test else ""
    recursive = " recursive" if node.recursive else ""
    yield _block(f"for {_target(node.target)} in {expression(node.iter)}{condition}{recursive}")
    yield from _statements(node.body)
    yield from _else(node.else_)
    yield _block("endfor")


def _set(node: nodes.Assign) -> Iterator[_Piece]:
    yield _block(f"set {_target(node.target)} = {_outer(node.node)}")


def _set_block(node: nodes.AssignBlock) -> Iterator[_Piece]:
    if node.filter is not None:
        raise NotWritable("a filtered block")
    yield _block(f"set {_target(node.target)}")
    yield from _statements(node.body)
    yield _block("endset")


def _macro(node: nodes.Macro) -> Iterator[_Piece]:
    without = len(node.args) - len(node.defaults)
    defaults = ["", *(f"={expression(default)}" for default in node.defaults)]
    parameters = (f"{name.name}{defaults[max(0, place - without + 1)]}" for place, name in enumerate(node.args))
    yield _block(f"macro {node.name}({', '.join(parameters)})")
    yield from _statements(node.body)
    yield _block("endmacro")


_STATEMENTS: dict[type[nodes.Node], Callable[[Node], Iterator[_Piece]]] = {
    nodes.Output: _output,
    nodes.Scope: _scope,
    nodes.If: _if,
    nodes.For: _for,
    nodes.Assign: _set,
    nodes.AssignBlock: _set_block,
    nodes.Macro: _macro,
    nodes.Continue: lambda node: iter([_block("continue")]),
    nodes.Break: lambda node: iter([_block("break")]),
}


def _target(node: nodes.Node) -> str:
    if isinstance(node, nodes.Tuple):
        return ", ".join(map(_target, node.items))
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    return expression(node)


def _outer(node: nodes.Node) -> str:
    written = expression(node)
    return written[1:-1] if isinstance(node, WRAPPED) else written


def expression(node: Node) -> str:
    """Return an expression in a template's syntax; raises `NotWritable`."""
    if type(node) in BINARY:
        return f"({expression(node.left)} {BINARY[type(node)]} {expression(node.right)})"
    if isinstance(node, nodes.Not) and isinstance(node.node, nodes.Test):
        return _test(node.node, "is not")
    if type(node) in UNARY:
        return f"({UNARY[type(node)]}{expression(node.node)})"
    write = _EXPRESSIONS.get(type(node))
    if write is None:
        raise NotWritable(type(node).__name__)
    return write(node)


def _filter(node: nodes.Filter) -> str:
    if node.node is None:
        raise NotWritable("a filtered block")
    arguments = _arguments(node)
    return f"({expression(node.node)}|{node.name}{f'({arguments})' if arguments else ''})"


def _test(node: nodes.Test, verb: str = "is") -> str:
    arguments = _arguments(node)
    return f"({expression(node.node)} {verb} {node.name}{f'({arguments})' if arguments else ''})"


def _comparison(node: nodes.Compare) -> str:
    sides = [node.expr, *(operand.expr for operand in node.ops)]
    compared = [
        f"({expression(left)} {OPERATORS[operand.op]} {expression(operand.expr)})"
        for left, operand in zip(sides, node.ops, strict=False)
    ]
    return compared[0] if len(compared) == 1 else f"({' and '.join(compared)})"


def _choice(node: nodes.CondExpr) -> str:
    other = "" if node.expr2 is None else f" else {expression(node.expr2)}"
    return f"({expression(node.expr1)} if {expression(node.test)}{other})"


def is_part_of_result(node: nodes.Node) -> bool:
    """Whether an expression is a part of what a function or macro returned, for which genai needs parentheses."""
    called = node.node if isinstance(node, nodes.Getattr | nodes.Getitem) else None
    return isinstance(called, nodes.Call) and isinstance(called.node, nodes.Name)


def _whole(node: nodes.Getattr | nodes.Getitem) -> str:
    return f"({expression(node.node)})" if is_part_of_result(node) else expression(node.node)


def _item(node: nodes.Getitem) -> str:
    return f"{_whole(node)}[{_outer(node.arg)}]"


def _slice(node: nodes.Slice) -> str:
    start, stop, step = ("" if part is None else _outer(part) for part in (node.start, node.stop, node.step))
    return f"{start}:{stop}" + (f":{step}" if step else "")


def _arguments(node: Node) -> str:
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        raise NotWritable("arguments in a list")
    named = (f"{keyword.key}={expression(keyword.value)}" for keyword in node.kwargs)
    return ", ".join([*map(expression, node.args), *named])


def _listed(items: Sequence[nodes.Node]) -> str:
    return ", ".join(map(expression, items))


def _constant(node: nodes.Const) -> str:
    if isinstance(node.value, str):
        return _string(node.value)
    words = {True: "true", False: "false", None: "none"}
    return words[node.value] if node.value is None or isinstance(node.value, bool) else str(node.value)


def _string(text: str) -> str:
    return "'" + "".join(ESCAPES.get(character, character) for character in text) + "'"


_EXPRESSIONS: dict[type[nodes.Node], Callable[[Node], str]] = {
    nodes.Name: lambda node: node.name,
    nodes.Const: _constant,
    nodes.TemplateData: lambda node: _string(node.data),
    nodes.Getattr: lambda node: f"{_whole(node)}.{node.attr}",
    nodes.Getitem: _item,
    nodes.Slice: _slice,
    nodes.Call: lambda node: f"{expression(node.node)}({_arguments(node)})",
    nodes.Filter: _filter,
    nodes.Test: _test,
    nodes.Compare: _comparison,
    nodes.CondExpr: _choice,
    nodes.Concat: lambda node: f"({' ~ '.join(map(expression, node.nodes))})",
    nodes.List: lambda node: f"[{_listed(node.items)}]",
    nodes.Tuple: lambda node: f"({_listed(node.items)}{',' if len(node.items) == 1 else ''})",
    nodes.Dict: lambda node: f"{{{_listed(node.items)}}}",
    nodes.Pair: lambda node: f"{expression(node.key)}: {expression(node.value)}",
}
