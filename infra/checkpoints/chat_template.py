"""The Jinja of chat templates: the environment that transformers gives to templates, and their parsing."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from slmops.infra.errors import BadInput
from slmops.infra.reference.answers import Message

if TYPE_CHECKING:
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2 import nodes as jinja

DEEPEST_TREE = 150  # levels: those of known models have up to 17, and Python's compiler bears about 200
NOT_JINJA = "chat-template-not-jinja"
Render = Callable[[Sequence[Message], bool], str]


def template_environment(*, trims_blocks: bool = True) -> "Environment":
    """Return Jinja's immutable sandbox with the settings, tags and functions that transformers gives to templates.

    With `trims_blocks` False, the white space around blocks is kept, as onnxruntime-genai keeps it.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block `generation`: training masks text outside of it, rendering ignores it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=trims_blocks, lstrip_blocks=trims_blocks, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().astimezone().strftime(pattern)
    return environment


def chat_template_renderer(chat_template: str, special_tokens: Mapping[str, str | None]) -> Render:
    """Return a function `(messages, add_generation_prompt) -> prompt` for a tokenizer's Jinja chat template.

    `special_tokens` are the template's variables (`bos_token`, `eos_token`, ...). Rendering raises jinja2's
    `TemplateError` for a conversation that the template refuses. Raises `BadInput` for one that is not Jinja.

    A template is a program of the checkpoint's author, and may loop or grow without end, already when it is compiled:
    only `slmops.infra.checkpoints.rendering` calls this outside of tests.
    """
    from jinja2 import TemplateSyntaxError

    parse_chat_template(chat_template)
    try:
        template = template_environment().from_string(chat_template)
    except TemplateSyntaxError as error:  # it names a filter or a test that does not exist
        raise _not_jinja("The chat template", error) from None
    except (RecursionError, SyntaxError):  # Python's compiler bears less than Jinja's parser
        raise _too_deep("The chat template") from None
    tokens = {key: token for key, token in special_tokens.items() if token is not None}

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return template.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )

    return render


def parse_chat_template(text: str, where: str = "The chat template") -> "jinja.Template":
    """Return a chat template's syntax tree; raises `BadInput`, which names `where`, for one that is not Jinja.

    Whoever walks the tree may do so recursively: a tree of more than `DEEPEST_TREE` levels is refused.
    """
    from jinja2 import TemplateSyntaxError

    try:
        tree = template_environment().parse(text)
    except RecursionError:
        raise _too_deep(where) from None
    except TemplateSyntaxError as error:
        raise _not_jinja(where, error) from error
    level: list[jinja.Node] = [tree]
    for _ in range(DEEPEST_TREE):
        level = [child for node in level for child in node.iter_child_nodes()]
    if level:
        raise _too_deep(where)
    return tree


def _not_jinja(where: str, error: "TemplateSyntaxError") -> BadInput:
    return BadInput(
        f"{where} is not valid Jinja: {(error.message or '').rstrip('.')}, line {error.lineno}.",
        "Give a working one with --chat-template.",
        code=NOT_JINJA,
    )


def _too_deep(where: str) -> BadInput:
    return BadInput(f"{where} is nested too deeply.", "Give a working one with --chat-template.", code=NOT_JINJA)
