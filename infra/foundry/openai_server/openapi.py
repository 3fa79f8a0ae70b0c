"""The server's OpenAPI document, from the models that check the requests."""

from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from slmops.infra.foundry.openai_server.chat_request import ChatRequest

REFERENCE = "#/components/schemas/{model}"


class ErrorDetails(BaseModel):
    """What was wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The answer to a request that was refused or failed."""

    error: ErrorDetails


class Model(BaseModel):
    """A model's name."""

    id: str
    object: str
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The names of all models."""

    object: str
    data: list[Model]


class ChatCompletion(BaseModel):
    """An answer; see `ChatCompletion` of OpenAI's API."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]


class Status(BaseModel):
    """The server's state."""

    model_config = ConfigDict(extra="allow")

    status: str


def openapi_document(*, has_token: bool) -> dict[str, Any]:
    """Return the document for OpenAPI 3.1."""
    models: list[type[BaseModel]] = [ChatRequest, ErrorAnswer, ModelList, Model, ChatCompletion, Status]
    _, defined = models_json_schema([(model, "validation") for model in models], ref_template=REFERENCE)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "slmops serve", "version": version("slmops")},
        "paths": {
            "/health": {"get": _operation("Whether the server runs.", Status)},
            "/ready": {"get": _operation("Whether a model is loaded.", Status, {503: Status})},
            "/metrics": {"get": _operation("Metrics for Prometheus.", None, {401: ErrorAnswer})},
            "/v1/models": {"get": _operation("The names of models.", ModelList, {401: ErrorAnswer})},
            "/v1/models/{model}": {"get": _with_model(_operation("A model's name.", Model, _refusals(401, 404)))},
            "/v1/chat/completions": {"post": _chat()},
        },
        "components": {"schemas": defined["$defs"]},
    }
    if has_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def _chat() -> dict[str, Any]:
    statuses = _refusals(400, 401, 403, 404, 408, 413, 415, 421, 429, 502, 503, 504)
    operation = _operation("Answer a conversation.", ChatCompletion, statuses)
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    body = {"required": True, "content": {"application/json": {"schema": _reference(ChatRequest)}}}
    return {**operation, "requestBody": body}


def _refusals(*statuses: int) -> dict[int, type[BaseModel]]:
    return dict.fromkeys(statuses, ErrorAnswer)


def _operation(
    summary: str, answer: type[BaseModel] | None, others: dict[int, type[BaseModel]] | None = None
) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}} if answer is None else _json(answer)
    responses: dict[str, Any] = {"200": {"description": "Success.", "content": content}}
    for status, model in (others or {}).items():
        responses[str(status)] = {"description": str(model.__doc__), "content": _json(model)}
    return {"summary": summary, "responses": responses}


def _with_model(operation: dict[str, Any]) -> dict[str, Any]:
    return {
        **operation,
        "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
    }


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": _reference(model)}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=model.__name__)}
