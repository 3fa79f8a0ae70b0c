"""A catalog for Foundry Local's runtime, with the protocol of Microsoft's catalog: requests, and answers from records.

docs/catalog.md describes how the runtime uses a catalog; `slmops.infra.foundry.catalog_server` serves this over HTTP.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import JsonValue

from slmops.infra.errors import BadInput
from slmops.infra.records import Json

CATALOG_PATH = "/asset-gallery/v1.0/models"
PAGE_SIZE = 50  # the path that the runtime requests
LARGEST_PAGE_SIZE = 1000
OPERATORS = ("eq", "NotEquals")

Operator = Literal["eq", "NotEquals"]

_FIRST_PAGE: tuple[str, int] = ("", 0)


@dataclass(frozen=True)
class CatalogModel:
    """One version of one model as the runtime lists it: `name` with its `version` is the id, `alias` groups names.

    `device` is cpu, gpu or npu; `execution_provider` is named as in onnxruntime; `created_at` is ISO 8601 in UTC;
    `context_length` is in tokens, None where it is not known. `capabilities` are words such as tool-calling;
    `reasoning` and `tool_call` are the marks before and after thoughts and calls; `license` is named as in the
    checkpoint's model card.
    """

    name: str
    version: int
    alias: str
    device: str
    execution_provider: str
    size_bytes: int
    display_name: str
    created_at: str
    context_length: int | None = None
    publisher: str = "slmops"
    capabilities: tuple[str, ...] = ()
    reasoning: tuple[str, str] | None = None
    tool_call: tuple[str, str] | None = None
    license: str | None = None

    @property
    def model_id(self) -> str:
        """`NAME:VERSION`."""
        return f"{self.name}:{self.version}"

    def entry(self) -> Json:
        """Return the catalog's JSON of the model: only the fields that the runtime is known to read."""
        described: Json = {
            "displayName": self.display_name,
            "publisher": self.publisher,
            "inferenceTasks": ["chat-completion"],  # without this field, chat sessions refuse the model
            "inputModalities": ["text"],
            "outputModalities": ["text"],
        }
        if self.context_length is not None:
            described |= {"textContextWindow": self.context_length, "maxOutputTokens": self.context_length}
        if self.license is not None:
            described["license"] = self.license
        if self.capabilities:
            described["modelCapabilities"] = list(self.capabilities)
        return {
            "assetId": f"slmops:{self.model_id}",  # the runtime skips an entry without one
            "annotations": {"tags": {"alias": self.alias, **self._marks()}, "systemCatalogData": described},
            "properties": {
                "id": self.model_id,
                "name": self.name,
                "version": self.version,
                "creationContext": {"createdTime": self.created_at},
                "variantInfo": {
                    "parents": [],
                    "variantMetadata": {
                        "modelType": "ONNX",
                        "device": self.device,
                        "executionProvider": self.execution_provider,
                        "fileSizeBytes": self.size_bytes,
                    },
                },
            },
        }

    def _marks(self) -> dict[str, str]:
        tags = {"supportsReasoning": "true"} if self.reasoning else {}
        for name, marks in (("reasoning", self.reasoning), ("toolCall", self.tool_call)):
            if marks:
                tags |= {f"{name}Start": marks[0], f"{name}End": marks[1]}
        return tags


@dataclass(frozen=True)
class CatalogFilter:
    """A condition on one field of an entry: it has one of the values (eq), or none of them (NotEquals)."""

    field: str
    operator: Operator
    values: tuple[str, ...]

    def holds(self, found: Collection[str]) -> bool:
        """Whether an entry whose field has the values `found` passes; letter case does not count."""
        wanted = {value.casefold() for value in self.values}
        return any(value.casefold() in wanted for value in found) == (self.operator == "eq")


@dataclass(frozen=True)
class CatalogQuery:
    """A request for one page; `continuation_token` is from the previous page, None for the first."""

    filters: tuple[CatalogFilter, ...] = ()
    page_size: int = PAGE_SIZE
    continuation_token: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return the request's JSON in the runtime's form."""
        filters = [
            {"field": condition.field, "operator": condition.operator, "values": list(condition.values)}
            for condition in self.filters
        ]
        token = {"continuationToken": self.continuation_token} if self.continuation_token else {}
        return {**token, "filters": filters, "pageSize": self.page_size}


def parse_query(body: bytes) -> CatalogQuery:
    """Read a request's JSON; a page larger than `LARGEST_PAGE_SIZE` becomes one of that size.

    Raises `BadInput`, which names the key, for a request of another form.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
        fault = "nested too deeply" if isinstance(error, RecursionError) else "not JSON"
        what_to_do = 'Send {"filters": [...], "pageSize": 50}.'
        raise BadInput(f"The request is {fault}.", what_to_do, code="catalog-request-not-json") from None
    if not isinstance(document, dict):
        raise _unfit("The request", "an object", document)
    filters = document.get("filters", [])
    if not isinstance(filters, list):
        raise _unfit("filters", "a list", filters)
    page_size = document.get("pageSize", PAGE_SIZE)
    if not isinstance(page_size, int) or isinstance(page_size, bool) or page_size < 1:
        raise _unfit("pageSize", "a positive integer", page_size)
    token = document.get("continuationToken")
    if not isinstance(token, str | None):
        raise _unfit("continuationToken", "a text", token)
    return CatalogQuery(tuple(map(_parse_filter, filters)), min(page_size, LARGEST_PAGE_SIZE), token or None)


