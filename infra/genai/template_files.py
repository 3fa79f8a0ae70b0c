"""A checkpoint's chat template, rewritten so that onnxruntime-genai renders it as transformers does.

genai 0.18 and Foundry Local have their own Jinja. It lacks some of Python's methods and of jinja2's filters, and gives
other results for some expressions. Every replacement here is an expression with the same value in jinja2, so
transformers renders the corrected template as before. `tests/infra/genai/test_template_files.py` fails for a correction
that a newer runtime no longer needs.
"""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from slmops.infra.checkpoints.chat_template import parse_chat_template, template_environment
from slmops.infra.foreign_files import BYTE_ORDER_MARK
from slmops.infra.genai.template_source import Node, NotWritable, is_part_of_result, template_source
from slmops.infra.tool_calls.forms import takes_tools, takes_tools_in_system_message

# The new node, and the correction in words; None if no correction is needed.
Rewritten = tuple[str, Node] | None
Rewriting = Callable[[Node], Rewritten]
# Escapes in strings that genai reads as the letter after the backslash.
OTHER_ESCAPE = re.compile(r"""(?<!\\)(?:\\\\)*\\[^ntr\\'"]""")
# Filters and methods that return a text, and names that templates give to texts.
TEXT_FILTERS = {"trim", "lower", "upper", "join", "string", "title", "capitalize", "replace", "tojson"}
TEXT_METHODS = {"strip", "lstrip", "rstrip", "lower", "upper", "title", "capitalize", "replace", "join"}
TEXT_NAMES = re.compile(r"(content|text|thoughts?|reasoning\w*)$")
LISTING_FILTERS = {"select", "reject", "selectattr", "rejectattr", "map", "batch", "unique", "items"}
# Variables that transformers always passes to a template; None if the client passes none.
ALWAYS_DEFINED = ("tools", "documents")
# Of indented JSON: a tool's schema has an object of properties within each object of properties.
DEEPEST_EMPTY = 10
# genai unwraps and flattens a client's tools, unless the template has one of these; it ignores blanks.
READS_WHOLE_TOOLS = ("tool.function", "tool|tojson", "tools|tojson")
ASKS_FOR_WHOLE_TOOLS = f"{{{{ '{READS_WHOLE_TOOLS[0]}'[:0] }}}}"  # it prints nothing
# Puts tools, as JSON, where a template reads them from the system message; genai flattens what it finds there.
TOOLS_TO_SYSTEM_MESSAGE = (
    "{%- if tools %}"
    "{%- set system = messages[0] if messages[0]['role'] == 'system' else {'content': ''} %}"
    "{%- set others = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{%- set messages = [{'role': 'system', 'content': system['content'], 'tools': tools | tojson}] + others %}"
    "{%- endif %}{{ '' }}"
)
COMPARING_TESTS = {"eq": "eq", "equalto": "eq", "==": "eq", "ne": "ne", "!=": "ne", "in": "in"}

# Expressions with another result in genai, without an error, that cannot be rewritten safely.
WITHOUT_MEND: dict[type[nodes.Node], str] = {
    nodes.Div: "division of whole numbers is truncated",
    nodes.Pow: "a power is a decimal number",
    nodes.CallBlock: "there is no block call",
    nodes.FilterBlock: "there is no block filter",
    nodes.With: "there is no block with",
}
METHODS_WITHOUT_MEND = {"upper", "find", "format", "values", "isdigit", "isalpha", "splitlines", "rsplit", "partition"}
FILTERS_WITHOUT_MEND = {"upper", "abs", "round", "wordcount", "format", "sum", "max", "min", "groupby", "batch"}


@dataclass(frozen=True)
class MendedTemplate:
    """A template for the runtimes; `mends` are the corrections, `left` what genai lacks and cannot be rewritten.

    Without corrections the text is the checkpoint's own.
    """

    text: str
    mends: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def mend_template(text: str) -> MendedTemplate:
    """Return a template that genai renders as transformers renders this one; raises `BadInput` if it is not Jinja."""
    prefix, mend_of_tools = _prefix_for_tools(text)
    mended = _mended_expressions(text)
    if not mend_of_tools:
        return mended
    return MendedTemplate(prefix + mended.text, (*mended.mends, mend_of_tools), mended.left)


