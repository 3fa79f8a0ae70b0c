import asyncio
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.foundry import catalog_server
from slmops.infra.foundry.catalog import (
    CATALOG_PATH,
    LARGEST_PAGE_SIZE,
    CatalogFilter,
    CatalogModel,
    CatalogQuery,
    find_models,
    find_page,
    outward_query,
    parse_query,
)
from slmops.infra.foundry.catalog_server import LARGEST_REQUEST_BYTES, catalog_app
from slmops.infra.process.channel import QUIET_ENVIRONMENT
from tests.support.errors import coded

DEVICE = "properties/variantInfo/variantMetadata/device"
PROVIDER = "properties/variantInfo/variantMetadata/executionProvider"
LATEST = CatalogFilter("labels", "eq", ("latest",))
# What foundry-local-sdk 2.2.1 sends for its list on a machine with a CPU only.
LISTING = [
    {"field": "type", "operator": "eq", "values": ["models"]},
    {"field": "kind", "operator": "eq", "values": ["Versioned"]},
    {
        "field": "annotations/systemCatalogData/deploymentOptions",
        "operator": "eq",
        "values": ["Foundry Local on Devices"],
    },
    {"field": "annotations/archived", "operator": "NotEquals", "values": ["true"]},
    {"field": "labels", "operator": "eq", "values": ["latest"]},
    {"field": DEVICE, "operator": "eq", "values": ["cpu"]},
    {"field": PROVIDER, "operator": "eq", "values": ["CPUExecutionProvider"]},
]


def model(name, version=1, alias=None, **fields):
    values = {
        "device": "cpu",
        "execution_provider": "CPUExecutionProvider",
        "size_bytes": 300 * 2**20,
        "display_name": f"{name} shown",
        "created_at": "2026-11-22T10:00:00.123456+00:00",
        "context_length": 1024,
    }
    return CatalogModel(name, version, alias or name, **values | fields)


HOME = [model("home", version) for version in (1, 2, 3, 10)]
INT4 = [model("home-int4-generic-cpu", version, "home-int4") for version in (1, 2)]
GPU = [model("garden", 1), model("garden", 2, device="gpu", execution_provider="CUDAExecutionProvider")]
CALLER = model("caller", capabilities=("tool-calling", "reasoning"), reasoning=("<think>", "</think>"), license="mit")
MANY = [model(f"model-{number:03}") for number in range(120)]


def ids(models):
    return [model.model_id for model in models]


def where(field, *values, operator="eq"):
    return CatalogFilter(field, operator, values)


# Filters, order and pages


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ([LATEST], ["home:10", "home-int4-generic-cpu:2", "garden:2"]),
        ([LATEST, where(DEVICE, "CPU")], ["home:10", "home-int4-generic-cpu:2", "garden:1"]),
        ([where(DEVICE, "gpu", "npu")], ["garden:2"]),
        ([where(PROVIDER, "cudaexecutionprovider")], ["garden:2"]),
        ([where("annotations/tags/alias", "home-int4")], ["home-int4-generic-cpu:1", "home-int4-generic-cpu:2"]),
        ([where("name", "home", "garden"), where(DEVICE, "gpu")], ["garden:2"]),
        ([where("properties/id", "home:3", "home:4")], ["home:3"]),
        ([where("name", "home", operator="NotEquals"), LATEST], ["home-int4-generic-cpu:2", "garden:2"]),
        ([where("annotations/tags/foundryLocal", "test")], []),
        ([where("annotations/archived", "true")], []),
        ([where("name")], []),
        ([where("something/new", "x"), where("name", "garden")], ["garden:1", "garden:2"]),
    ],
)
def test_filters(filters, found):
    assert sorted(ids(find_models([*HOME, *INT4, *GPU], filters))) == sorted(found)


def test_the_runtimes_own_listing_is_read_and_answered():
    query = parse_query(json.dumps({"filters": LISTING, "pageSize": 50}).encode())
    assert query.to_json() == {"filters": LISTING, "pageSize": 50}
    page, token, count = find_page([*HOME, *INT4, *GPU], query)
    assert (ids(page), token, count) == (["garden:1", "home:10", "home-int4-generic-cpu:2"], None, 3)


