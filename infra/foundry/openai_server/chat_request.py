"""The request of a chat completion: the parameters of OpenAI's API that the server honours. It refuses all others.

`ChatRequest` is also the schema in the server's OpenAPI document.
"""

import json
import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator
from pydantic_core import PydanticCustomError

from slmops.infra.records import Json

LARGEST_INTEGER = 2**63 - 1  # of JSON's integers in the runtime
LARGEST_LIMIT = 2**31 - 1  # of a number of tokens in the runtime
DEPTH = 64


def _portable(value: JsonValue) -> JsonValue:
    for number in _numbers(value, DEPTH):
        if isinstance(number, float) and not math.isfinite(number):
            raise PydanticCustomError("number", "Numbers must be finite")
        if abs(number) > LARGEST_INTEGER and isinstance(number, int):
            raise PydanticCustomError("number", "Integers must fit into 64 bits")
    return value


def _numbers(value: JsonValue, depth: int) -> Iterator[float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | dict):
        if depth == 0:
            raise PydanticCustomError("depth", "At most {levels} levels may be nested", {"levels": DEPTH})
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item, depth - 1)


def _json_object(text: str) -> str:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise PydanticCustomError("arguments", "The text of a JSON object is expected")
    _portable(found)
    return text


# The runtime ends a prompt at the character U+0000.
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Schema = Annotated[dict[str, JsonValue], AfterValidator(_portable)]
Zero = Annotated[float, Field(ge=0, le=0)]
TokenLimit = Annotated[int, Field(ge=1, le=LARGEST_LIMIT)]
StopText = Annotated[Text, Field(min_length=1, max_length=4096)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(_Form):
    """A part of a message's content."""

    type: Literal["text"] = Field(description="Models are given text only.")
    text: Text


def _kind_of(value: object) -> str:
    return "text" if isinstance(value, str) else "parts"


Parts = Annotated[tuple[TextPart, ...], Field(min_length=1)]
Content = Annotated[Annotated[Text, Tag("text")] | Annotated[Parts, Tag("parts")], Discriminator(_kind_of)]
Stops = Annotated[tuple[StopText, ...], Field(min_length=1, max_length=4)]
Stop = Annotated[Annotated[StopText, Tag("text")] | Annotated[Stops, Tag("parts")], Discriminator(_kind_of)]


def _tool_schema(schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    if schema.get("type", "object") != "object":
        raise PydanticCustomError("schema", "The type of a tool's parameters must be object")
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise PydanticCustomError("schema", "It is no JSON Schema: {fault}", {"fault": error.message[:200]}) from None
    return schema


class Function(_Form):
    """A function that the model may call. With `strict`, the arguments always follow the schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: Annotated[Schema, AfterValidator(_tool_schema)] | None = None
    strict: bool | None = None


class Tool(_Form):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Form):
    """The name of an offered function."""

    name: str


class NamedTool(_Form):
    """The tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[tuple[Tool, ...], Field(min_length=1, max_length=128)]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("text")] | Annotated[NamedTool, Tag("parts")],
    Discriminator(_kind_of),
]


class _Message(_Form):
    content: Content | None = None

    @property
    def text(self) -> str:
        """The content's text; several parts are one text, as for the runtime."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())

    @model_validator(mode="after")
    def _has_content(self) -> "_Message":
        if not self.text and not getattr(self, "tool_calls", None):
            said = "The message is empty; leave it out. The runtime would, although the chat template would not."
            raise PydanticCustomError("empty_message", said)
        return self


class SystemMessage(_Message):
    """Instructions. OpenAI's newer name of the role, `developer`, means the same."""

    role: Literal["system", "developer"]
    content: Content
    name: Text | None = None


class UserMessage(_Message):
    """A user's message."""

    role: Literal["user"]
    content: Content
    name: Text | None = None


class CalledFunction(_Form):
    """The function of an earlier tool call."""

    name: Text
    arguments: Annotated[Text, AfterValidator(_json_object)]
    parsed_arguments: JsonValue = Field(None, description="OpenAI's client adds it; `arguments` are used.")


class ToolCall(_Form):
    """A tool call in an earlier answer."""

    id: Annotated[Text, Field(min_length=1)]
    type: Literal["function"]
    function: CalledFunction
    index: Annotated[int, Field(ge=0, le=LARGEST_INTEGER)] | None = Field(
        None, description="The call's place in a stream; the order of the calls is used."
    )

    @property
    def as_sent(self) -> Json:
        """The call as the model made it, without what the client has added."""
        function: Json = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}