def _prefix_for_tools(text: str) -> tuple[str, str]:
    """Return Jinja that gives a template the tools as transformers does, and this correction in words."""
    if takes_tools_in_system_message(text) and not takes_tools(text):
        return TOOLS_TO_SYSTEM_MESSAGE, "the tools that the system message has in transformers are put there"
    if takes_tools(text) and not any(hint in text.replace(" ", "") for hint in READS_WHOLE_TOOLS):
        return ASKS_FOR_WHOLE_TOOLS, "tools are asked for as clients send them, and not flattened"
    return "", ""


def _mended_expressions(text: str) -> MendedTemplate:
    tree = parse_chat_template(text)
    mender = _Mender(tree)
    mended = mender.visit(tree)
    mends = [*_mends_of_the_text(text), *mender.mends]
    if any(map(is_part_of_result, mended.find_all(nodes.Expr))):
        mends.append("the result of a function or macro is put in parentheses")
    left = tuple(dict.fromkeys(_left_over(mended)))
    if not mends:
        return MendedTemplate(text, left=left)
    if mender.asks_for:
        mended.body[:0] = [_none_where_undefined(name) for name in ALWAYS_DEFINED if name in mender.asks_for]
    try:
        return MendedTemplate(template_source(mended), tuple(dict.fromkeys(mends)), left)
    except NotWritable as error:
        return MendedTemplate(text, left=(*left, f"{error} cannot be rewritten"))


def _mends_of_the_text(text: str) -> Iterator[str]:
    kept = template_environment(trims_blocks=False)
    tokens = [(kind, value) for _, kind, value in kept.lexer.tokeniter(text, None)]
    marked = any(kind in ("block_begin", "block_end") and "+" in value for kind, value in tokens)
    if marked or "\r" in text or kept.parse(text) != parse_chat_template(text):
        yield "line feeds after blocks and blanks before them, which genai keeps, are left out"
    if text.startswith(BYTE_ORDER_MARK):
        yield "the byte order mark that it begins with is written as a text"
    if any(kind == "raw_begin" for kind, _ in tokens):
        yield "the block raw is written as a text"
    if any(kind == "string" and OTHER_ESCAPE.search(value) for kind, value in tokens):
        yield "escapes in strings are written as the characters that they stand for"


class _Mender(NodeTransformer):
    """Rewrites expressions; `mends` are the corrections, `asks_for` the variables that may be undefined in genai."""

    def __init__(self, tree: Node) -> None:
        self.mends: list[str] = []
        self.asks_for: set[str] = set()
        loops = [loop for loop in tree.find_all(nodes.For) if isinstance(loop.target, nodes.Name)]
        # A message is a mapping, for which genai tests keys correctly.
        self._messages = {loop.target.name for loop in loops if "messages" in _last_name(loop.iter)}

    def visit_Call(self, node: Node) -> Node:  # noqa: N802
        node = self.generic_visit(node)
        is_method = isinstance(node.node, nodes.Getattr) and not node.kwargs
        return self._rewritten(node, METHODS.get(node.node.attr) if is_method else None)

    def visit_Filter(self, node: Node) -> Node:  # noqa: N802
        node = self.generic_visit(node)
        return self._rewritten(node, FILTERS.get(node.name) if node.node is not None else None)

    def visit_Getitem(self, node: Node) -> Node:  # noqa: N802
        return self._rewritten(self.generic_visit(node), _item_of_text)

    def visit_Test(self, node: Node) -> Node:  # noqa: N802
        node = self.generic_visit(node)
        if isinstance(node.node, nodes.Name) and node.node.name in ALWAYS_DEFINED and node.name in ("defined", "none"):
            self.asks_for.add(node.node.name)
            self.mends.append(f"{node.node.name} is none if a client passes none")
        if node.name in COMPARING_TESTS and len(node.args) == 1:
            self.mends.append(f"the test {node.name} is written as a comparison")
            return self.visit_Compare(_compared(node.node, COMPARING_TESTS[node.name], node.args[0]))
        return node

    def visit_Compare(self, node: Node) -> Node:  # noqa: N802
        node = self.generic_visit(node)
        if len(node.ops) > 1:
            self.mends.append("a chain of comparisons is written as single comparisons")
            return node
        among = node.ops[0].expr
        is_message = isinstance(among, nodes.Name) and among.name in self._messages
        known = is_message or isinstance(among, nodes.List | nodes.Tuple | nodes.Dict)
        if node.ops[0].op not in ("in", "notin") or not _is_separator(node.expr) or known:
            return node
        self.mends.append("a test whether a text contains another is written with split")
        several = _compared(_parts(among, node.expr), "gt", nodes.Const(1))
        contains = nodes.Or(_compared(node.expr, "in", among), nodes.And(_is_string(among), several))
        return contains if node.ops[0].op == "in" else nodes.Not(contains)

    def visit_Assign(self, node: Node) -> Node:  # noqa: N802
        node = self.generic_visit(node)
        if not isinstance(node.target, nodes.Tuple) or not isinstance(node.node, nodes.Tuple):
            return node
        names = {target.name for target in node.target.items if isinstance(target, nodes.Name)}
        if names & {name.name for name in node.node.find_all(nodes.Name)}:
            return node
        self.mends.append("several variables are set one by one")
        return [nodes.Assign(*pair) for pair in zip(node.target.items, node.node.items, strict=True)]

    def _rewritten(self, node: Node, rewrite: Rewriting | None) -> Node:
        found = rewrite(node) if rewrite else None
        if found is None:
            return node
        mend, rewritten = found
        self.mends.append(mend)
        return rewritten