def _parse_filter(document: object) -> CatalogFilter:
    if not isinstance(document, dict) or not isinstance(document.get("field"), str):
        raise _unfit("A filter", "an object with a field", document)
    operators = {name.casefold(): name for name in OPERATORS}
    operator = operators.get(str(document.get("operator", "eq")).casefold())
    if operator is None:
        raise _unfit(f"The operator of {document['field']}", f"one of {', '.join(OPERATORS)}", document.get("operator"))
    values = document.get("values")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _unfit(f"values of {document['field']}", "a list of texts", values)
    return CatalogFilter(document["field"], "eq" if operator == "eq" else "NotEquals", tuple(values))


def _unfit(what: str, wanted: str, found: object) -> BadInput:
    shown = repr(found)
    return BadInput(
        f"{what} must be {wanted}, found {shown if len(shown) <= 80 else shown[:80] + '…'}.",
        "See docs/catalog.md for the request's form.",
        code="catalog-request-not-valid",
    )


def find_page(models: Sequence[CatalogModel], query: CatalogQuery) -> tuple[list[CatalogModel], str | None, int]:
    """Return a page of a query's models, the next page's token (None: it is the last), and the total number.

    Models are sorted by name, then newest first. A token names the last model before its page. So no model appears
    twice or is left out when others are added or removed between two pages. Raises `BadInput` for another token.
    """
    after = _position(query.continuation_token) if query.continuation_token else _FIRST_PAGE
    found = sorted(find_models(models, query.filters), key=_order)
    rest = [model for model in found if _order(model) > after]
    page = rest[: query.page_size]
    return page, page[-1].model_id if len(rest) > len(page) else None, len(found)


def page_document(entries: Sequence[JsonValue], token: str | None, count: int, form: str = "value") -> Json:
    """Return a page's JSON: its entries, the next page's token (None: it is the last) and the total number."""
    return {"totalCount": count, form: list(entries), **({"continuationToken": token} if token else {})}


def find_models(models: Sequence[CatalogModel], filters: Sequence[CatalogFilter]) -> list[CatalogModel]:
    """Return the models that pass all filters.

    `labels` = latest selects the newest version of a name that passes the other filters: on a machine without a GPU,
    the newest one for its CPU. A filter on an unknown field excludes nothing.
    """
    labels = [condition for condition in filters if condition.field == "labels"]
    others = [condition for condition in filters if condition.field != "labels"]
    found = [model for model in models if _passes(_fields(model), others)]
    newest: dict[str, int] = {}
    for model in found:
        newest[model.name] = max(model.version, newest.get(model.name, 0))
    labelled = [(model, ("latest",) if newest[model.name] == model.version else ()) for model in found]
    return [model for model, label in labelled if all(condition.holds(label) for condition in labels)]


def _passes(fields: dict[str, str], filters: Sequence[CatalogFilter]) -> bool:
    return all(condition.holds((fields[condition.field],)) for condition in filters if condition.field in fields)


def _fields(model: CatalogModel) -> dict[str, str]:
    return {
        "type": "models",
        "kind": "Versioned",
        "annotations/archived": "false",
        "annotations/systemCatalogData/deploymentOptions": "Foundry Local on Devices",
        "annotations/tags/foundryLocal": "",
        "annotations/tags/alias": model.alias,
        "name": model.name,
        "properties/name": model.name,
        "properties/id": model.model_id,
        "properties/variantInfo/variantMetadata/device": model.device,
        "properties/variantInfo/variantMetadata/executionProvider": model.execution_provider,
    }


def _order(model: CatalogModel) -> tuple[str, int]:
    return model.name, -model.version


def _position(token: str) -> tuple[str, int]:
    name, colon, version = token.rpartition(":")
    if not colon or not name or not (version.isascii() and version.isdecimal()) or len(version) > 18:
        raise _unfit("continuationToken", "one that a page came with", token)
    return name, -int(version)


def outward_query(query: CatalogQuery, ours: Sequence[CatalogModel]) -> CatalogQuery | None:
    """Return the query for the upstream catalog, which is without our own names and aliases.

    None if no name is left.
    """
    own = {
        "name": {model.name for model in ours},
        "properties/name": {model.name for model in ours},
        "properties/id": {model.model_id for model in ours},
        "annotations/tags/alias": {model.alias for model in ours},
    }
    filters = tuple(
        replace(
            condition, values=tuple(value for value in condition.values if value not in own.get(condition.field, ()))
        )
        for condition in query.filters
    )
    asks_nothing = any(condition.operator == "eq" and not condition.values for condition in filters)
    return None if asks_nothing else replace(query, filters=filters)
