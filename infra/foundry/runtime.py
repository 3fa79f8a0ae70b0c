"""Foundry Local's native runtime through foundry-local-sdk: register, list, load and answer.

The runtime is a singleton of its process, so every function here runs in a child process
(`slmops.infra.foundry.calls`). Only the local catalog is used, because the public catalog needs the network. Everything
that the runtime writes is under the call's `cache_dir`.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.foundry.calls import (
    CatalogModel,
    ListModels,
    Prove,
    ProvenAnswer,
    Register,
    Registered,
    RuntimeVersions,
    Unregister,
    Unregistered,
)
from slmops.infra.foundry.model_folder import GENAI_CONFIG
from slmops.infra.foundry.seeds import drawn_seed
from slmops.infra.process.call import Progress
from slmops.infra.process.channel import QUIET_ENVIRONMENT

APP_NAME = "slmops"
SDK = "foundry-local-sdk"
TASK = "chat-completion"

# Nothing listens on loopback's port 9 (discard): if the runtime asks its public catalog, the connection is refused
# without a name lookup.
CLOSED_CATALOG_URL = "http://127.0.0.1:9/asset-gallery/v1.0/models"

# NAME:VERSION or NAME-PRECISION-generic-DEVICE:VERSION.
MODEL_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}(-[a-z0-9]{1,8}-generic-[a-z]{1,8})?:[1-9][0-9]{0,8}")

# The name that `open_folder` gives, in its temporary directory, to a folder without an id.
UNREGISTERED_ID = "unregistered:1"

# The native messages start with "file.cc:LINE signature(...) ".
_NATIVE_PREFIX = re.compile(r"^\w+\.cc:\d+ .*?\)(?: const)? (?=\S)")


def register(call: Register, progress: Progress) -> Registered:
    """Register a model folder in the local catalog; an id registered with another folder is moved to this one.

    Raises `BadInput` for an id of another form, `StageFailed` when the runtime refuses the folder.
    """
    model_id, folder = check_model_id(call.model_id), str(call.folder)
    if not (call.folder / GENAI_CONFIG).is_file():
        raise StageFailed(
            f"{folder} has no model: {GENAI_CONFIG} is missing.",
            "Deploy the version again.",
            code="genai-config-missing",
        )
    catalog = open_local_catalog(call.cache_dir)
    from foundry_local_sdk import ModelInfoBuilder

    with _explained(f"register {model_id}", "Deploy the version again."):
        existing = catalog.get_model_variant(model_id)
        if existing is not None and existing.get_path() == folder:
            return Registered(model_id=model_id, alias=existing.alias, folder=folder, changed=False)
        if existing is not None:
            catalog.unregister_model(model_id)
        with ModelInfoBuilder() as metadata:
            for key, value in {"task": TASK, **call.metadata}.items():
                if isinstance(value, int):
                    metadata.set_int_property(key, value)
                else:
                    metadata.set_string_property(key, value)
            model = catalog.register_model(folder, model_id, metadata)
        return Registered(model_id=model.id, alias=model.alias, folder=folder, changed=True)


def unregister(call: Unregister, progress: Progress) -> Unregistered:
    """Take a model out of the local catalog; its folder stays.

    Raises `BadInput` for an id of another form, because for an alias the runtime would remove all its versions.
    """
    model_id = check_model_id(call.model_id)
    catalog = open_local_catalog(call.cache_dir)
    with _explained(f"unregister {model_id}", "Try again."):
        registered = catalog.get_model_variant(model_id) is not None
        if registered:
            catalog.unregister_model(model_id)
    return Unregistered(model_id=model_id, changed=registered)


def list_models(call: ListModels, progress: Progress) -> tuple[CatalogModel, ...]:
    """List the local catalog, sorted by name and version."""
    catalog = open_local_catalog(call.cache_dir)
    with _explained("list its local catalog", "Try again."):
        models = [_described(variant) for model in catalog.list_models() for variant in model.variants]
    return tuple(sorted(models, key=lambda model: (model.name, model.version)))


def prove(call: Prove, progress: Progress) -> ProvenAnswer:
    """Find a model by its id, load it and let it answer one conversation, greedily.

    The folder's own `search.repetition_penalty` applies, as for every client of the runtime.

    Raises `StageFailed` when it is not found, does not load, or the conversation does not fit its context.
    """
    model_id = check_model_id(call.model_id)
    catalog = open_local_catalog(call.cache_dir)
    progress(0, 2, f"loading {model_id}")
    model, load_ms = load(catalog, model_id)
    progress(1, 2, "answering")
    answered = answer(model, call.messages, call.max_new_tokens)
    progress(2, 2, "answered")
    return ProvenAnswer(
        model_id=model_id, alias=model.alias, folder=model.get_path(), load_ms=load_ms, **asdict(answered)
    )


def runtime_versions() -> RuntimeVersions:
    """Load the native runtime and return the versions of its parts.

    Raises `StageFailed` when the SDK is missing or its native library does not load on this machine.
    """
    os.environ.update(QUIET_ENVIRONMENT)
    try:
        from foundry_local_sdk._native.api import api

        native = str(api.version_string())
        required = dict(re.findall(r"^(onnxruntime[\w-]*)==([\w.]+)", "\n".join(requires(SDK) or []), re.MULTILINE))
        return RuntimeVersions(
            sdk=version(SDK),
            native=native,
            required=required,
            installed={package: _installed(package) for package in required},
        )
    except (ImportError, OSError) as error:
        raise StageFailed(
            f"Foundry Local's runtime does not load: {error}.", f"Install {SDK} again on a supported platform."
        ) from error


def check_model_id(model_id: str) -> str:
    """Return `model_id` if it has one of the two forms of a registered id; raises `BadInput`."""
    if not MODEL_ID.fullmatch(model_id):
        raise BadInput(
            f"{model_id!r} is not a Foundry id.",
            "Its form is NAME:VERSION or NAME-PRECISION-generic-DEVICE:VERSION.",
            code="foundry-id-not-valid",
        )
    return model_id


def load(catalog: Any, model_id: str) -> tuple[Any, float]:
    """Return the loaded model and how long loading took, in ms; raises `StageFailed`."""
    with _explained(f"load {model_id}", "Deploy the version again; its folder may be damaged."):
        model = catalog.get_model_variant(model_id)
        if model is None:
            known = ", ".join(sorted(v.id for m in catalog.list_models() for v in m.variants)) or "none"
            raise StageFailed(
                f"Foundry Local does not know {model_id}; registered are: {known}.",
                "Deploy or register it first.",
                code="foundry-model-unknown",
            )
        started = time.perf_counter()
        model.load()
        return model, (time.perf_counter() - started) * 1000


def open_folder(folder: Path, cache_dir: Path) -> Any:
    """Load an unregistered genai model folder and return the SDK's loaded model; once per process.

    Foundry's runtime starts on the empty temporary directory `cache_dir` and writes only there; `folder` is only read,
    not copied, and needs no `inference_model.json`. `answer` takes the returned model.

    Raises `StageFailed` when the runtime does not start, or does not load the folder.
    """
    catalog = open_local_catalog(cache_dir)
    from foundry_local_sdk import ModelInfoBuilder

    with _explained(f"load the model in {folder}", "Build it again; its folder may be damaged."):
        with ModelInfoBuilder() as metadata:
            metadata.set_string_property("task", TASK)
            model = catalog.register_model(str(folder.absolute()), UNREGISTERED_ID, metadata)
        model.load()
        return model


@dataclass(frozen=True)
class Answer:
    """A model's answer; `reasoning` is the text between think tags, which `answer` leaves out."""

    answer: str
    reasoning: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    e2e_latency_ms: float