def _replace_method(node: Node) -> Rewritten:
    if len(node.args) != 2 or not _is_separator(node.args[0]):
        return None
    return "str.replace is written as split and join", _replaced(node.node.node, *node.args)


def _replace_filter(node: Node) -> Rewritten:
    if len(node.args) != 2 or not _is_separator(node.args[0]):
        return None
    text = node.node if _is_text(node.node) else _filter(node.node, "string")
    return "the filter replace is written as split and join", _replaced(text, *node.args)


def _one_of_several(node: Node) -> Rewritten:
    method, ends = node.node.attr, node.args[0] if len(node.args) == 1 else None
    if not isinstance(ends, nodes.Tuple) or not ends.items:
        return None
    each: list[Node] = [_call(node.node.node, method, end) for end in ends.items]
    return f"{method} with several values is written as several calls", functools.reduce(nodes.Or, each)


def _count(node: Node) -> Rewritten:
    if len(node.args) != 1 or not _is_separator(node.args[0]):
        return None
    return "str.count is written with split", nodes.Sub(_parts(node.node.node, node.args[0]), nodes.Const(1))


def _reverse(node: Node) -> Rewritten:
    backwards = nodes.Slice(None, None, nodes.Neg(nodes.Const(1)))
    return "the filter reverse is written as a slice", nodes.Getitem(_listed(node.node), backwards, "load")


def _json(node: Node) -> Rewritten:
    said, default = [], nodes.Keyword("ensure_ascii", nodes.Const(False))
    if default in node.kwargs:
        node.kwargs = [word for word in node.kwargs if word != default]
        said.append("tojson's ensure_ascii=false, which is its default, is left out")
    indent = next((_whole_number(word.value) for word in node.kwargs if word.key == "indent"), None)
    if indent:
        said.append("empty objects and lists of indented JSON have no line break")
        node = _with_whole_empties(node, indent)
    return ("; ".join(said), node) if said else None


def _with_whole_empties(text: Node, indent: int) -> Node:
    """Return indented JSON without the blank line that genai writes into empty objects and lists, at every depth."""
    for depth in range(DEEPEST_EMPTY):
        inner, outer = " " * (indent * (depth + 1)), " " * (indent * depth)
        for opening, closing in ("{}", "[]"):
            broken = f"{opening}\n{inner}\n{outer}{closing}"
            text = _replaced(text, nodes.Const(broken), nodes.Const(opening + closing))
    return text


def _item_of_text(node: Node) -> Rewritten:
    place = _whole_number(node.arg)
    if place in (-1, 0, 1) and _splits_once(node.node):
        return "a text that is split once is split and joined again", _part(node.node, place)
    if place is None or not _may_be_text(node.node):
        return None
    return "a character of a text is written as a slice", _item(node.node, place)


METHODS: dict[str, Rewriting] = {
    "replace": _replace_method,
    "startswith": _one_of_several,
    "endswith": _one_of_several,
    "count": _count,
    "lower": lambda node: ("str.lower is written as a filter", _filter(node.node.node, "lower")),
    "keys": lambda node: ("dict.keys() is written as the mapping", node.node.node),
}
FILTERS: dict[str, Rewriting] = {
    "replace": _replace_filter,
    "title": lambda node: ("the filter title is written as a method", _call(node.node, "title")),
    "capitalize": lambda node: ("the filter capitalize is written as a method", _call(node.node, "capitalize")),
    "first": lambda node: ("the filter first is written as an index", _item(_listed(node.node), 0)),
    "last": lambda node: (
        ("the filter last is written as an index", _item(node.node, -1)) if _may_be_text(node.node) else None
    ),
    "reverse": _reverse,
    "tojson": _json,
}


