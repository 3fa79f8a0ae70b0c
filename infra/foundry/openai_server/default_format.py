"""The response format of requests that name none: a JSON Schema that a served model was trained to follow."""

from slmops.infra.errors import BadInput
from slmops.infra.foundry.model_host import ModelHost
from slmops.infra.foundry.openai_server.answers import ask_runtime
from slmops.infra.foundry.openai_server.chat_request import NamedSchema, SchemaFormat
from slmops.infra.foundry.openai_server.errors import Refused
from slmops.infra.foundry.openai_server.requests import runtime_format
from slmops.infra.foundry.served_model import PlacedModel
from slmops.infra.records import Json


def format_of(schema: Json) -> SchemaFormat:
    """Return the response format of a JSON Schema."""
    return SchemaFormat(type="json_schema", json_schema=NamedSchema(name="default", schema=schema))


def default_format_of(placed: PlacedModel) -> SchemaFormat | None:
    """Return the response format that a version was deployed with, or None."""
    return format_of(placed.response_schema) if placed.response_schema else None


async def check_format(host: ModelHost, name: str, default: SchemaFormat) -> None:
    """Have a served model answer one token in a format; raises `BadInput` for one that no grammar expresses."""
    async with host.turn(name) as running:
        message: Json = {"role": "user", "content": "Hello"}
        asked: Json = {"model": running.served.model_id, "messages": [message], "max_tokens": 1, "temperature": 0}
        try:
            answer = await ask_runtime(host, running, {**asked, "response_format": runtime_format(default)})
        except Refused as refused:
            raise BadInput(
                f"The response schema cannot be the form of answers: {refused}",
                "Leave out what the runtime cannot express, or serve without --response-schema.",
                code="response-schema-not-usable",
            ) from None
        await answer.response.aclose()
