"""Messages of chats: the turns of user and assistant, calls of tools, and their results."""

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, StrictStr, model_validator

from slmops.infra.records import Json, Record, later_field
from slmops.tasks.questions.strict_json import parse_json


def arguments_of(value: object) -> object:
    """Return a call's arguments; OpenAI's API has them as a string of JSON."""
    return parse_json(value) if isinstance(value, str) else value


class Message(Record):
    """One turn of a chat, or the result of a tool."""

    role: Literal["system", "user", "assistant", "tool"]
    content: StrictStr


class CalledFunction(Record):
    """The function of a call in a message; `arguments` may be a string of JSON, as OpenAI's API has it."""

    name: StrictStr
    arguments: Annotated[Json, BeforeValidator(arguments_of)]


class MessageCall(Record):
    """A call in an assistant's message."""

    id: StrictStr | None = later_field(None)
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolMessage(Message):
    """A message that may call tools, or be a tool's result; one that calls needs no content."""

    tool_calls: tuple[MessageCall, ...] = later_field(())
    tool_call_id: StrictStr | None = later_field(None)
    name: StrictStr | None = later_field(None)

    @model_validator(mode="before")
    @classmethod
    def _may_have_no_content(cls, message: object) -> object:
        if isinstance(message, dict) and message.get("tool_calls") and message.get("content") is None:
            return {**message, "content": ""}
        return message

    @model_validator(mode="after")
    def _fits_its_role(self) -> "ToolMessage":
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only an assistant's message has `tool_calls`, found one of {self.role}")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"only a tool's message has `tool_call_id`, found one of {self.role}")
        return self


M = TypeVar("M", bound=Message)


def turns_without_calls(messages: Sequence[M]) -> list[M]:
    """Return a chat's turns without those that only call tools, and without the results."""
    return [message for message in messages if message.role != "tool" and not getattr(message, "tool_calls", ())]


def check_turns(messages: Sequence[Message], last: Literal["user", "assistant"]) -> None:
    """Raise `ValueError` unless a chat's turns alternate and end with the last one of a given role."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    usual = ["user" if index % 2 == 0 else "assistant" for index in range(len(turns))]
    if turns != usual or not turns or turns[-1] != last:
        raise ValueError(
            "messages must alternate between user and assistant (after an optional system message) "
            f"and end with {'a user' if last == 'user' else 'an assistant'}'s turn, found {', '.join(roles)}"
        )