def _replaced(text: Node, old: Node, new: Node) -> Node:
    return _filter(_call(text, "split", old), "join", new)


def _call(node: Node, method: str, *arguments: Node) -> Node:
    return nodes.Call(nodes.Getattr(node, method, "load"), list(arguments), [], None, None)


def _filter(node: Node, name: str, *arguments: Node) -> Node:
    return nodes.Filter(node, name, list(arguments), [], None, None)


def _parts(text: Node, separator: Node) -> Node:
    """Return the number of parts of a text between separators: one more than the number of separators."""
    return _filter(_call(text, "split", separator), "length")


def _compared(left: Node, operator: str, right: Node) -> Node:
    return nodes.Compare(left, [nodes.Operand(operator, right)])


def _is_string(node: Node) -> Node:
    return nodes.Test(node, "string", [], [], None, None)


def _item(node: Node, place: int) -> Node:
    """Return an item of a list or the character of a text: genai's texts have slices but no items."""
    start, stop = nodes.Const(place), nodes.Const(place + 1) if place != -1 else None
    character = nodes.Getitem(node, nodes.Slice(start, stop, None), "load")
    if _is_text(node):
        return character
    item = nodes.Getitem(node, nodes.Const(place), "load")
    return nodes.CondExpr(_is_string(node), character, item)


def _listed(node: Node) -> Node:
    """Return a list instead of a generator of jinja2, which has neither items nor slices."""
    return _filter(node, "list") if isinstance(node, nodes.Filter) and node.name in LISTING_FILTERS else node


def _none_where_undefined(name: str) -> Node:
    undefined = nodes.Not(nodes.Test(nodes.Name(name, "load"), "defined", [], [], None, None))
    return nodes.If(undefined, [nodes.Assign(nodes.Name(name, "store"), nodes.Const(None))], [], [])


def _is_separator(node: Node) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, str) and node.value != ""


def _splits_once(node: Node) -> bool:
    """Whether an expression is `text.split(separator, 1)`."""
    is_split = isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "split"
    return is_split and len(node.args) == 2 and _is_separator(node.args[0]) and node.args[1] == nodes.Const(1)


def _part(split: Node, place: int) -> Node:
    """Return a part of a text that is split once, with a separator that may occur several times."""
    text, separator, one = split.node.node, split.args[0], nodes.Const(1)
    parts = _call(text, "split", separator)
    first = nodes.Getitem(parts, nodes.Const(0), "load")
    rest = _filter(nodes.Getitem(parts, nodes.Slice(one, None, None), "load"), "join", separator)
    last = nodes.CondExpr(_compared(_parts(text, separator), "gt", one), rest, first)
    return {0: first, 1: rest, -1: last}[place]


def _is_text(node: Node) -> bool:
    """Whether the value of an expression is certainly a text."""
    if isinstance(node, nodes.Filter):
        return node.name in TEXT_FILTERS
    if isinstance(node, nodes.Call):
        return isinstance(node.node, nodes.Getattr) and node.node.attr in TEXT_METHODS
    return isinstance(node, nodes.Concat) or (isinstance(node, nodes.Const) and isinstance(node.value, str))


def _may_be_text(node: Node) -> bool:
    return _is_text(node) or bool(TEXT_NAMES.search(_last_name(node)))


def _last_name(node: Node) -> str:
    match node:
        case nodes.Name():
            return str(node.name)
        case nodes.Getattr():
            return str(node.attr)
        case nodes.Getitem(arg=nodes.Const(value=str(key))):
            return key
        case nodes.Getitem(arg=nodes.Slice()) | nodes.Filter():
            return _last_name(node.node) if node.node is not None else ""
        case _:
            return ""


def _whole_number(node: Node) -> int | None:
    sign, constant = (-1, node.node) if isinstance(node, nodes.Neg) else (1, node)
    value = constant.value if isinstance(constant, nodes.Const) else None
    return sign * value if isinstance(value, int) and not isinstance(value, bool) else None


def _left_over(tree: Node) -> Iterator[str]:
    """Yield constructs that genai lacks or evaluates differently, and that cannot be rewritten safely."""
    node: Node
    for node in tree.find_all(nodes.Node):
        is_method = isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr)
        if type(node) in WITHOUT_MEND:
            yield WITHOUT_MEND[type(node)]
        elif isinstance(node, nodes.Filter) and node.name in FILTERS_WITHOUT_MEND:
            yield f"there is no filter {node.name}"
        elif is_method and node.node.attr in METHODS_WITHOUT_MEND:
            yield f"there is no method {node.node.attr}"