class AssistantMessage(_Message):
    """An earlier answer, as the client received it."""

    role: Literal["assistant"]
    name: Text | None = None
    tool_calls: Annotated[tuple[ToolCall, ...], Field(min_length=1)] | None = None
    refusal: None = Field(None, description="The chat template is not given refusals.")
    audio: None = Field(None, description="Models are given text only.")
    function_call: None = Field(None, description="Use tool_calls, its successor.")
    annotations: tuple[()] | None = None
    parsed: JsonValue = Field(None, description="OpenAI's client adds it; `content` is used.")
    reasoning_content: Text | None = Field(
        None, description="The answer's reasoning; the chat template decides whether a later prompt has it."
    )


class ToolMessage(_Message):
    """The result of a tool call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[Text, Field(min_length=1)]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class StreamOptions(_Form):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = Field(None, description="Streams are not padded.")


class PlainFormat(_Form):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class NamedSchema(_Form):
    """A JSON Schema and its name; without a schema any JSON object is valid. The answer always follows it."""

    name: Text
    description: Text | None = None
    json_schema: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class SchemaFormat(_Form):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]


class TemplateVariables(_Form):
    """Variables of the chat template."""

    enable_thinking: bool


class ChatRequest(_Form):
    """The body of `POST /v1/chat/completions`; a parameter that is null counts as absent."""

    model: Annotated[str, Field(min_length=1)] = Field(description="NAME for the champion, or NAME:VERSION.")
    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    max_completion_tokens: TokenLimit | None = Field(
        None, description="Longest answer, in tokens; default: 2,048, or what the context leaves."
    )
    max_tokens: TokenLimit | None = Field(
        None, description="The former name of max_completion_tokens, which has priority."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="Default: 0 as in the evaluation, or 1 with top_p or top_k."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=LARGEST_LIMIT)] | None = Field(None, description="Not in OpenAI's API.")
    seed: Annotated[int, Field(ge=-LARGEST_INTEGER - 1, le=LARGEST_INTEGER)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none"] | None = Field(None, description="Reasoning can only be switched off.")
    chat_template_kwargs: TemplateVariables | None = Field(None, description="Not in OpenAI's API.")
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    metadata: dict[Text, Text] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: tuple[Literal["text"]] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = Field(None, description="One answer is made per request.")
    store: Literal[False] | None = Field(None, description="Answers are not stored.")
    logprobs: Literal[False] | None = Field(None, description="Log probabilities are not available.")
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = Field(
        None, description="Log probabilities are not available."
    )
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(
        None, description="The runtime has no bias of logits."
    )
    presence_penalty: Zero | None = Field(None, description="The runtime has no presence penalty.")
    frequency_penalty: Zero | None = Field(None, description="The runtime has no frequency penalty.")
    tools: Tools | None = Field(None, description="They need a chat template that reads them.")
    tool_choice: ToolChoice | None = Field(None, description="Default: auto with tools, else none.")
    parallel_tool_calls: bool | None = None
    functions: None = Field(None, description="Use tools, their successor.")
    function_call: None = Field(None, description="Use tool_choice, its successor.")

    @model_validator(mode="after")
    def _tools_fit(self) -> "ChatRequest":
        names = [tool.function.name for tool in self.tools or ()]
        for name in names:
            if names.count(name) > 1:
                raise PydanticCustomError("tools", "Two tools have the name {name}", {"name": repr(name)})
        if not names and (self.tool_choice not in (None, "none") or self.parallel_tool_calls is not None):
            raise PydanticCustomError("tool_choice", "It is allowed with tools only")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise PydanticCustomError("tool_choice", "The function that must be called is none of the tools")
        _check_results(self.messages)
        return self


def _check_results(messages: tuple[Message, ...]) -> None:
    waiting: list[str] = []
    for message in messages:
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in waiting:
                said = "A tool's result has a tool_call_id that no call before it waits for"
                raise PydanticCustomError("messages", said)
            waiting.remove(message.tool_call_id)
            continue
        if waiting:
            said = "A tool call has no result: messages of the role tool must follow it"
            raise PydanticCustomError("messages", said)
        waiting = [call.id for call in getattr(message, "tool_calls", None) or ()]
    if waiting:
        raise PydanticCustomError("messages", "The last tool call has no result")
