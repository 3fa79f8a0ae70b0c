"""docker-compose.yml: what Docker Compose reads in it, and its store server run for real, without an engine."""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError
from prefect.settings.legacy import _get_valid_setting_names
from prefect.settings.models.root import Settings as PrefectSettings
from prefect_redis.cleanup_queue import RedisWorkerCleanupQueueSettings
from prefect_redis.client import RedisMessagingSettings

from slmops.infra.settings import Settings, StoreSettings, describe_settings

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "infra" / "Dockerfile"
GUIDE = ROOT / "docs" / "store-server.md"
SCRIPTS = Path(sysconfig.get_path("scripts"))
SECRETIVE = re.compile(r"password|passwd|secret|token|credential|key\b", re.IGNORECASE)
IN_A_URL = re.compile(r"://[^/\s:@]*:[^/\s@]+@")


def read_by_compose(file: Path, **environment: str) -> dict[str, Any]:
    """Return the file as Docker Compose understands it; no engine is asked."""
    done = subprocess.run(
        [SCRIPTS / "docker-compose", "--file", file, "config", "--format", "json", "--no-env-resolution"],
        env={"HOME": str(file.parent), "PATH": os.defpath, "SYSTEMROOT": os.environ.get("SYSTEMROOT", "")}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return read_by_compose(FILE)


def options(service: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of a service's environment and of the options of its command."""
    yield from ((name, str(value)) for name, value in (service.get("environment") or {}).items())
    for word in [*(service.get("entrypoint") or []), *(service.get("command") or [])]:
        if option := re.fullmatch(r"(-[\w.-]+)=(.*)", word):
            yield option[1], option[2]


class TestTheImage:
    def test_hadolint_has_nothing_to_say(self, tmp_path: Path) -> None:
        def judged(file: Path) -> "subprocess.CompletedProcess[str]":
            return subprocess.run([SCRIPTS / "hadolint", file], capture_output=True, text=True, check=False)

        done = judged(DOCKERFILE)
        assert done.returncode == 0, done.stdout
        (tmp_path / "Dockerfile").write_text("FROM python:latest\n", "utf-8")
        assert "DL3007" in judged(tmp_path / "Dockerfile").stdout

    def test_it_runs_as_the_composed_services_do_and_from_locked_versions(self, composed: dict[str, Any]) -> None:
        text = DOCKERFILE.read_text("utf-8")
        assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == composed["services"]["serve"]["user"]
        installs = re.findall(r"pip install\b[^&\n]*", text)
        assert installs
        assert all("--constraint constraints.txt" in install for install in installs)

    def test_all_that_it_copies_is_sent_to_the_build(self) -> None:
        sent = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text("utf-8")
        copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text("utf-8"), re.MULTILINE)
        for path in " ".join(copied).split():
            assert (ROOT / path).exists(), path
            assert f"!{path}\n" in sent, path


class TestTheFile:
    @pytest.mark.parametrize(("found", "misspelt"), [("healthcheck:", "heathcheck:"), ("[store]", "[shop]")])
    def test_compose_refuses_what_it_does_not_know(self, found: str, misspelt: str, tmp_path: Path) -> None:
        assert found in FILE.read_text("utf-8")
        (tmp_path / "wrong.yml").write_text(FILE.read_text("utf-8").replace(found, misspelt, 1), "utf-8")
        with pytest.raises(AssertionError, match=misspelt.strip("[]:")):
            read_by_compose(tmp_path / "wrong.yml")

    def test_every_port_is_open_to_this_machine_only(self, composed: dict[str, Any]) -> None:
        ports = [port for service in composed["services"].values() for port in service.get("ports", [])]
        assert ports
        assert {port.get("host_ip") for port in ports} == {"127.0.0.1"}
        assert not [name for name, service in composed["services"].items() if service.get("network_mode") == "host"]

    def test_every_image_is_pinned(self, composed: dict[str, Any]) -> None:
        for name, service in composed["services"].items():
            pinned = re.fullmatch(r"[\w./-]+:(?P<tag>[\w][\w.-]*)(@sha256:[0-9a-f]{64})?", service["image"])
            assert pinned, f"{name}: {service['image']}"
            assert re.search(r"\d", pinned["tag"]), f"{name}: {service['image']}"
            assert "latest" not in pinned["tag"]

    def test_every_secret_comes_from_a_file(self, composed: dict[str, Any], tmp_path: Path) -> None:
        elsewhere = read_by_compose(FILE, SLMOPS_SECRETS=str(tmp_path))["secrets"]
        assert elsewhere
        for name, secret in elsewhere.items():
            assert set(secret) == {"name", "file"}, name
            assert Path(secret["file"]).parent == tmp_path, name
        assert {Path(secret["file"]).parent for secret in composed["secrets"].values()} == {ROOT / "secrets"}

    def test_no_secret_stands_in_the_file(self, composed: dict[str, Any]) -> None:
        assert not IN_A_URL.search(FILE.read_text("utf-8"))
        for name, service in composed["services"].items():
            for option, value in options(service):
                if SECRETIVE.search(option):
                    assert value.startswith("/run/secrets/"), f"{name}: {option}={value}"

    def test_every_service_has_a_health_check_or_ends(self, composed: dict[str, Any]) -> None:
        for name, service in composed["services"].items():
            if service["restart"] != "no":
                assert service["healthcheck"]["test"], name
                assert not service["healthcheck"].get("disable"), name

    def test_no_service_may_become_root(self, composed: dict[str, Any]) -> None:
        for name, service in composed["services"].items():
            assert "no-new-privileges:true" in service["security_opt"], name
            assert service["cap_drop"] == ["ALL"], name
            assert not service.get("privileged"), name
            assert service["user"].split(":")[0] not in {"0", "root"}, name

    def test_prefect_and_slmops_know_every_variable_that_they_are_given(self, composed: dict[str, Any]) -> None:
        known = {variable for variable, *_ in describe_settings(Settings())} | {"SLMOPS_SECRETS_DIR"}
        for section in (PrefectSettings, RedisMessagingSettings, RedisWorkerCleanupQueueSettings):
            known |= _get_valid_setting_names(section)
        for name, service in composed["services"].items():
            script = " ".join(map(str, service.get("entrypoint") or []))
            given = {*(service.get("environment") or {}), *re.findall(r"(?<!\w)PREFECT_\w+(?==)", script)}
            unknown = {variable for variable in given if variable.startswith(("PREFECT_", "SLMOPS_"))} - known
            assert not unknown, name

    def test_any_number_of_workers_runs_in_parallel(self, composed: dict[str, Any]) -> None:
        worker = composed["services"]["worker"]
        assert not {"container_name", "hostname", "ports", "network_mode"} & set(worker)
        # Its home is the image's volume, of which each container has its own.
        assert not worker.get("volumes")
        assert re.search(r"^VOLUME /var/lib/slmops$", DOCKERFILE.read_text("utf-8"), re.MULTILINE)
        assert worker["environment"]["SLMOPS_WORKER__POOL"] == worker["command"][-1]

    def test_workers_reach_the_api_and_not_what_is_behind_it(self, composed: dict[str, Any]) -> None:
        services = composed["services"]
        for name in ("worker", "deployer"):
            near = {
                other
                for other, one in services.items()
                if set(one.get("networks") or ()) & set(services[name]["networks"])
            }
            assert "prefect-api" in near
            assert not near & {"postgres", "redis", "prefect-services"}


@dataclass
class Server:
    """The object store of the file, run on this machine: its options and files, its ports moved, on 127.0.0.2."""

    service: dict[str, Any]
    files: dict[str, str]
    folder: Path
    ports: dict[str, int]
    process: subprocess.Popen[bytes] | None = None

    def moved(self, text: str) -> str:
        """Return a text of the file with the container's paths, ports and address replaced by this machine's."""
        text = re.sub(r"/run/secrets/([\w-]+)", lambda found: self.files[found[1]], text)
        text = text.replace("127.0.0.1:9333", f"127.0.0.1:{self.ports['master.port']}.{self.ports['master.port.grpc']}")
        for usual, role in (("8080", "volume"), ("8888", "filer"), ("8333", "s3")):
            text = re.sub(rf"\b{usual}\b", str(self.ports[f"{role}.port"]), text)
        return text.replace("0.0.0.0", "127.0.0.2")

    def environment(self) -> dict[str, str]:
        own = {name: self.moved(value) for name, value in self.service["environment"].items()}
        return {
            "PATH": f"{SCRIPTS}{os.pathsep}{os.defpath}",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
        } | own

    def start(self) -> None:
        first, *others = self.service["command"]
        assert first == "server"
        # The first options are what the image's entry point adds to the command.
        command = [str(SCRIPTS / "weed"), "-logtostderr=true", "server", f"-dir={self.folder / 'data'}"]
        command += ["-volume.max=0", "-master.volumeSizeLimitMB=1024"]
        command += [f"-{role}={port}" for role, port in self.ports.items()]
        command += [self.moved(word) for word in others]
        log = self.folder / "log"
        with log.open("ab") as to:
            self.process = subprocess.Popen(command, cwd=self.folder, env=self.environment(), stdout=to, stderr=to)
        deadline = time.monotonic() + 240
        while not self.is_healthy():
            said = log.read_text("utf-8", "replace")[-4000:]
            assert self.process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        """Ask what the health check asks."""
        before, ports, after = re.split(r"[{}]", self.service["healthcheck"]["test"][-1])
        urls = [self.moved(before + port + after) for port in ports.split(",")]
        assert len(urls) == 3
        try:
            return all(httpx.get(url, timeout=5).status_code == httpx.codes.OK for url in urls)
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()
        for role, port in self.ports.items():
            kind, _, grpc = role.partition(".port")
            Path(f"/tmp/seaweedfs-{kind}{grpc.replace('.', '-')}-{port}.sock").unlink(missing_ok=True)


def free_ports(roles: list[str]) -> dict[str, int]:
    sockets = {role: socket.socket() for role in roles}
    for opened in sockets.values():
        opened.bind(("127.0.0.1", 0))
    ports = {role: opened.getsockname()[1] for role, opened in sockets.items()}
    for opened in sockets.values():
        opened.close()
    return ports


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the guide's own commands make."""
    folder = tmp_path_factory.mktemp("store")
    (commands,) = (
        block for block in re.findall(r"```sh\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL) if "openssl" in block
    )
    subprocess.run(["sh", "-eu", "-c", commands], cwd=folder, check=True, capture_output=True)
    return folder / "secrets"


@pytest.fixture(scope="module")
def store(secrets: Path) -> StoreSettings:
    """Return the settings that the guide has the user read into the shell."""
    lines = (line.partition("=") for line in (secrets / "slmops.env").read_text("utf-8").splitlines())
    return StoreSettings(**{name.removeprefix("SLMOPS_STORE__").lower(): value for name, _, value in lines})


@pytest.fixture(scope="module")
def server(secrets: Path) -> Iterator[Server]:
    composed = read_by_compose(FILE, SLMOPS_SECRETS=str(secrets))
    roles = [role + port for role in ("master", "volume", "filer", "s3") for port in (".port", ".port.grpc")]
    files = {name: secret["file"] for name, secret in composed["secrets"].items()}
    running = Server(composed["services"]["object-store"], files, secrets.parent, free_ports(roles))
    (running.folder / "data").mkdir()
    running.start()
    try:
        for _ in range(2):
            make_bucket(running, composed["services"]["object-store-bucket"])
        yield running
    finally:
        running.kill()


def make_bucket(server: Server, job: dict[str, Any]) -> None:
    script = server.moved(job["command"][0].replace("$$", "$"))
    assert job["entrypoint"] == ["/bin/sh", "-euc"]
    command = [*job["entrypoint"], script]
    done = subprocess.run(command, env=server.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def s3(server: Server, store: StoreSettings) -> Any:
    assert store.secret_access_key
    return client(
        server, aws_access_key_id=store.access_key_id, aws_secret_access_key=store.secret_access_key.get_secret_value()
    )


def client(server: Server, *, config: Config | None = None, **keys: Any) -> Any:
    settings = Config(max_pool_connections=32, retries={"total_max_attempts": 1}).merge(config or Config())
    endpoint = f"http://127.0.0.2:{server.ports['s3.port']}"
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=settings, **keys)


def answer(call: Any, **arguments: Any) -> str:
    """Return the error's code, or `done`."""
    try:
        call(Bucket=arguments.pop("Bucket", "slmops"), **arguments)
    except ClientError as error:
        return error.response["Error"]["Code"]
    return "done"


def sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def tls(*, certificate: tuple[Path, Path] | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if certificate:
        context.load_cert_chain(*certificate)
    return context


def speaks_grpc(address: tuple[str, int], context: ssl.SSLContext | None) -> bool:
    """Whether the server answers the first words of HTTP/2, on which gRPC runs."""
    try:
        with socket.create_connection(address, timeout=10) as plain:
            connection = context.wrap_socket(plain) if context else plain
            with connection:
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
                # A settings frame of HTTP/2: three bytes of length, then its type, 4.
                return connection.recv(9)[3:4] == b"\x04"
    except (ssl.SSLError, ConnectionError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="Windows and macOS have no second loopback address")
class TestTheStoreServer:
    def test_it_is_the_version_of_the_image(self, server: Server) -> None:
        version = server.service["image"].partition(":")[2].partition("@")[0]
        told = subprocess.run([SCRIPTS / "weed", "version"], capture_output=True, text=True, check=True).stdout
        assert version in told.split()

    def test_the_settings_of_the_guide_name_it(self, server: Server, store: StoreSettings) -> None:
        (port,) = server.service["ports"]
        assert store.endpoint_url == f"http://{port['host_ip']}:{port['published']}"
        assert store.uri == "s3://slmops/models"

    @pytest.mark.parametrize(("size_bytes", "rounds"), [(10, 2), (3_000_000, 1)])
    def test_of_many_writers_of_a_key_one_wins(self, s3: Any, size_bytes: int, rounds: int) -> None:
        for turn in range(rounds):
            key, start = f"models/race-{size_bytes}/{turn}/manifest.json", threading.Barrier(8)

            def write(writer: int, key: str = key, start: threading.Barrier = start) -> str:
                start.wait(60)
                return answer(s3.put_object, Key=key, Body=bytes([writer]) * size_bytes, IfNoneMatch="*")

            with ThreadPoolExecutor(8) as writers:
                answers = list(writers.map(write, range(8)))
            assert sorted(answers) == ["PreconditionFailed"] * 7 + ["done"]
            body = s3.get_object(Bucket="slmops", Key=key)["Body"].read()
            assert body == bytes([answers.index("done")]) * size_bytes

    def test_bytes_that_do_not_match_their_checksum_are_refused(self, s3: Any) -> None:
        assert answer(s3.put_object, Key="blobs/wrong", Body=b"x", ChecksumSHA256=sha256(b"y")) == "BadDigest"
        assert answer(s3.head_object, Key="blobs/wrong") == "404"
        assert answer(s3.put_object, Key="blobs/right", Body=b"x", ChecksumSHA256=sha256(b"x")) == "done"
        head = s3.head_object(Bucket="slmops", Key="blobs/right", ChecksumMode="ENABLED")
        assert head["ChecksumSHA256"] == sha256(b"x")

    def test_a_large_file_goes_in_parts_and_comes_back(self, s3: Any, tmp_path: Path) -> None:
        data = os.urandom(20_000_000)
        (tmp_path / "there").write_bytes(data)
        s3.upload_file(tmp_path / "there", "slmops", "blobs/large", ExtraArgs={"ChecksumAlgorithm": "SHA256"})
        s3.download_file("slmops", "blobs/large", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == data
        assert s3.head_object(Bucket="slmops", Key="blobs/large")["ETag"].endswith('-3"')

    def test_a_part_is_checked_and_the_whole_is_conditional(self, s3: Any) -> None:
        s3.put_object(Bucket="slmops", Key="blobs/taken", Body=b"first")
        upload = s3.create_multipart_upload(Bucket="slmops", Key="blobs/taken", ChecksumAlgorithm="SHA256")
        upload = {"Key": "blobs/taken", "UploadId": upload["UploadId"]}
        part = {"PartNumber": 1, "ChecksumSHA256": sha256(b"second")}
        assert answer(s3.upload_part, Body=b"other", **upload, **part) == "BadDigest"
        part["ETag"] = s3.upload_part(Bucket="slmops", Body=b"second", **upload, **part)["ETag"]
        whole = {"MultipartUpload": {"Parts": [part]}}
        assert answer(s3.complete_multipart_upload, IfNoneMatch="*", **upload, **whole) == "PreconditionFailed"
        assert s3.get_object(Bucket="slmops", Key="blobs/taken")["Body"].read() == b"first"
        assert answer(s3.abort_multipart_upload, **upload) == "done"

    def test_objects_are_listed_in_order_copied_and_removed(self, s3: Any) -> None:
        for number in range(12):
            s3.put_object(Bucket="slmops", Key=f"list/{number}", Body=b"")
        s3.copy_object(Bucket="slmops", Key="list/copy", CopySource={"Bucket": "slmops", "Key": "list/3"})
        pages = s3.get_paginator("list_objects_v2").paginate(
            Bucket="slmops", Prefix="list/", PaginationConfig={"PageSize": 5}
        )
        listed = [found["Key"] for page in pages for found in page["Contents"]]
        assert listed == sorted([*(f"list/{number}" for number in range(12)), "list/copy"])
        for _ in range(2):
            assert answer(s3.delete_object, Key="list/copy") == "done"
        assert answer(s3.head_object, Key="list/copy") == "404"

    def test_the_keys_open_this_bucket_only_and_nothing_opens_without(self, server: Server, s3: Any) -> None:
        assert answer(s3.create_bucket, Bucket="other") == "AccessDenied"
        assert answer(s3.delete_bucket) == "AccessDenied"
        stranger = client(server, config=Config(signature_version=UNSIGNED))
        assert answer(stranger.list_objects_v2) == "AccessDenied"
        assert answer(stranger.put_object, Key="stranger", Body=b"") == "AccessDenied"
        guesser = client(server, aws_access_key_id="slmops", aws_secret_access_key="guessed")
        assert answer(guesser.list_objects_v2) == "SignatureDoesNotMatch"

    def test_only_the_gateway_leaves_the_loopback_interface(self, server: Server) -> None:
        def is_open(port: int) -> bool:
            with socket.socket() as tried:
                return tried.connect_ex(("127.0.0.2", port)) == 0

        assert {role for role, port in server.ports.items() if is_open(port)} == {"s3.port", "s3.port.grpc"}

    def test_the_gateways_second_port_asks_for_a_certificate(self, server: Server) -> None:
        address = ("127.0.0.2", server.ports["s3.port.grpc"])
        certificate = (Path(server.files["object-store-grpc-cert"]), Path(server.files["object-store-grpc-key"]))
        assert not speaks_grpc(address, None)
        assert not speaks_grpc(address, tls(certificate=None))
        assert speaks_grpc(address, tls(certificate=certificate))
        assert speaks_grpc(("127.0.0.1", server.ports["filer.port.grpc"]), None)

    def test_it_reports_to_nobody(self, server: Server) -> None:
        assert "-master.telemetry=false" in server.service["command"]

    def test_objects_outlive_a_killed_server(self, server: Server, s3: Any) -> None:
        s3.put_object(Bucket="slmops", Key="blobs/kept", Body=b"kept")
        server.kill()
        server.start()
        assert s3.get_object(Bucket="slmops", Key="blobs/kept")["Body"].read() == b"kept"
        assert answer(s3.put_object, Key="blobs/kept", Body=b"other", IfNoneMatch="*") == "PreconditionFailed"


@pytest.mark.skipif(sys.platform != "linux", reason="Windows and macOS have no second loopback address")
def test_serve_waits_for_the_first_model_of_the_store_and_wants_its_token(
    server: Server, secrets: Path, tmp_path: Path
) -> None:
    composed = read_by_compose(FILE, SLMOPS_SECRETS=str(secrets))
    service = composed["services"]["serve"]
    (tmp_path / "secrets").mkdir()
    for secret in service["secrets"]:
        shutil.copy(composed["secrets"][secret["source"]]["file"], tmp_path / "secrets" / secret["target"])
    environment = service["environment"] | {
        "SLMOPS_HOME": str(tmp_path / "home"),
        "SLMOPS_SECRETS_DIR": str(tmp_path / "secrets"),
        "SLMOPS_STORE__ENDPOINT_URL": f"http://127.0.0.2:{server.ports['s3.port']}",
    }
    (published,) = service["ports"]
    port = str(free_ports(["serve"])["serve"])
    command = [sys.executable, "-m", "slmops", *service["command"], "--port", port]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=stream, stderr=stream)
    try:
        script = service["healthcheck"]["test"][-1]
        assert f":{published['target']}/" in script
        check = [sys.executable, "-c", script.replace(str(published["target"]), port)]
        deadline = time.monotonic() + 240
        while subprocess.run(check, capture_output=True, check=False).returncode:
            assert process.poll() is None, log.read_text("utf-8")
            assert time.monotonic() < deadline, log.read_text("utf-8")
        assert "s3://slmops/models has no champion yet" in log.read_text("utf-8")
        models = f"http://127.0.0.1:{port}/v1/models"
        assert httpx.get(models).status_code == httpx.codes.UNAUTHORIZED
        token = (secrets / "serve-token").read_text("utf-8").strip()
        assert httpx.get(models, headers={"Authorization": f"Bearer {token}"}).json()["data"] == []
        assert token not in log.read_text("utf-8")
    finally:
        process.terminate()
        assert process.wait(60) is not None