def answer(
    model: Any,
    messages: Sequence[dict[str, str]],
    max_new_tokens: int,
    on_text: Callable[[str], None] = lambda text: None,
    search: Mapping[str, JsonValue] | None = None,
) -> Answer:
    """Let a loaded model answer a conversation, at most `max_new_tokens` long, in a session of its own.

    `on_text` gets the answer's text piece by piece. `search` holds fields of the SDK's SearchOptions. By default the
    answer is greedy, which is set explicitly, because the runtime samples regardless of genai_config.json.

    Raises `StageFailed` when the conversation does not fit the context or cannot be rendered by the model's chat
    template.
    """
    from foundry_local_sdk import ChatSession, RequestOptions, SearchOptions
    from foundry_local_sdk.items import TextItemType

    texts: dict[Any, list[str]] = {TextItemType.DEFAULT: [], TextItemType.REASONING: []}
    refused = _explained(f"answer with {model.id}", "Check the model's chat template and its genai_config.json.")
    with refused, ChatSession(model) as session:
        options = {"seed": drawn_seed(), **(search or {"do_sample": False})}
        session.set_options(RequestOptions(search=SearchOptions(max_output_tokens=1, **options)))
        with _request(messages) as probe:
            budget = session.preflight_request(probe)
        room = min(max_new_tokens, budget.context_limit_tokens - budget.prompt_tokens)
        if room < 1:
            raise StageFailed(
                f"A conversation of {budget.prompt_tokens} tokens leaves no room for an answer in the context of "
                f"{budget.context_limit_tokens} tokens.",
                "Shorten it, or begin a new one.",
                code="prompt-too-long",
            )
        session.set_options(RequestOptions(search=SearchOptions(max_output_tokens=room, **options)))
        session.set_streaming(True)
        started = time.perf_counter()
        with _request(messages) as request, session.process_streaming_request(request) as stream:
            for item in stream:
                for part in getattr(item, "parts", [item]):
                    texts[part.type].append(part.text)
                    if part.type is TextItemType.DEFAULT:
                        on_text(part.text)
            e2e_latency_ms = (time.perf_counter() - started) * 1000
            with stream.final_response as final:
                usage, finish_reason = final.get_usage(), final.finish_reason.name.lower()
    return Answer(
        answer="".join(texts[TextItemType.DEFAULT]),
        reasoning="".join(texts[TextItemType.REASONING]),
        prompt_tokens=budget.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        finish_reason=finish_reason,
        e2e_latency_ms=e2e_latency_ms,
    )


