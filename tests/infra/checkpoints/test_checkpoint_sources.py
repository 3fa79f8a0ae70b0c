"""Where checkpoints come from: the user's string, an S3 server on loopback, a Hub on loopback or none."""

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from pydantic import SecretStr

from slmops.infra.checkpoints.hub import fetch_from_hub
from slmops.infra.checkpoints.s3 import fetch_from_s3
from slmops.infra.checkpoints.source import CheckpointSource, SourceKind, parse_checkpoint, split_s3_uri
from slmops.infra.errors import BadInput, SlmopsError, StageFailed
from slmops.infra.settings import Settings, StoreSettings
from tests.support.errors import coded

SECRET = "very-secret-key-of-the-store"


class TestParseCheckpoint:
    def test_an_existing_folder_is_local_and_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "owner" / "name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        expected = CheckpointSource(SourceKind.LOCAL, str(tmp_path / "owner" / "name"))
        assert parse_checkpoint("owner/name") == expected
        assert parse_checkpoint("./owner/name") == expected
        assert parse_checkpoint(str(tmp_path / "owner" / "name")) == expected

    @pytest.mark.parametrize(
        ("text", "revision", "expected"),
        [
            ("Qwen/Qwen2.5-0.5B", None, CheckpointSource(SourceKind.HUB, "Qwen/Qwen2.5-0.5B")),
            ("Qwen/Qwen2.5-0.5B", "main", CheckpointSource(SourceKind.HUB, "Qwen/Qwen2.5-0.5B", "main")),
            ("owner/name@v1.2", None, CheckpointSource(SourceKind.HUB, "owner/name", "v1.2")),
            ("owner/name@v1.2", "v1.2", CheckpointSource(SourceKind.HUB, "owner/name", "v1.2")),
            ("owner/name@refs/pr/3", None, CheckpointSource(SourceKind.HUB, "owner/name", "refs/pr/3")),
            ("s3://models/home/v1/", None, CheckpointSource(SourceKind.S3, "s3://models/home/v1")),
        ],
    )
    def test_remote_sources(self, text: str, revision: str | None, expected: CheckpointSource) -> None:
        assert parse_checkpoint(text, revision) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "./gone",
            "../gone",
            "/gone",
            "~/gone-for-good",
            "a/b/c",
            "C:\\gone",
            "gone",
            "~nobody-at-all",
            "g" * 5000,
            "",
        ],
    )
    def test_a_missing_checkpoint_is_reported_as_missing(
        self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(BadInput, check=coded("folder-missing")):
            parse_checkpoint(text)

    def test_a_file_is_not_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(BadInput, check=coded("checkpoint-is-file")):
            parse_checkpoint(str(tmp_path / "model.safetensors"))

    @pytest.mark.parametrize(
        ("text", "revision"),
        [
            ("owner/name@a", "b"),
            ("owner/name@../../x", None),
            ("owner/name@", None),
            ("owner/name", "a b"),
            ("owner/..", None),
            ("s3://models/home", "main"),
            ("s3://models", None),
            ("s3://models/../other", None),
            ("s3://Bad_Bucket/home", None),
            ("https://huggingface.co/owner/name", None),
        ],
    )
    def test_refused(self, text: str, revision: str | None) -> None:
        with pytest.raises(BadInput):
            parse_checkpoint(text, revision)

    def test_a_folder_has_no_revision(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, check=coded("revision-without-hub")):
            parse_checkpoint(str(tmp_path), "main")

    @given(st.text(max_size=60))
    def test_any_text_is_parsed_or_refused_as_bad_input(self, text: str) -> None:
        try:
            source = parse_checkpoint(text)
        except BadInput:
            return
        if source.kind is SourceKind.HUB:
            assert ".." not in source.location
            assert source.location.count("/") == 1
        if source.kind is SourceKind.S3:
            assert split_s3_uri(source.location)


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_settings(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    store = StoreSettings(endpoint_url=s3_endpoint, access_key_id="test", secret_access_key=SecretStr(SECRET))
    return Settings(home=tmp_path / "home", store=store)


@pytest.fixture
def bucket(s3_endpoint: str, request: pytest.FixtureRequest) -> Any:
    resource = boto3.resource(
        "s3",
        endpoint_url=s3_endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key=SECRET,
    )
    return resource.create_bucket(Bucket="b-" + hashlib.sha1(request.node.name.encode()).hexdigest())


class TestFetchFromS3:
    def test_the_bytes_arrive_and_only_those_of_the_folder(
        self, s3_settings: Settings, bucket: Any, tmp_path: Path
    ) -> None:
        weights = bytes(range(256)) * 50_000  # more than one part of the transfer manager
        files = {"config.json": b"{}", "model.safetensors": weights, "onnx/genai_config.json": b"[1]"}
        for path, content in files.items():
            bucket.put_object(Key=f"models/home/{path}", Body=content)
        bucket.put_object(Key="models/home/", Body=b"")
        bucket.put_object(Key="models/home-2/config.json", Body=b"another")
        folder = fetch_from_s3(f"s3://{bucket.name}/models/home", s3_settings, tmp_path / "fetched")
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert found == files

    def test_an_unchanged_folder_is_not_downloaded_again_and_a_changed_one_is(
        self, s3_settings: Settings, bucket: Any, tmp_path: Path
    ) -> None:
        uri = f"s3://{bucket.name}/home"
        bucket.put_object(Key="home/config.json", Body=b"one")
        first = fetch_from_s3(uri, s3_settings, tmp_path / "fetched")
        written = (first / "config.json").stat().st_mtime_ns
        assert fetch_from_s3(uri, s3_settings, tmp_path / "fetched") == first
        assert (first / "config.json").stat().st_mtime_ns == written
        bucket.put_object(Key="home/config.json", Body=b"two")
        second = fetch_from_s3(uri, s3_settings, tmp_path / "fetched")
        assert (second / "config.json").read_bytes() == b"two"
        assert (first / "config.json").read_bytes() == b"one"

    @pytest.mark.parametrize("key", ["home/../../escaped", "home//etc/passwd", "home/a\\..\\b", "home/C:/x"])
    def test_a_key_that_leads_out_is_refused(
        self, key: str, s3_settings: Settings, bucket: Any, tmp_path: Path
    ) -> None:
        bucket.put_object(Key="home/config.json", Body=b"{}")
        bucket.put_object(Key=key, Body=b"!")
        with pytest.raises(BadInput, check=coded("s3-key-not-valid")):
            fetch_from_s3(f"s3://{bucket.name}/home", s3_settings, tmp_path / "fetched")
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]

    def test_an_empty_folder_and_a_missing_bucket(self, s3_settings: Settings, bucket: Any, tmp_path: Path) -> None:
        with pytest.raises(BadInput, check=coded("s3-nothing-there")):
            fetch_from_s3(f"s3://{bucket.name}/home", s3_settings, tmp_path / "fetched")
        with pytest.raises(BadInput, check=coded("s3-no-bucket")):
            fetch_from_s3("s3://no-such-bucket/home", s3_settings, tmp_path / "fetched")

    def test_a_dead_endpoint_is_named_without_secrets(self, s3_settings: Settings, tmp_path: Path) -> None:
        dead = s3_settings.store.model_copy(update={"endpoint_url": f"http://127.0.0.1:{_free_port()}"})
        with pytest.raises(StageFailed, check=coded("s3-unreachable")) as caught:
            fetch_from_s3("s3://bucket/home", s3_settings.model_copy(update={"store": dead}), tmp_path / "fetched")
        assert SECRET not in str(caught.value)
        assert not (tmp_path / "fetched").exists()

    def test_refused_credentials(self, s3_settings: Settings, tmp_path: Path) -> None:
        with (
            _serving(_RefusesSignatures) as endpoint,
            pytest.raises(BadInput, check=coded("s3-credentials-refused")) as caught,
        ):
            refusing = s3_settings.store.model_copy(update={"endpoint_url": endpoint})
            fetch_from_s3("s3://bucket/home", s3_settings.model_copy(update={"store": refusing}), tmp_path / "fetched")
        assert SECRET not in str(caught.value)

    def test_no_credentials(
        self, s3_settings: Settings, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        settings = s3_settings.model_copy(update={"store": StoreSettings(endpoint_url=s3_endpoint)})
        with pytest.raises(BadInput, check=coded("s3-credentials-missing")):
            fetch_from_s3("s3://bucket/home", settings, tmp_path / "fetched")

    def test_a_file_of_another_size_than_listed_fails(self, s3_settings: Settings, tmp_path: Path) -> None:
        with _serving(_ListsAnotherSize) as endpoint, pytest.raises(SlmopsError) as caught:
            lying = s3_settings.store.model_copy(update={"endpoint_url": endpoint})
            fetch_from_s3("s3://bucket/home", s3_settings.model_copy(update={"store": lying}), tmp_path / "fetched")
        assert "listed with 5 bytes, but 2 bytes arrived" in str(caught.value)
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"import os",
}


class TestFetchFromHub:
    @pytest.fixture
    def settings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        return Settings(home=tmp_path / "home")

    def test_a_commit_without_pickles_and_code(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        with _serving(_Hub) as endpoint:
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
            folder = fetch_from_hub("owner/name", "main", settings)
        assert folder.name == COMMIT
        kept = {name: content for name, content in HUB_FILES.items() if not name.endswith((".bin", ".py"))}
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert fetch_from_hub("owner/name", "main", settings) == folder

    def test_a_socks_proxy_is_used(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("socksio")  # a dependency, which an environment of before does not have
        with _serving(_Hub) as endpoint, _socks_proxy(int(endpoint.rpartition(":")[2])) as proxy:
            monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")  # a name that only the proxy knows
            monkeypatch.setenv("ALL_PROXY", proxy.url)
            assert fetch_from_hub("owner/name", "main", settings).name == COMMIT
        assert set(proxy.asked) == {"hub.invalid"}

    def test_the_gguf_file_of_a_model_without_other_weights(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(HUB_FILES, "model.safetensors")
        monkeypatch.setitem(HUB_FILES, "model-q8_0.gguf", b"GGUF")
        with _serving(_Hub) as endpoint:
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
            folder = fetch_from_hub("owner/name", "main", settings)
            assert (folder / "model-q8_0.gguf").read_bytes() == b"GGUF"
            monkeypatch.setitem(HUB_FILES, "model-q4_k_m.gguf", b"GGUF")
            monkeypatch.setenv("HF_HOME", str(settings.home / "another"))
            with pytest.raises(BadInput, check=coded("gguf-several")):
                fetch_from_hub("owner/name", "main", settings)

    def test_a_model_that_is_not_there(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        with _serving(_Hub) as endpoint:
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
            with pytest.raises(BadInput, check=coded("hub-model-missing", "owner/other")):
                fetch_from_hub("owner/other", None, settings)
            with pytest.raises(BadInput, check=coded("hub-revision-missing", "'v9'")):
                fetch_from_hub("owner/name", "v9", settings)

    @pytest.mark.parametrize("offline", ["0", "1"])
    def test_without_network_it_fails_soon(
        self, settings: Settings, offline: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{_free_port()}")
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        started = time.monotonic()
        with pytest.raises(BadInput, check=coded("hub-unreachable")):
            fetch_from_hub("owner/name", None, settings)
        assert time.monotonic() - started < 60  # a hang, not a slow machine, fails here

    @pytest.mark.parametrize("repo_id", ["owner", "owner/name/more", "../x", "owner/na me", "owner/name?x=1"])
    def test_a_malformed_id_reaches_no_url(self, repo_id: str, settings: Settings) -> None:
        with pytest.raises(BadInput, check=coded("hub-id-not-valid")):
            fetch_from_hub(repo_id, None, settings)
        assert not settings.cache_dir.exists()


class _SocksProxy(ThreadingTCPServer):
    """A SOCKS5 proxy (RFC 1928) without authentication, which leads every connection to one port of loopback."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _SocksConnection)
        self.url, self.port, self.asked = f"socks5h://127.0.0.1:{self.server_address[1]}", port, list[str]()


class _SocksConnection(StreamRequestHandler):
    server: _SocksProxy

    def handle(self) -> None:
        _, methods = self.rfile.read(2)
        self.rfile.read(methods)
        self.wfile.write(b"\x05\x00")  # no authentication
        _, _, _, kind, length = self.rfile.read(5)
        assert kind == 3
        self.server.asked.append(self.rfile.read(length).decode())
        self.rfile.read(2)
        with socket.create_connection(("127.0.0.1", self.server.port)) as target:
            self.wfile.write(b"\x05\x00\x00\x01" + bytes(6))
            threading.Thread(target=_pump, args=(target, self.connection), daemon=True).start()
            _pump(self.connection, target)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def _socks_proxy(port: int) -> Iterator[_SocksProxy]:
    with _SocksProxy(port) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()


class _serving:
    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError


class _RefusesSignatures(_Quiet):
    def do_GET(self) -> None:
        self.answer(403, b"<Error><Code>SignatureDoesNotMatch</Code><Message>no</Message></Error>")


class _ListsAnotherSize(_Quiet):
    def do_GET(self) -> None:
        if "list-type" in self.path:
            contents = '<Contents><Key>home/config.json</Key><ETag>"e"</ETag><Size>5</Size></Contents>'
            self.answer(
                200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode()
            )
        else:
            self.answer(200, b"{}", ETag='"e"')


class _Hub(_Quiet):
    """The part of the Hub's HTTP API that a snapshot download asks for."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/owner/name/revision/main":
            self.answer(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith("/api/models/owner/name/revision/"):
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        elif path == f"/api/models/owner/name/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in HUB_FILES.items()
            ]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith(f"/owner/name/resolve/{COMMIT}/"):
            content = HUB_FILES[path.rpartition("/")[2]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(200, content, ETag=etag, X_Repo_Commit=COMMIT)
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
