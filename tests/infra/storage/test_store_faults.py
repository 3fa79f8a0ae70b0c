"""Every fault in an S3 store and on the way to it: messages, retries, and states that must never occur."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import botocore.loaders
import pytest
from botocore.retries.standard import ExponentialBackoff
from hypothesis import given
from hypothesis import strategies as st

from slmops.deployments.cli import app as cli
from slmops.infra.errors import BadInput, PassingFault, SlmopsError, StageFailed
from slmops.infra.settings import Settings, StoreSettings
from slmops.infra.storage.copying import CopiedVersion, copy_version
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest, Source
from slmops.infra.storage.model_files import blob_of
from slmops.infra.storage.objects import BLOBS, Blob
from slmops.infra.storage.opening import open_local_registry, open_registry
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.s3.client import ATTEMPTS, make_client, parse_s3_uri
from slmops.infra.storage.verification import verify_version
from tests.infra.storage.test_registry import COMMITTER
from tests.support.errors import coded
from tests.support.s3_proxy import (
    ACCESS_DENIED,
    INTERNAL_ERROR,
    SLOW_DOWN,
    AlterRequestBody,
    AlterResponseBody,
    DropAnswer,
    DropRequestHeaders,
    Fault,
    FaultProxy,
    ResetConnection,
    ShortenBody,
    Trickle,
    TruncateBody,
    WrongEtag,
    clock_skewed,
    permanent_redirect,
    wrong_region,
)
from tests.support.s3_servers import SECRET_ACCESS_KEY, S3Server
from tests.support.stores import empty_store
from tests.support.versions import add_evidence, evidence, stored_variant, write_files

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20
PART_BYTES = 5 * MIB  # the smallest that S3 allows: more than one part without large files
SOURCE = Source(digest="a" * 64, origin="/checkpoints/home", architecture="x", parameters=1)
SEED = 20261126
BLOB = rf"/{BLOBS}/"
MANIFEST = r"/manifest\.json$"


def content(name: str, size_bytes: int) -> bytes:
    return random.Random(f"{SEED} {name}").randbytes(size_bytes)


FILES = {
    "model.onnx": content("graph", 300_000),
    "model.onnx.data": content("weights", PART_BYTES + 200_000),
    "tokenizer.json": content("tokenizer", 20_000),
}
SMALL = {name: data[:10_000] for name, data in FILES.items()}


@pytest.fixture(autouse=True, scope="module")
def quick_clients() -> Iterator[None]:
    """Clients are made often here: S3's large description is read once for all of them."""
    with mock.patch("botocore.session.create_loader", functools.cache(botocore.loaders.create_loader)):
        yield


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: None) -> None:
    """No AWS settings of the user, and the smallest parts that S3 allows."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("slmops.infra.storage.s3.bucket.PART_BYTES", PART_BYTES)


@pytest.fixture
def brief_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of attempts is unchanged, with less time between them."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)


def add_version(registry: ModelRegistry, folder: Path, files: dict[str, bytes], name: str = "home") -> Manifest:
    """Commit files as a version with evidence that it can be served, as a deploy does."""
    write_files(folder, files)
    manifest, _ = registry.commit(name, SOURCE, {"olive-ai": "0.13.0"}, [stored_variant(registry, folder)])
    add_evidence(registry, manifest, "deploy", {"variants": [{"precision": "int4", "status": "registered"}]})
    registry.release_files()
    return manifest


class Journey:
    """A machine with its own versions, and an S3 store behind a proxy."""

    def __init__(self, server: S3Server, tmp_path: Path, proxy: FaultProxy) -> None:
        self.tmp_path, self.proxy = tmp_path, proxy
        self.store = empty_store(tmp_path / "unused", server)
        self.home = tmp_path / "machine"
        self.local = open_local_registry(Settings(home=self.home))
        self.manifest = add_version(self.local, tmp_path / "built", FILES)

    def settings(self, home: str = "machine", **store: object) -> Settings:
        return self.store.settings(self.tmp_path / home, self.proxy.endpoint_url, **store)

    def far(self, home: str = "machine", **store: object) -> ModelRegistry:
        """The store as a new process on the machine `home` opens it, through the proxy."""
        return open_registry(self.settings(home, **store))

    def beside(self) -> ModelRegistry:
        """The store without the proxy, and without a cache that was used."""
        return self.store.registry(self.tmp_path / "observer")

    def push(self, manifest: Manifest | None = None) -> CopiedVersion:
        return copy_version(self.local.of(manifest or self.manifest), self.far())

    def pushed(self) -> "Journey":
        copy_version(self.local.of(self.manifest), self.beside())
        return self

    def pull(self, home: str = "puller") -> CopiedVersion:
        far = self.far(home)
        return copy_version(far.find("home@1"), open_local_registry(self.settings(home)))

    def puller(self, home: str = "puller") -> ModelRegistry:
        return open_local_registry(self.settings(home))

    def assert_arrived(self, registry: ModelRegistry) -> None:
        """The version is complete, and the only one."""
        assert registry.versions("home") == [registry.of(self.manifest)]
        assert verify_version(registry.of(self.manifest)).damage == ()
        assert registry.aliases("home") == {}
        assert list(evidence(registry, self.manifest, "deploy")) == list(evidence(self.local, self.manifest, "deploy"))
        assert list(registry.objects.entries("leases")) == []


@pytest.fixture
def journey(rclone: S3Server, tmp_path: Path) -> Iterator[Journey]:
    with FaultProxy(rclone) as proxy:
        yield Journey(rclone, tmp_path, proxy)


@pytest.fixture
def strict_journey(strict: S3Server, tmp_path: Path) -> Iterator[Journey]:
    with FaultProxy(strict.endpoint_url) as proxy:
        yield Journey(strict, tmp_path, proxy)


@pytest.fixture(params=["rclone", "strict"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journey]:
    server: S3Server = request.getfixturevalue(request.param)
    with FaultProxy(server.endpoint_url) as proxy:
        yield Journey(server, tmp_path, proxy)


def assert_clean(root: Path) -> None:
    """Everything in a local store is complete, and nothing is left of unfinished work."""
    objects = LocalObjectStore(root)
    for entry in objects.entries(BLOBS):
        assert hashlib.sha256(objects.read_bytes(entry.key)).hexdigest() == entry.key.rpartition("/")[2]
    assert list(objects.entries("aside")) == []


def assert_one_sentence(error: SlmopsError) -> None:
    assert re.fullmatch(r"[^\n]{10,400}[.]", error.message)
    assert re.fullmatch(r"[^\n]{5,300}[.]", error.what_to_do)
    assert SECRET_ACCESS_KEY not in str(error)


# What a user types, with what is wrong


@dataclass
class Case:
    """The error of a user who cannot use the store: `commands` are those with this error."""

    said: str
    status: int = 2
    environment: dict[str, str | None] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    commands: tuple[str, ...] = ("push", "pull", "verify")


def store(**variables: str | None) -> dict[str, str | None]:
    return {f"SLMOPS_STORE__{name.upper()}": value for name, value in variables.items()}


SECRET = "S3cret/typed+wrong"
CASES = {
    "wrong secret": Case("refuses the credentials (SignatureDoesNotMatch)", 2, store(secret_access_key=SECRET)),
    "unknown access key": Case("refuses the credentials", 2, store(access_key_id="nobody")),
    "no credentials": Case("no credentials for s3://", 2, store(access_key_id=None, secret_access_key=None)),
    "half of the credentials": Case("no credentials for", 2, store(secret_access_key=None)),
    "missing bucket": Case("there is no such bucket", 2, store(uri="s3://no-such-bucket/team")),
    "no right to list": Case("lack a permission (AccessDenied)", 2, faults=(Fault("GET", "list-type", ACCESS_DENIED),)),
    "no right to read": Case(
        "lack a permission (AccessDenied)",
        2,
        faults=(Fault("GET", "/models/home/", ACCESS_DENIED),),
        commands=("pull", "verify"),
    ),
    "no right to look": Case("lack a permission", 2, faults=(Fault("HEAD", "", ACCESS_DENIED),), commands=("push",)),
    "no right to write": Case(
        "lack a permission (AccessDenied)", 2, faults=(Fault("PUT|POST", "", ACCESS_DENIED),), commands=("push",)
    ),
    "no right to write blobs": Case(
        "lack a permission (AccessDenied)", 2, faults=(Fault("PUT|POST", BLOB, ACCESS_DENIED),), commands=("push",)
    ),
    "no right to read blobs": Case(
        "lack a permission (AccessDenied)", 2, faults=(Fault("GET", BLOB, ACCESS_DENIED),), commands=("pull", "verify")
    ),
    "another region": Case(
        "Set SLMOPS_STORE__REGION=eu-west-1", 2, faults=(Fault("*", "", wrong_region("eu-west-1")),)
    ),
    "a redirect": Case(
        "Set SLMOPS_STORE__REGION=eu-west-1", 2, faults=(Fault("*", "", permanent_redirect("eu-west-1")),)
    ),
    "clock behind": Case("clock is 60 minutes behind the server's", 2, faults=(Fault("*", "", clock_skewed(3600)),)),
    "clock ahead": Case("clock is 90 minutes ahead of the server's", 2, faults=(Fault("*", "", clock_skewed(-5400)),)),
    "unknown profile": Case("has no profile of that name", 2, store(profile="nobody")),
    "endpoint with a password": Case(
        "contains a user or a password", 2, store(endpoint_url=f"http://me:{SECRET}@127.0.0.1:1")
    ),
    "endpoint without a scheme": Case("not valid", 2, store(endpoint_url="127.0.0.1:9000")),
    "endpoint of another scheme": Case("not valid", 2, store(endpoint_url="ftp://127.0.0.1")),
    "endpoint without a host": Case("not valid", 2, store(endpoint_url="http://")),
    "endpoint with a broken host": Case("not valid", 2, store(endpoint_url="http://[::1")),
    "endpoint with a broken port": Case("not valid", 2, store(endpoint_url="http://127.0.0.1:http")),
    "endpoint with a port too high": Case("not valid", 2, store(endpoint_url="http://127.0.0.1:99999")),
    "endpoint with a space": Case("not valid", 2, store(endpoint_url="http://local host")),
    "endpoint with a question": Case("not valid", 2, store(endpoint_url="http://127.0.0.1/?x=1")),
    "password in a broken endpoint": Case("a user or a password", 2, store(endpoint_url=f"http://me:{SECRET}@[::1")),
    "password without a scheme": Case("a user or a password", 2, store(endpoint_url=f"me:{SECRET}@127.0.0.1")),
    "bucket in capitals": Case("names no bucket", 2, store(uri="s3://Models/x")),
    "hostile prefix": Case("is not valid", 2, store(uri="s3://models/a/../b")),
    "password in the address": Case("a user or a password", 2, store(uri=f"s3://me:{SECRET}@models/x")),
    "a server that is down": Case("cannot be reached", 1, store(endpoint_url="http://127.0.0.1:1")),
    "a SOCKS proxy before the server": Case(
        "HTTP_PROXY names a SOCKS proxy",
        2,
        store(endpoint_url="http://s3.example") | {"HTTP_PROXY": "socks5h://p:1080"},
    ),
    "a server that is down, and a SOCKS proxy for all": Case(
        "ALL_PROXY names a SOCKS proxy", 1, store(endpoint_url="http://127.0.0.1:1") | {"ALL_PROXY": "socks5://p:1080"}
    ),
    "errors for ever": Case("answered with InternalError", 1, faults=(Fault("*", "", INTERNAL_ERROR),)),
    "slow down for ever": Case("answered with SlowDown", 1, faults=(Fault("*", "", SLOW_DOWN),)),
    "resets for ever": Case("cannot be reached", 1, faults=(Fault("*", "", ResetConnection()),)),
}


def run_cli(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capfd.readouterr()
    status = cli.run(arguments)
    out, err = capfd.readouterr()
    for secret in (SECRET, SECRET_ACCESS_KEY, "Signature="):
        assert secret not in out + err
    assert "Traceback" not in out + err
    return status, out, err


@pytest.fixture(scope="module")
def shared_journey(rclone: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    """A journey whose version is pushed; refused commands change nothing in it."""
    with FaultProxy(rclone) as proxy:
        yield Journey(rclone, tmp_path_factory.mktemp("shared"), proxy).pushed()


@pytest.mark.parametrize("case", CASES)
def test_an_unusable_store_is_reported_in_one_sentence(
    case: str,
    shared_journey: Journey,
    brief_waits: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    journey, wanted = shared_journey, CASES[case]
    nothing_yet = empty_store(tmp_path / "unused", journey.store.server)
    journey.proxy.clear()
    journey.proxy.add(*wanted.faults)
    for command in wanted.commands:
        # A push goes to an empty store, the others read the one that has the version.
        target = nothing_yet if command == "push" else journey.store
        environment: dict[str, str | None] = {**target.environment(journey.proxy.endpoint_url), **wanted.environment}
        for name, value in environment.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        monkeypatch.setenv("SLMOPS_HOME", str(journey.home if command == "push" else tmp_path / "puller"))

        status, out, err = run_cli([command, "home@1"], capfd)
        assert (status, out) == (wanted.status, "")
        *progress, said, advice = err.splitlines()
        assert said.startswith("error: ")
        assert wanted.said in f"{said} {advice}"
        assert err.count("error:") == 1
        assert all(re.match(r"(copy|verify): +\d+% ", line) for line in progress if line)

    status, out, _ = run_cli([command, "home@1", "--json"], capfd)
    error = json.loads(out)["error"]
    assert (status, set(error)) == (wanted.status, {"message", "what_to_do"})
    assert wanted.said in f"{error['message']} {error['what_to_do']}"
    journey.proxy.clear()
    assert nothing_yet.registry(tmp_path / "observer").versions("home") == []
    assert open_local_registry(Settings(home=tmp_path / "puller")).versions("home") == []
    assert_clean(tmp_path / "puller/store")
    assert_clean(tmp_path / "puller/cache/store")


@pytest.mark.parametrize("case", ["wrong secret", "no credentials", "a server that is down"])
def test_the_same_from_a_shell(case: str, shared_journey: Journey) -> None:
    wanted = CASES[case]
    shared_journey.proxy.clear()
    variables = {**shared_journey.store.environment(), **wanted.environment, "SLMOPS_HOME": str(shared_journey.home)}
    done = subprocess.run(
        [sys.executable, "-m", "slmops", "push", "home@1"],
        env={**os.environ, **{name: value for name, value in variables.items() if value is not None}},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (wanted.status, "")
    assert wanted.said in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert SECRET not in done.stderr


def test_requests_to_a_server_that_is_down_are_repeated_with_growing_waits(
    shared_journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(ExponentialBackoff.__init__, "__defaults__", (20, lambda: 1.0, None, None))
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PassingFault, check=coded("s3-unreachable")) as caught:
            open_registry(shared_journey.store.settings(shared_journey.home, url)).objects.check()
    assert_one_sentence(caught.value)
    assert len(waits) == ATTEMPTS - 1
    assert waits == sorted(waits)
    assert waits[-1] > 4 * waits[0] > 0


def test_a_server_that_wants_less_is_given_time(shared_journey: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=waits.append))
    proxy = shared_journey.proxy
    proxy.clear()
    proxy.forget()
    proxy.add(Fault("*", "", SLOW_DOWN))
    with pytest.raises(PassingFault, check=coded("s3-server-failed", "SlowDown")) as caught:
        shared_journey.far().objects.check()
    proxy.clear()
    assert_one_sentence(caught.value)
    assert len(proxy.requests) == ATTEMPTS
    assert len([wait for wait in waits if wait > 0]) == ATTEMPTS - 1


# What passes


SOMETIMES = {
    "slow down": Fault("*", "", SLOW_DOWN, every=3, times=4),
    "internal errors": Fault("*", "", INTERNAL_ERROR, every=3, times=4),
    "resets before": Fault("*", "", ResetConnection(), every=3, times=4),
    "resets in parts": Fault("PUT", "partNumber=", ResetConnection(after_request_bytes=100_000), times=2),
    "resets in manifests": Fault("PUT", MANIFEST, ResetConnection(after_request_bytes=100), times=2),
    "resets in answers": Fault("GET", "", ResetConnection(after_response_bytes=100), every=2, times=2),
    "resets in blobs": Fault("GET", BLOB, ResetConnection(after_response_bytes=9_000), times=2),
    "truncated answers": Fault("GET", "", TruncateBody(100), every=2, times=2),
    "truncated lists": Fault("GET", "list-type=2", TruncateBody(200), times=2),
    "resets in lists": Fault("GET", "list-type=2", ResetConnection(after_response_bytes=200), times=2),
    "resets in refusals": Fault("GET", "deleted.json", ResetConnection(after_response_bytes=50), times=2),
    "truncated refusals": Fault("GET", "deleted.json", TruncateBody(50), times=2),
    "truncated blobs": Fault("GET", BLOB, TruncateBody(9_000), times=2),
    "shortened blobs": Fault("GET", BLOB, ShortenBody(9_000), times=1),
    "altered blobs": Fault("GET", BLOB, AlterResponseBody(9_000), times=2),
    "lost answers": Fault("*", "", DropAnswer(), every=3, times=4),
    "wrong ETags": Fault("*", rf"{MANIFEST}|/leases/|/probes/|{BLOB}[^?]*$", WrongEtag()),
    "slow down there": Fault("PUT", BLOB, Trickle(200_000, seconds=1.5, upload=True), times=2),
    "slow down here": Fault("GET", BLOB, Trickle(200_000, seconds=1.5), times=2),
}
ONLY_PUSH = {"resets in parts", "resets in manifests", "slow down there"}
# A push reads back what it stored, and a difference there is a difference, whoever made it.
ONLY_PULL = {"shortened blobs", "altered blobs", "resets in refusals", "truncated refusals"}
READ_BACK = {"resets in blobs", "truncated blobs", "slow down here"}  # by a push to a server that does not verify


@pytest.mark.parametrize("fault", [fault_name for fault_name in SOMETIMES if fault_name not in ONLY_PULL])
def test_a_push_gets_over(fault: str, either: Journey, brief_waits: None) -> None:
    either.proxy.add(SOMETIMES[fault])
    copied = either.push()
    assert (copied.version.manifest, copied.is_new) == (either.manifest, True)
    assert bool(either.proxy.hits(SOMETIMES[fault])) == (either.store.kind == "rclone" or fault not in READ_BACK)
    either.assert_arrived(either.beside())
    assert not either.push().is_new


@pytest.mark.parametrize("fault", ["truncated lists", "resets in lists"])
def test_a_listing_of_many_blobs_gets_over(fault: str, journey: Journey, brief_waits: None) -> None:
    journey.pushed().proxy.add(SOMETIMES[fault])
    there = [blob_of(file) for file in journey.manifest.variants[0].files]
    absent = [Blob(f"{number:064x}", 1) for number in range(100)]
    assert journey.far().objects.missing([*there, *absent]) == absent
    assert journey.proxy.hits(SOMETIMES[fault])


@pytest.mark.parametrize("fault", [fault_name for fault_name in SOMETIMES if fault_name not in ONLY_PUSH])
def test_a_pull_gets_over(fault: str, journey: Journey, brief_waits: None) -> None:
    journey.pushed().proxy.add(SOMETIMES[fault])
    copied = journey.pull()
    assert copied.is_new
    assert journey.proxy.hits(SOMETIMES[fault])
    journey.assert_arrived(journey.puller())
    assert_clean(journey.tmp_path / "puller/store")
    assert not journey.pull().is_new


@pytest.mark.parametrize("fault", ["resets in blobs", "truncated blobs", "shortened blobs", "altered blobs"])
def test_files_that_are_fetched_for_use_get_over(fault: str, journey: Journey, brief_waits: None) -> None:
    journey.pushed().proxy.add(SOMETIMES[fault])
    far = journey.far("user")
    far.materialize(journey.manifest.variants[0].files, journey.tmp_path / "out")
    assert journey.proxy.hits(SOMETIMES[fault])
    assert {path.name: path.read_bytes() for path in (journey.tmp_path / "out").iterdir()} == FILES
    assert_clean(journey.tmp_path / "user/cache/store")


@pytest.mark.parametrize("fault", ["slow down", "resets before", "lost answers"])
def test_a_deploys_own_steps_get_over(fault: str, either: Journey, brief_waits: None) -> None:
    either.proxy.add(SOMETIMES[fault])
    far = either.far()
    manifest = add_version(far, either.tmp_path / "built again", SMALL, name="away")
    assert either.proxy.hits(SOMETIMES[fault])
    found = either.beside()
    assert found.versions("away") == [found.of(manifest)]
    assert verify_version(found.of(manifest)).ok
    assert add_version(far, either.tmp_path / "built again", SMALL, name="away") == manifest


def test_a_stall_longer_than_the_time_out(journey: Journey, monkeypatch: pytest.MonkeyPatch, brief_waits: None) -> None:
    monkeypatch.setattr("slmops.infra.storage.s3.client.READ_TIMEOUT_S", 1)
    stall = Fault("GET", BLOB, Trickle(0, seconds=5), times=2)
    journey.pushed().proxy.add(stall)
    assert journey.pull().is_new
    assert journey.proxy.hits(stall) == 2
    journey.assert_arrived(journey.puller())


# What does not pass

ALWAYS_PUSH = {
    "slow down": (Fault("PUT|POST", BLOB, SLOW_DOWN), ("s3-server-failed",)),
    "internal errors": (Fault("PUT|POST", BLOB, INTERNAL_ERROR), ("s3-server-failed",)),
    "resets before": (Fault("PUT|POST", BLOB, ResetConnection()), ("s3-unreachable",)),
    "resets in parts": (Fault("PUT", "partNumber=", ResetConnection(after_request_bytes=9_000)), ("s3-unreachable",)),
    "resets in manifests": (Fault("PUT", MANIFEST, ResetConnection(after_request_bytes=100)), ("s3-unreachable",)),
    "lost answers to the manifest": (Fault("PUT", MANIFEST, DropAnswer()), ("s3-unreachable",)),
    "errors at the manifest": (Fault("PUT", MANIFEST, INTERNAL_ERROR), ("s3-server-failed",)),
    "altered parts": (Fault("PUT", "partNumber=1", AlterRequestBody(9_000)), ("s3-altered", "s3-read-back-otherwise")),
    "altered files": (Fault("PUT", BLOB, AlterRequestBody(9_000)), ("s3-altered", "s3-read-back-otherwise")),
    "altered manifests": (
        Fault("PUT", MANIFEST, AlterRequestBody(100)),
        ("s3-server-failed", "s3-read-back-otherwise"),
    ),
    "altered evidence": (
        Fault("PUT", "/evidence/", AlterRequestBody(20)),
        ("s3-server-failed", "s3-read-back-otherwise"),
    ),
    "wrong ETags of parts": (Fault("PUT", "partNumber=", WrongEtag()), ("s3-server-failed",)),
}
AFTER_THE_VERSION = {"lost answers to the manifest", "altered evidence"}


@pytest.mark.parametrize("fault", ALWAYS_PUSH)
def test_a_push_that_fails_leaves_no_version_and_the_next_one_completes(
    fault: str, either: Journey, brief_waits: None
) -> None:
    action, codes = ALWAYS_PUSH[fault]  # one of them, by the server
    either.proxy.add(action)
    with pytest.raises(StageFailed, check=lambda error: error.code in codes) as caught:
        either.push()
    assert_one_sentence(caught.value)
    assert either.proxy.hits(action)
    either.proxy.clear()
    beside = either.beside()
    arrived = beside.versions("home")
    assert arrived == ([beside.of(either.manifest)] if fault in AFTER_THE_VERSION else [])
    assert list(evidence(beside, either.manifest, "deploy")) == []
    for entry in beside.objects.entries(BLOBS):
        assert hashlib.sha256(beside.objects.read_bytes(entry.key)).hexdigest() == entry.key.rpartition("/")[2]

    assert either.push().is_new is not bool(arrived)
    either.assert_arrived(beside)


@pytest.mark.parametrize("action", [AlterResponseBody(9_000), ShortenBody(9_000)], ids=["altered", "shortened"])
def test_what_differs_when_read_back_is_not_kept(
    action: AlterResponseBody | ShortenBody, journey: Journey, brief_waits: None
) -> None:
    journey.proxy.add(Fault("GET", BLOB, action, times=1))
    with pytest.raises(PassingFault, check=coded("s3-read-back-otherwise", "1 of 3 files")) as caught:
        journey.push()
    assert_one_sentence(caught.value)
    beside = journey.beside()
    assert (beside.versions("home"), len(list(beside.objects.entries(BLOBS)))) == ([], 2)
    assert journey.push().is_new
    journey.assert_arrived(beside)


ALWAYS_PULL = {
    "slow down": (Fault("GET", BLOB, SLOW_DOWN), ("s3-server-failed",)),
    "internal errors": (Fault("GET", BLOB, INTERNAL_ERROR), ("s3-server-failed",)),
    "resets before": (Fault("GET", BLOB, ResetConnection()), ("s3-unreachable",)),
    "resets in blobs": (Fault("GET", BLOB, ResetConnection(after_response_bytes=9_000)), ("s3-interrupted",)),
    "truncated blobs": (Fault("GET", BLOB, TruncateBody(9_000)), ("s3-interrupted",)),
    "shortened blobs": (Fault("GET", BLOB, ShortenBody(9_000)), ("content-altered",)),
    "altered blobs": (Fault("GET", BLOB, AlterResponseBody(9_000)), ("content-altered",)),
    "truncated manifests": (Fault("GET", MANIFEST, TruncateBody(100)), ("s3-interrupted",)),
    "resets in manifests": (Fault("GET", MANIFEST, ResetConnection(after_response_bytes=100)), ("s3-interrupted",)),
    "resets in evidence": (
        Fault("GET", "/evidence/deploy", ResetConnection(after_response_bytes=50)),
        ("s3-interrupted",),
    ),
    "shortened manifests": (Fault("GET", MANIFEST, ShortenBody(100)), ("manifest-damaged",)),
    "altered manifests": (Fault("GET", MANIFEST, AlterResponseBody(0)), ("manifest-damaged",)),
}


@pytest.mark.parametrize("fault", ALWAYS_PULL)
def test_a_pull_that_fails_shows_nothing_and_the_next_one_completes(
    fault: str, journey: Journey, brief_waits: None
) -> None:
    action, codes = ALWAYS_PULL[fault]
    journey.pushed().proxy.add(action)
    with pytest.raises(StageFailed, check=lambda error: error.code in codes) as caught:
        journey.pull()
    assert_one_sentence(caught.value)
    assert journey.proxy.hits(action)
    assert_clean(journey.tmp_path / "puller/store")
    with contextlib.suppress(SlmopsError):
        journey.far("user").materialize(journey.manifest.variants[0].files, journey.tmp_path / "out")
    assert_clean(journey.tmp_path / "user/cache/store")
    journey.proxy.clear()
    journey.pull()
    journey.assert_arrived(journey.puller())


def test_a_lost_answer_to_the_manifests_write_makes_no_second_version(strict_journey: Journey) -> None:
    lost = Fault("PUT", MANIFEST, DropAnswer(), times=1)
    strict_journey.proxy.add(lost)
    far = strict_journey.far()
    first = add_version(far, strict_journey.tmp_path / "built", SMALL, name="away")
    assert strict_journey.proxy.hits(lost) == 1
    statuses = [each.status for each in strict_journey.proxy.requests_of("PUT", MANIFEST)]
    assert statuses == [None, 412]
    assert first.version == 1
    assert [version.manifest for version in strict_journey.beside().versions("away")] == [first]


@pytest.mark.slow
def test_a_server_that_drops_the_condition_is_found_out(moto: S3Server, tmp_path: Path) -> None:
    with FaultProxy(moto) as proxy:
        proxy.add(Fault("*", "", DropRequestHeaders("If-None-Match")))
        journey = Journey(moto, tmp_path, proxy)
        far = journey.far()
        copy_version(journey.local.of(journey.manifest), far)
        assert any("conditional writes" in text for text in far.objects.notices())
        assert any("SHA-256" in text for text in far.objects.notices())
        commit_at_once(journey, 10)
    with FaultProxy(moto) as proxy:
        journey = Journey(moto, tmp_path / "again", proxy)
        far = journey.far()
        copy_version(journey.local.of(journey.manifest), far)
        assert not any("conditional writes" in text for text in far.objects.notices())


def commit_at_once(journey: Journey, rounds: int) -> None:
    """Let two processes commit versions of `home` at once; each gets its own number, round by round."""
    environment = {**os.environ, **journey.store.environment(journey.proxy.endpoint_url), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COMMITTER, str(journey.tmp_path), mine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "SLMOPS_HOME": str(journey.tmp_path / f"home-{mine}")},
        )
        for mine in ("left", "right")
    ]
    seen = set()
    for number in range(rounds):
        for process in processes:
            assert process.stdin
            process.stdin.write(f"{number} own\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout
            version, is_new = process.stdout.readline().split()
            assert is_new == "1"
            seen.add(int(version))
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert len(seen) == 2 * rounds
    versions = journey.beside().versions("home")
    assert len({version.manifest.identity for version in versions}) == len(versions) == 2 * rounds + 1


# Addresses


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "s3://",
            "s3:///x",
            "s3://ab",
            "s3://A-Bucket",
            "s3://bucket_1",
            "s3://-bucket",
            "s3://bucket-",
            "s3://.bucket",
        ),
        *("s3://bu..cket", "s3://192.168.0.1/x", f"s3://{'b' * 64}", "s3://bücket", "s3://bu cket", "s3://bucket\n"),
        *(
            "s3://bucket?x",
            "s3://bucket#x",
            "s3://bucket:9000/x",
            "s3://user@bucket/x",
            "https://bucket/x",
            "bucket",
            "",
        ),
        *(
            "s3://bucket/a//b",
            "s3://bucket//a",
            "s3://bucket/../a",
            "s3://bucket/a/..",
            "s3://bucket/./a",
            "s3://bucket/a b",
        ),
        *(
            "s3://bucket/a\\b",
            "s3://bucket/a?b",
            "s3://bucket/a#b",
            "s3://bucket/a%2fb",
            "s3://bucket/ä",
            "s3://bucket/a\0",
        ),
        *("s3://bucket/a\n", f"s3://bucket/{'a' * 300}", "s3://bucket/" + "a/" * 400 + "a", "s3://bucket/a:b"),
    ],
)
def test_hostile_addresses_are_refused(uri: str) -> None:
    with pytest.raises(BadInput, check=coded("s3-address-not-valid")) as caught:
        parse_s3_uri(uri)
    assert_one_sentence(caught.value)


def test_addresses() -> None:
    assert parse_s3_uri("s3://bucket") == parse_s3_uri("s3://bucket/") == ("bucket", "")
    assert parse_s3_uri("s3://my.bucket-1/team/models/") == ("my.bucket-1", "team/models")


_parts = st.text(alphabet="abcAZ019.-_/ %\\:@?#\n\0ä\ud800", max_size=40)


@given(st.one_of(st.text(), _parts, _parts.map("s3://".__add__), _parts.map("s3://bucket/".__add__)))
def test_any_text_is_parsed_or_refused(uri: str) -> None:
    try:
        bucket, prefix = parse_s3_uri(uri)
    except BadInput as error:
        assert "\n" not in error.message
        return
    assert re.fullmatch(r"[a-z0-9.-]{3,63}", bucket)
    assert ".." not in bucket
    segments = prefix.split("/") if prefix else []
    assert all(segment not in ("", ".", "..") and segment.isprintable() and segment.isascii() for segment in segments)
    assert uri.rstrip("/") == f"s3://{bucket}/{prefix}".rstrip("/")


@given(st.one_of(st.text(), _parts.map("http://".__add__), _parts.map("https://host".__add__)))
def test_any_endpoint_is_taken_or_refused(url: str) -> None:
    settings = StoreSettings(endpoint_url=url, access_key_id="me", secret_access_key=SECRET)
    with mock.patch("boto3.session.Session") as session:
        session.return_value.client.return_value.meta.endpoint_url = url or "https://s3.us-east-1.amazonaws.com"
        try:
            make_client(settings)
        except BadInput as error:
            assert "\n" not in error.message
            return
    parts = urlsplit(url)
    assert not url or (parts.scheme in ("http", "https") and parts.hostname and "@" not in url)


# What is damaged in the store


def damage(registry: ModelRegistry, key: str, data: bytes) -> None:
    registry.objects.delete([key])
    registry.objects.put_bytes(key, data)


def edited(data: bytes) -> bytes:
    return json.dumps({**json.loads(data), "created_at": "yesterday"}).encode()


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "one byte short": (lambda data: data[:-1], "truncated"),
    "one byte altered": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "altered"),
    "one byte more": (lambda data: data + b"\0", "altered"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_blob_is_not_pulled_and_is_named(
    kind: str, journey: Journey, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    change, fault = DAMAGES[kind]
    journey.pushed()
    beside = journey.beside()
    file = next(file for file in journey.manifest.variants[0].files if file.path == "model.onnx")
    damage(beside, blob_of(file).key, change(FILES["model.onnx"]))
    for name, value in journey.store.environment(journey.proxy.endpoint_url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLMOPS_HOME", str(journey.tmp_path / "puller"))

    status, _, err = run_cli(["pull", "home@1"], capfd)
    assert (status, err.count("error:")) == (1, 1)
    assert f"{blob_of(file).key} arrived altered 3 times" in err
    assert journey.puller().versions("home") == []
    assert_clean(journey.tmp_path / "puller/store")
    with pytest.raises(StageFailed, check=coded("content-altered")):
        journey.far("user").materialize([file], journey.tmp_path / "out")
    assert_clean(journey.tmp_path / "user/cache/store")

    status, out, _ = run_cli(["verify", "home@1", "--json"], capfd)
    found = json.loads(out)
    assert (status, found["ok"]) == (1, False)
    assert [(damage["what"], damage["fault"]) for damage in found["damage"]] == [("int4/model.onnx", fault)]
    status, out, _ = run_cli(["verify", "home@1"], capfd)
    assert (status, "home@1 is damaged" in out, "int4/model.onnx" in out) == (1, True, True)

    assert journey.push().moved_bytes == (0 if fault == "altered" and "more" not in kind else file.size_bytes)


def test_a_damaged_blob_is_put_back_from_another_copy(
    journey: Journey, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    journey.pushed()
    file = journey.manifest.variants[0].files[0]
    damage(journey.beside(), blob_of(file).key, b"something else")
    for name, value in journey.store.environment(journey.proxy.endpoint_url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLMOPS_HOME", str(journey.home))
    status, out, _ = run_cli(["verify", "home@1", "--repair"], capfd)
    assert (status, "home@1 is whole" in out) == (0, True)
    journey.assert_arrived(journey.beside())


def test_a_manifest_edited_by_hand_is_named(
    journey: Journey, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    journey.pushed()
    beside = journey.beside()
    key = "models/home/1/manifest.json"
    stored = beside.objects.read_bytes(key)
    for name, value in journey.store.environment(journey.proxy.endpoint_url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLMOPS_HOME", str(journey.tmp_path / "puller"))

    damage(beside, key, stored.replace(b'"version": 1', b'"version": "first"'))
    for command in ("pull", "verify"):
        status, out, err = run_cli([command, "home@1"], capfd)
        assert (status, out, err.count("error:")) == (1, "", 1)
        assert "The manifest of home@1 is not valid" in err

    damage(beside, key, edited(stored))  # still a manifest, of another time
    status, out, _ = run_cli(["verify", "home@1", "--json"], capfd)
    assert status == 1
    assert {damage["what"] for damage in json.loads(out)["damage"]} == {"manifest.json"}

    damage(beside, key, stored.replace(FILE_DIGEST, b"0" * 64))  # of a file that is nowhere
    beside.objects.delete([entry.key for entry in beside.objects.entries("models/home/1/evidence")])  # of before
    status, _, err = run_cli(["pull", "home@1"], capfd)
    assert (status, "has lost" in err) == (1, True)
    assert journey.puller().versions("home") == []


FILE_DIGEST = hashlib.sha256(FILES["model.onnx"]).hexdigest().encode()


def altered_at_random(data: bytes, chance: random.Random) -> bytes:
    offset = chance.randrange(len(data))
    return data[:offset] + bytes([data[offset] ^ chance.randrange(1, 256)]) + data[offset + 1 :]


def finds(registry: ModelRegistry, reference: str) -> set[str]:
    """Return what is said to be damaged; a manifest that cannot be read is said at once."""
    try:
        return {damage.what for damage in verify_version(registry.find(reference)).damage}
    except StageFailed:
        return {"manifest.json"}


def test_each_of_100_random_alterations_is_found(tmp_path: Path) -> None:
    registry = open_local_registry(Settings(home=tmp_path))
    manifest = add_version(registry, tmp_path / "built", SMALL)
    keys = {f"int4/{file.path}": blob_of(file).key for file in manifest.variants[0].files}
    keys["manifest.json"] = "models/home/1/manifest.json"
    chance = random.Random(SEED)
    print("seed", SEED)
    for _ in range(100):
        what = chance.choice(sorted(keys))
        whole = registry.objects.read_bytes(keys[what])
        damage(registry, keys[what], altered_at_random(whole, chance))
        assert what in finds(registry, "home@1")
        damage(registry, keys[what], whole)
    assert finds(registry, "home@1") == set()


def test_each_of_10_random_alterations_on_s3_is_found(journey: Journey) -> None:
    registry = journey.pushed().beside()
    chance = random.Random(SEED + 1)
    print("seed", SEED + 1)
    for _ in range(10):
        file = chance.choice(journey.manifest.variants[0].files)
        damage(registry, blob_of(file).key, altered_at_random(FILES[file.path], chance))
        assert finds(registry, "home@1") == {f"int4/{file.path}"}
        damage(registry, blob_of(file).key, FILES[file.path])
    assert finds(registry, "home@1") == set()


# The disk of this machine


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["os.fsync", "s3transfer.download.IOWriteTask._main"])
def test_a_disk_that_fills_while_pulling(step: str, journey: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    journey.pushed()
    with monkeypatch.context() as patched:
        patched.setattr(step, no_space)
        with pytest.raises(StageFailed, check=coded("disk-failed", "No space left")) as caught:
            journey.pull()
        assert_one_sentence(caught.value)
        with pytest.raises(StageFailed, check=coded("disk-failed", "No space left")):
            journey.far("user").materialize(journey.manifest.variants[0].files, journey.tmp_path / "out")
    for root in ("puller/store", "user/cache/store"):
        assert_clean(journey.tmp_path / root)
        for path in (journey.tmp_path / root / BLOBS).glob("*"):  # what came whole before stays for the next pull
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert journey.puller().versions("home") == []
    journey.pull()
    journey.assert_arrived(journey.puller())


# What a push moves


def test_a_second_push_of_a_version_with_one_changed_file_moves_under_one_percent(either: Journey) -> None:
    files = {f"weights-{number}.data": content(f"{number}", PART_BYTES) for number in range(6)}
    first = add_version(either.local, either.tmp_path / "large", {**files, "vocabulary.json": b"{}"}, "large")
    second = add_version(either.local, either.tmp_path / "large", {**files, "vocabulary.json": b'{"a": 1}'}, "large")
    copied = either.push(first)
    assert copied.moved_bytes == first.variants[0].size_bytes
    moved = (either.proxy.bytes_up, either.proxy.bytes_down)
    assert moved[0] > copied.moved_bytes
    either.proxy.forget()
    again = either.push(second)
    assert (again.version.manifest.version, again.moved_bytes, again.skipped_bytes) == (2, 8, 6 * PART_BYTES)
    assert (either.proxy.bytes_up + either.proxy.bytes_down) < 0.01 * moved[0]
