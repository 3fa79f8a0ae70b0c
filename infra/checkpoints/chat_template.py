"""The Jinja of chat templates: the environment that transformers gives to templates, and their parsing."""

import json
from datetime import datetime
from typing import TYPE_CHECKING

from slmops.infra.errors import BadInput

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2 import nodes as jinja


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


def parse_chat_template(text: str, where: str = "The chat template") -> "jinja.Template":
    """Return a chat template's syntax tree; raises `BadInput`, which names `where`, for one that is not Jinja."""
    from jinja2 import TemplateSyntaxError

    try:
        return template_environment().parse(text)
    except TemplateSyntaxError as error:
        raise BadInput(
            f"{where} is not valid Jinja: {error.message}, line {error.lineno}.",
            "Give a working one with --chat-template.",
            code="chat-template-not-jinja",
        ) from error