names = st.from_regex(r"[a-c][a-c0-9-]{0,3}", fullmatch=True)
models_lists = st.lists(
    st.builds(model, names, st.integers(1, 12), device=st.sampled_from(["cpu", "gpu"])),
    unique_by=lambda one: one.model_id,
    max_size=30,
)


def pages(models, query):
    token = None
    for _ in range(100):
        page, token, _ = find_page(models, dataclasses.replace(query, continuation_token=token))
        yield page
        if token is None:
            return
    raise AssertionError("the pages do not end")


@given(models_lists, st.integers(1, 12))
def test_pages_have_every_model_once_in_order_and_no_more_than_requested(models, size):
    found = list(pages(models, CatalogQuery(page_size=size)))
    assert all(len(page) == size for page in found[:-1]) and len(found[-1]) <= size
    listed = [model for page in found for model in page]
    assert sorted(ids(listed)) == sorted(ids(models))
    assert listed == sorted(models, key=lambda one: (one.name, -one.version))


@given(models_lists, st.integers(1, 5), st.data())
def test_models_that_come_and_go_between_pages_leave_the_others_where_they_are(models, size, data):
    first, token, _ = find_page(models, CatalogQuery(page_size=size))
    kept = data.draw(st.lists(st.sampled_from(models), unique_by=ids_of)) if models else []
    later = {model.model_id: model for model in [*kept, *data.draw(models_lists)]}
    rest = find_page(list(later.values()), CatalogQuery((), 1000, token))[0] if token else []
    assert not set(ids(first)) & set(ids(rest))
    if token:
        stayed = {model.model_id for model in kept} - set(ids(first))
        assert stayed <= set(ids(rest))


def ids_of(one):
    return one.model_id


@given(models_lists)
def test_the_latest_is_one_version_of_each_name(models):
    latest = find_models(models, [LATEST])
    assert len({model.name for model in latest}) == len(latest)
    assert {model.name: model.version for model in latest} == {
        name: max(model.version for model in models if model.name == name) for name in {model.name for model in models}
    }


@given(models_lists, st.sampled_from(["name", "properties/id", "annotations/tags/alias", DEVICE]), st.lists(names))
def test_a_filter_and_its_opposite_part_the_models(models, field, values):
    equal = find_models(models, [where(field, *values)])
    other = find_models(models, [where(field, *values, operator="NotEquals")])
    assert sorted(ids(equal + other)) == sorted(ids(models))


@pytest.mark.parametrize(
    ("document", "refused"),
    [
        (b"", coded("catalog-request-not-json")),
        (b"\xff\xfe", coded("catalog-request-not-json")),
        (b"[" * 200_000, coded("catalog-request-not-json")),
        (b"[]", coded("catalog-request-not-valid", "must be an object, found []")),
        (b'{"filters": {}}', coded("catalog-request-not-valid", "filters must be a list")),
        (b'{"filters": [1]}', coded("catalog-request-not-valid", "A filter must be an object with a field")),
        (
            b'{"filters": [{"field": "name"}]}',
            coded("catalog-request-not-valid", "values of name must be a list of texts", "found None"),
        ),
        (
            b'{"filters": [{"field": "name", "values": [1]}]}',
            coded("catalog-request-not-valid", "values of name must be a list of texts"),
        ),
        (
            b'{"filters": [{"field": "name", "operator": "like", "values": []}]}',
            coded("catalog-request-not-valid", "one of eq, NotEquals, found 'like'"),
        ),
        (b'{"pageSize": 0}', coded("catalog-request-not-valid", "pageSize must be a positive integer", "found 0")),
        (b'{"pageSize": true}', coded("catalog-request-not-valid", "pageSize must be a positive integer")),
        (b'{"pageSize": "50"}', coded("catalog-request-not-valid", "pageSize must be a positive integer")),
        (b'{"continuationToken": 7}', coded("catalog-request-not-valid", "continuationToken must be a text")),
    ],
)
def test_a_request_of_another_form_is_refused(document, refused):
    with pytest.raises(BadInput, check=refused):
        parse_query(document)