def count_prompt_tokens(model: object, messages: Sequence[dict[str, str]]) -> int:
    """Return how many tokens a loaded model's prompt for a conversation has, without generating any.

    Raises `StageFailed` when the conversation cannot be rendered.
    """
    from foundry_local_sdk import ChatSession, RequestOptions, SearchOptions

    refused = _explained("count a prompt's tokens", "Check the model's chat template.")
    with refused, ChatSession(model) as session:
        session.set_options(RequestOptions(search=SearchOptions(max_output_tokens=1)))
        with _request(messages) as probe:
            return int(session.preflight_request(probe).prompt_tokens)


def answer_unchecked(model: object, messages: Sequence[dict[str, str]], max_new_tokens: int) -> str:
    """Return the greedy answer's text as other programs get it: only the runtime checks whether the prompt fits.

    Raises `StageFailed` with the runtime's own reason.
    """
    from foundry_local_sdk import ChatSession, RequestOptions, SearchOptions

    refused = _explained("answer", "Shorten the conversation, or check the model's chat template.")
    search = SearchOptions(max_output_tokens=max_new_tokens, do_sample=False, seed=drawn_seed())
    with refused, ChatSession(model) as session:
        session.set_options(RequestOptions(search=search))
        with _request(messages) as request, session.process_request(request) as response:
            return "".join(part.text for item in response for part in getattr(item, "parts", [item]))


def open_local_catalog(cache_dir: Path) -> Any:
    """Start the runtime on Foundry's cache `cache_dir` and return its local catalog; once per process.

    Raises `StageFailed` when the runtime does not start.
    """
    manager = _start(cache_dir, CLOSED_CATALOG_URL)
    from foundry_local_sdk.catalog import CatalogType

    with _explained("start", "See its log."):
        return manager.get_catalog(CatalogType.LOCAL)


def start_web_service(cache_dir: Path, catalog_url: str, model_id: str) -> tuple[str, float]:
    """Load a model that the catalog names and Foundry's cache holds, and serve it on a free port of loopback.

    Returns the web service's address and how long loading took, in ms; once per process. Raises `StageFailed`.
    """
    manager = _start(cache_dir, catalog_url)
    _, load_ms = load(manager.catalog, model_id)
    with _explained("start its web service", "Try again."):
        manager.start_web_service()
    return str(manager.urls[0]), load_ms


def _start(cache_dir: Path, catalog_url: str) -> Any:
    os.environ.update(QUIET_ENVIRONMENT)  # before the native libraries load, because they look for CI only once
    from foundry_local_sdk import Configuration, FoundryLocalManager

    own = cache_dir / ".slmops-runtime"
    (own / "logs").mkdir(parents=True, exist_ok=True)
    with _explained("start", f"See its log in {own / 'logs'}."):
        FoundryLocalManager.initialize(
            Configuration(
                app_name=APP_NAME,
                app_data_dir=str(own),
                model_cache_dir=str(cache_dir),
                logs_dir=str(own / "logs"),
                catalog_urls=[(catalog_url, None)],
                disable_nonessential_telemetry=True,
                web=Configuration.WebService(urls="http://127.0.0.1:0"),
            )
        )
    manager = FoundryLocalManager.instance
    assert manager is not None
    return manager


@contextmanager
def _explained(doing: str, what_to_do: str) -> Iterator[None]:
    from foundry_local_sdk.exception import FoundryLocalException

    try:
        yield
    except FoundryLocalException as error:
        reason = _NATIVE_PREFIX.sub("", str(error).strip()).splitlines()[0].rstrip(".")
        raise StageFailed(f"Foundry Local cannot {doing}: {reason}.", what_to_do, code="foundry-failed") from error


def _request(messages: Sequence[dict[str, str]]) -> Any:
    from foundry_local_sdk import MessageItem, Request
    from foundry_local_sdk.items import MessageRole

    request = Request()
    for message in messages:
        role = message["role"].upper()
        if role not in MessageRole.__members__:
            raise BadInput(f"{message['role']!r} is not a role of a message.", "Use system, user or assistant.")
        request.add_item(MessageItem(MessageRole[role], message["content"]))
    return request


def _described(variant: Any) -> CatalogModel:
    info, folder = variant.info, variant.get_path()
    return CatalogModel(
        model_id=info.id,
        alias=info.alias,
        name=info.name,
        version=info.version,
        folder=folder,
        folder_exists=(Path(folder) / GENAI_CONFIG).is_file(),
        context_length=info.context_length,
    )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
