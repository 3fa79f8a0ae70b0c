"""`slmops catalog` as a process: on a store with a deployed version, under Foundry's runtime, and its bad inputs."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from slmops.infra.process.channel import QUIET_ENVIRONMENT
from tests.e2e.conftest import ROOT, Slmops

CATALOG_PATH = "/asset-gallery/v1.0/models"
TOKEN = "a-token-of-some-length"

CLIENT = """
import json, sys
from foundry_local_sdk import ChatSession, Configuration, FoundryLocalManager, MessageItem, Request
from foundry_local_sdk import RequestOptions, SearchOptions
url, cache_dir, own_dir = sys.argv[1:]
FoundryLocalManager.initialize(
    Configuration(app_name="client", model_cache_dir=cache_dir, app_data_dir=own_dir, catalog_urls=[(url, None)])
)
catalog = FoundryLocalManager.instance.get_catalog()
model = catalog.get_model("home-int8")
model.load()
with ChatSession(model) as session:
    session.set_options(RequestOptions(search=SearchOptions(do_sample=False, max_output_tokens=8)))
    with session.process_request(Request().add_item(MessageItem.user("Hello"))) as response:
        text = "".join(part.text for item in response for part in item.parts)
found = {
    "listed": sorted(model.id for model in catalog.list_models()),
    "cached": [model.id for model in catalog.get_cached_models()],
    "versions": [model.id for model in catalog.get_model_versions("home")],
    "context_length": catalog.get_model("home").context_length,
    "text": text,
}
sys.stdout.write(json.dumps(found) + "\\n")
"""


@contextmanager
def catalog(slmops: Slmops, *options: str, **environment: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Serve the catalog at a free port; yields the URL that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "slmops", "catalog", "--port", "0", *options],
        cwd=ROOT,
        env=slmops.variables(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    try:
        line = process.stdout.readline()
        assert line.startswith("Catalog at http://"), process.stderr.read()
        yield line.split()[-1], process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_foundrys_runtime_takes_a_deployed_model_from_the_catalog(slmops: Slmops, tiny: Path, tmp_path: Path) -> None:
    with catalog(slmops, "--upstream", "http://127.0.0.1:9/nobody") as (url, process):
        assert httpx.post(url, json={}).json() == {"totalCount": 0, "continuationToken": "upstream/", "value": []}
        report = slmops.json("deploy", tiny, "--name", "home", "--precision", "int8")
        assert report["status"] == "registered"
        home = tmp_path / "other-home"
        home.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, url, report["foundry_dir"], str(tmp_path / "own")],
            env={"PATH": os.environ["PATH"], "HOME": str(home), **QUIET_ENVIRONMENT},
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["listed"] == ["home-int8-generic-cpu:1", "home:1"]
        assert found["cached"] == ["home-int8-generic-cpu:1"]
        assert (found["versions"], found["context_length"]) == (["home:1"], 512)
        assert found["text"]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "")
    assert err.count("cannot be asked, and only our models are listed") == 1
    assert "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_and_writes_nothing(slmops: Slmops, number: signal.Signals) -> None:
    with catalog(slmops) as (url, process):
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(url.replace(CATALOG_PATH, "/health")).json() == {"status": "ok"}
        assert httpx.post(url, json={}).json() == {"totalCount": 0, "value": []}
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "", "")
    assert not slmops.home.exists()


def test_other_machines_need_a_token(slmops: Slmops) -> None:
    said = slmops.run("catalog", "--host", "0.0.0.0", status=2).stderr
    assert "Other machines can reach 0.0.0.0, and no token is set." in said
    said = slmops.run("catalog", "--host", "0.0.0.0", status=2, SLMOPS_CATALOG__TOKEN="short").stderr
    assert "SLMOPS_CATALOG__TOKEN: Value should have at least 16 items" in said and "short'" not in said
    with catalog(slmops, "--host", "0.0.0.0", SLMOPS_CATALOG__TOKEN=TOKEN) as (url, _):
        assert url.endswith("?token=$SLMOPS_CATALOG__TOKEN")
        there = url.replace("0.0.0.0", "127.0.0.1").partition("?")[0]
        assert httpx.post(there, json={}).status_code == 401
        assert httpx.post(f"{there}?token={TOKEN}", json={}).status_code == 200


def test_an_error_is_one_sentence(slmops: Slmops) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = slmops.run("catalog", "--port", port, status=2).stderr
        assert f"Nothing can listen at 127.0.0.1, port {port}: Address already in use." in said
    assert (
        "Nothing can listen at nowhere.invalid"
        in slmops.run("catalog", "--host", "nowhere.invalid", status=2, SLMOPS_CATALOG__TOKEN=TOKEN).stderr
    )
    for url in ("ftp://host/x", "http://", "https://host:port/x", "https://user:pw@host/x", "models"):
        said = slmops.run("catalog", "--upstream", url, status=2).stderr
        assert "The upstream catalog's address must be an http:// or https:// URL without a user name." in said
        assert "pw" not in said
    said = slmops.run("catalog", status=2, SLMOPS_STORE__URI="ftp://x").stderr
    assert "cannot be opened" in said
    assert not slmops.home.exists()