@pytest.mark.parametrize("token", ["x", ":1", "home:", "home:-1", "home:1.5", "home:²", "home:" + "9" * 5000])
def test_a_token_that_no_page_came_with_is_refused(token):
    with pytest.raises(BadInput, check=coded("catalog-request-not-valid", "continuationToken")):
        find_page(HOME, CatalogQuery(continuation_token=token))


def test_a_page_is_never_larger_than_the_bound():
    assert parse_query(b'{"pageSize": 999999999}').page_size == LARGEST_PAGE_SIZE


def test_names_of_ours_are_kept_from_another_catalog():
    query = CatalogQuery((where("name", "home", "phi-4"), where(DEVICE, "cpu")))
    assert outward_query(query, HOME) == CatalogQuery((where("name", "phi-4"), where(DEVICE, "cpu")))
    for field, value in (("name", "home"), ("annotations/tags/alias", "home"), ("properties/id", "home:3")):
        assert outward_query(CatalogQuery((where(field, value),)), HOME) is None
    assert outward_query(CatalogQuery((LATEST,)), HOME) == CatalogQuery((LATEST,))


# Over HTTP


@contextlib.contextmanager
def serving(app):
    """Serve an app on loopback and yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def ask(app, method="POST", path=CATALOG_PATH, **request):
    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # as a server has it
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def post(app, document, **request):
    return ask(app, content=json.dumps(document), **request)


def all_pages(app, document):
    entries, token = [], None
    while True:
        answer = post(app, {**document, **({"continuationToken": token} if token else {})}).json()
        entries += answer["value"]
        token = answer.get("continuationToken")
        if not token:
            return [f"{entry['properties']['name']}:{entry['properties']['version']}" for entry in entries]


@pytest.mark.parametrize("path", [CATALOG_PATH, f"{CATALOG_PATH}/"])
def test_the_answers_form(path):
    answer = ask(catalog_app(lambda: HOME), path=path, content=b'{"pageSize": 1}')
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "totalCount": 4,
        "continuationToken": "home:10",
        "value": [
            {
                "assetId": "slmops:home:10",
                "annotations": {
                    "tags": {"alias": "home"},
                    "systemCatalogData": {
                        "displayName": "home shown",
                        "publisher": "slmops",
                        "inferenceTasks": ["chat-completion"],
                        "inputModalities": ["text"],
                        "outputModalities": ["text"],
                        "textContextWindow": 1024,
                        "maxOutputTokens": 1024,
                    },
                },
                "properties": {
                    "id": "home:10",
                    "name": "home",
                    "version": 10,
                    "creationContext": {"createdTime": "2026-11-22T10:00:00.123456+00:00"},
                    "variantInfo": {
                        "parents": [],
                        "variantMetadata": {
                            "modelType": "ONNX",
                            "device": "cpu",
                            "executionProvider": "CPUExecutionProvider",
                            "fileSizeBytes": 314572800,
                        },
                    },
                },
            }
        ],
    }


def test_a_refusal_is_json():
    app = catalog_app(lambda: HOME)
    for answer, status, said in (
        (ask(app, content=b"{"), 400, "not JSON"),
        (post(app, {"continuationToken": "\ud800"}), 400, "continuationToken"),
        (ask(app, content=b" " * (LARGEST_REQUEST_BYTES + 1)), 413, "more than"),
        (ask(app, "GET"), 405, "Method Not Allowed"),
        (ask(app, path="/other"), 404, "Not Found"),
    ):
        assert answer.status_code == status
        assert said in answer.json()["error"]["message"]
    assert post(app, {}).status_code == 200


def test_an_unreadable_store_is_reported_and_read_again():
    answers = [StageFailed("The store is gone.", "Bring it back."), HOME]

    def models():
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    app = catalog_app(models)
    for answer in (post(app, {}), ask(app, "GET", "/health")):
        assert answer.status_code == 503
        told = {"message": "The models cannot be listed.", "what_to_do": "See the log of slmops catalog."}
        assert answer.json() == {"error": told}
    answers[0] = OSError(28, "No space left on device")  # whatever it is: the next request is answered anew
    for answer in (post(app, {}), ask(app, "GET", "/health")):
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "The models cannot be listed: OSError.")
    answers.pop(0)
    assert post(app, {}).json()["totalCount"] == 4
    assert ask(app, "GET", "/health").json() == {"status": "ok"}


def test_pages_of_browsers_are_refused():
    app = catalog_app(lambda: HOME, hosts=["store.example"], origins=["http://own.example"])
    for headers, status in (
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://own.example"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Host": "store.example:5274"}, 200),
        ({"Host": "127.0.0.1:5274"}, 200),
    ):
        assert post(app, {}, headers=headers).status_code == status
    assert ask(app, "GET", "/health", headers={"Host": "evil.example"}).status_code == 421


def test_a_token_is_required_if_one_is_set():
    app = catalog_app(lambda: HOME, token="correct horse battery")
    for path in ("", "?token=", "?token=correct", "?token=%C3%A4"):
        answer = post(app, {}, path=f"{CATALOG_PATH}{path}")
        assert (answer.status_code, answer.json()["error"]["message"]) == (401, "The request has no valid token.")
    assert post(app, {}, path=f"{CATALOG_PATH}?token=correct%20horse%20battery").status_code == 200


# Another catalog behind ours

PUBLIC = [model(f"phi-{number:02}", publisher="Microsoft") for number in range(60)]


@pytest.fixture
def public():
    """Another catalog, which also has a model of the name of ours, and the requests that it got."""
    asked = []
    theirs = catalog_app(lambda: [*PUBLIC, model("home", 77)])

    async def recording(scope, receive, send):
        if scope["type"] == "http":
            asked.append(dict(scope["headers"]))
        await theirs(scope, receive, send)

    with serving(recording) as address:
        yield f"{address}{CATALOG_PATH}", asked


def test_public_models_come_after_ours_and_names_of_ours_win(public):
    url, asked = public
    app = catalog_app(lambda: HOME, url)
    listed = all_pages(app, {"filters": LISTING, "pageSize": 25})
    assert listed == ["home:10", *ids(PUBLIC)]
    assert asked[0][b"user-agent"] == b"AzureAiStudio"
    assert all_pages(app, {"filters": [{"field": "name", "operator": "eq", "values": ["phi-07"]}]}) == ["phi-07:1"]
    count = len(asked)
    assert len(all_pages(app, {"filters": [{"field": "name", "operator": "eq", "values": ["home"]}]})) == 4
    assert len(asked) == count  # a name of ours is nobody else's business


def broken(answer):
    async def respond(request):
        if answer == "slow":
            await asyncio.sleep(1)
        if isinstance(answer, int):
            return JSONResponse({"value": []}, answer)
        return Response(answer)

    return Starlette(routes=[Route(CATALOG_PATH, respond, methods=["POST"])])


@pytest.mark.parametrize(
    "answer", [503, 307, "slow", "{", "[]", '{"value": {}}', '{"value": [NaN]}', "x" * 2000, None], ids=str
)
def test_a_failed_public_catalog_hides_nothing_and_is_reported_once(answer, monkeypatch, caplog):
    monkeypatch.setattr(catalog_server, "UPSTREAM_TIMEOUT_S", 0.3)
    monkeypatch.setattr(catalog_server, "UPSTREAM_REST_S", 0.0)
    monkeypatch.setattr(catalog_server, "LARGEST_UPSTREAM_BYTES", 1000)
    with contextlib.ExitStack() as stack:
        address = "http://127.0.0.1:9" if answer is None else stack.enter_context(serving(broken(answer)))
        app = catalog_app(lambda: HOME, f"{address}{CATALOG_PATH}")
        for _ in range(3):
            assert all_pages(app, {"filters": LISTING}) == ["home:10"]
    assert len([record for record in caplog.records if "cannot be asked" in record.message]) == 1


def test_a_public_catalog_that_failed_is_left_alone_for_a_while(monkeypatch):
    calls = []

    async def respond(request):
        calls.append(1)
        return JSONResponse({}, 500)

    with serving(Starlette(routes=[Route(CATALOG_PATH, respond, methods=["POST"])])) as address:
        app = catalog_app(lambda: HOME, f"{address}{CATALOG_PATH}")
        for _ in range(3):
            assert all_pages(app, {"filters": LISTING}) == ["home:10"]
    assert len(calls) == 1


# Foundry Local's own runtime, in a process of its own: it is a singleton there

RUNTIME = """
import dataclasses, json, sys
from foundry_local_sdk import Configuration, FoundryLocalManager
from foundry_local_sdk.catalog import CatalogType
url, cache_dir, own_dir, questions = *sys.argv[1:4], json.loads(sys.argv[4])
FoundryLocalManager.initialize(
    Configuration(app_name="client", model_cache_dir=cache_dir, app_data_dir=own_dir, catalog_urls=[(url, None)])
)
catalog = FoundryLocalManager.instance.get_catalog(CatalogType.PUBLIC)
cached = lambda found: [[model.id, model.is_cached] for model in found]
one = lambda found: found and {"id": found.id, "path": found.get_path() if found.is_cached else None}
answers = {
    "listed": [[found.alias, found.id] for found in catalog.list_models()],
    "cached": [found.id for found in catalog.get_cached_models()],
    "models": {alias: one(catalog.get_model(alias)) for alias in questions.get("models", [])},
    "versions": [cached(catalog.get_model_versions(*arguments)) for arguments in questions.get("versions", [])],
    "variants": {name: one(catalog.get_model_variant(name)) for name in questions.get("variants", [])},
    "latest": {
        name: catalog.get_latest_version(catalog.get_model_variant(name)).id for name in questions.get("latest", [])
    },
    "info": {
        name: json.loads(json.dumps(dataclasses.asdict(catalog.get_model_variant(name).info), default=str))
        for name in questions.get("info", [])
    },
}
sys.stdout.write(json.dumps(answers) + "\\n")
"""


def ask_runtime(url, directory, **questions):
    """Return what the runtime answers; its model cache is the folder `cache` of the directory."""
    (directory / "home").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", RUNTIME, url, str(directory / "cache"), str(directory / "own"), json.dumps(questions)],
        env={"PATH": os.environ["PATH"], "HOME": str(directory / "home"), **QUIET_ENVIRONMENT},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def cache_model(directory, model_id):
    """Make a folder that the runtime lists as a model, though it could not be loaded."""
    folder = Path(directory, "cache", "models", *model_id.split(":"))
    folder.mkdir(parents=True)
    (folder / "genai_config.json").write_text("{}")
    (folder / "inference_model.json").write_text(json.dumps({"Name": model_id}))
    return str(folder)


def test_the_runtime_sees_120_models_over_several_pages(tmp_path):
    requests = []

    def models():
        requests.append(1)
        return MANY

    with serving(catalog_app(models)) as address:
        answers = ask_runtime(f"{address}{CATALOG_PATH}", tmp_path, models=["model-000", "model-119", "model-120"])
    assert sorted(answers["listed"]) == [[model.alias, model.model_id] for model in MANY]
    assert len(requests) == 3  # pages of 50
    assert [found and found["id"] for found in answers["models"].values()] == ["model-000:1", "model-119:1", None]
    assert answers["cached"] == []


def test_the_runtime_finds_models_versions_and_what_is_cached(tmp_path):
    old, new = (cache_model(tmp_path, f"home-int4-generic-cpu:{version}") for version in (1, 2))
    older = cache_model(tmp_path, "home:2")
    told = {"Name": "home:2", "License": "MIT", "Capabilities": "reasoning", "MaxOutputTokens": 5, "Task": "x"}
    Path(older, "inference_model.json").write_text(json.dumps(told | {key.lower(): told[key] for key in told}))
    with serving(catalog_app(lambda: [*MANY, *HOME, *INT4, *GPU, CALLER])) as address:
        answers = ask_runtime(
            f"{address}{CATALOG_PATH}",
            tmp_path,
            models=["home", "home-int4", "garden", "absent"],
            versions=[["home"], ["home", "home", 2], ["home-int4"], ["absent"]],
            variants=["home:10", "home:3", "home:99", "home-int4-generic-cpu:1", "garden:1"],
            latest=["home:1", "home:10", "home-int4-generic-cpu:1"],
            info=["home:10", "caller:1", "home:2"],
        )
    listed = dict(answers["listed"])
    assert len(listed) == 124
    assert sorted(answers["cached"]) == ["home-int4-generic-cpu:1", "home-int4-generic-cpu:2", "home:2"]
    # An alias stands for the newest version of it on this machine, or else for the newest.
    assert answers["models"] == {
        "home": {"id": "home:2", "path": older},
        "home-int4": {"id": "home-int4-generic-cpu:2", "path": new},
        "garden": {"id": "garden:1", "path": None},
        "absent": None,
    }
    assert [[model_id for model_id, _ in found] for found in answers["versions"]] == [
        ["home:10", "home:3", "home:2", "home:1"],
        ["home:10", "home:3"],
        ["home-int4-generic-cpu:2", "home-int4-generic-cpu:1"],
        [],
    ]
    assert {name: found and found["id"] for name, found in answers["variants"].items()} == {
        "home:10": "home:10",
        "home:3": "home:3",
        "home:99": None,
        "home-int4-generic-cpu:1": "home-int4-generic-cpu:1",
        "garden:1": "garden:1",
    }
    assert answers["variants"]["home-int4-generic-cpu:1"]["path"] == old
    assert answers["latest"] == {
        "home:1": "home:10",
        "home:10": "home:10",
        "home-int4-generic-cpu:1": "home-int4-generic-cpu:2",
    }
    info = answers["info"]["caller:1"]
    told = (info["capabilities"], info["supports_tool_calling"], info["max_output_tokens"], info["license"])
    assert told == ("tool-calling,reasoning", True, 1024, "mit")
    info = answers["info"]["home:10"]
    assert (info["capabilities"], info["supports_tool_calling"]) == (None, None)
    info_of_folder = answers["info"]["home:2"]  # of a folder's inference_model.json only the name is read
    read = (info_of_folder[name] for name in ("capabilities", "license", "max_output_tokens", "task"))
    assert list(read) == [None, None, 1024, "chat-completion"]
    seen = ("alias", "name", "version", "display_name", "publisher", "task", "file_size_mb", "context_length")
    assert [info[key] for key in seen] == ["home", "home", 10, "home shown", "slmops", "chat-completion", 300, 1024]
    assert (info["created_at_unix"], info["runtime"]["execution_provider"]) == (1795341600, "CPUExecutionProvider")
    assert (info["uri"], info["input_modalities"], info["output_modalities"]) == ("slmops:home:10", "text", "text")


def test_the_runtime_sees_public_models_after_ours_and_ours_without_them(public, tmp_path):
    url, _ = public
    expected = sorted([["home", "home:10"], *([model.alias, model.model_id] for model in PUBLIC)])
    for upstream, listed in ((url, expected), ("http://127.0.0.1:9/gone", [["home", "home:10"]])):
        with serving(catalog_app(lambda: HOME, upstream)) as address:
            answers = ask_runtime(f"{address}{CATALOG_PATH}", tmp_path, versions=[["home"]])
        assert sorted(answers["listed"]) == listed
        assert [model_id for model_id, _ in answers["versions"][0]] == ["home:10", "home:3", "home:2", "home:1"]


def test_the_runtime_sends_the_token_of_its_url(tmp_path):
    with serving(catalog_app(lambda: HOME, token="a secret of some length")) as address:
        url = f"{address}{CATALOG_PATH}"
        allowed = ask_runtime(f"{url}?token=a%20secret%20of%20some%20length", tmp_path, variants=["home:3"])
        (tmp_path / "other").mkdir()
        refused = ask_runtime(url, tmp_path / "other")
        remembered = ask_runtime(url, tmp_path)
    assert (allowed["listed"], allowed["variants"]["home:3"]["id"]) == ([["home", "home:10"]], "home:3")
    assert refused["listed"] == []
    # The runtime keeps the last listing in its model cache, and has that while the catalog answers with an error.
    assert remembered["listed"] == allowed["listed"]
