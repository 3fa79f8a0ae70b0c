"""The Prefect server of docker-compose.yml, run on this machine, its parts in processes of their own."""

import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
MISSING = "PostgreSQL or redis-server is not installed (make apt)"
IS_INSTALLED = bool(POSTGRES) and bool(shutil.which("redis-server")) and os.name == "posix" and os.geteuid() == 0


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@dataclass
class Stack:
    """The services that run; `auth` is what the API asks for."""

    services: dict[str, Any]
    folder: Path
    ports: dict[str, int]
    secrets: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def auth(self) -> tuple[str, str]:
        user, _, password = self.secrets["prefect-auth"].partition(":")
        return user, password

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['prefect']}/api"

    def run(self, name: str, command: list[str], environment: dict[str, str] | None = None, **options: Any) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, **options
            )

    def start(self, name: str) -> None:
        """Start a Prefect service by the file's own entry point, command and environment."""
        service = self.services[name]
        words = [word.replace("$$", "$") for word in [*service["entrypoint"], *service["command"]]]
        words = [word.replace("/run/secrets", str(self.folder / "secrets")) for word in words]
        words = ["127.0.0.1" if word == "0.0.0.0" else word for word in words]
        home = str(self.folder / name)
        moved = {
            "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.defpath}",
            "HOME": home,
            "PREFECT_HOME": home,
            "PREFECT_SERVER_DATABASE_HOST": "127.0.0.1",
            "PREFECT_SERVER_DATABASE_PORT": str(self.ports["postgres"]),
            "PREFECT_REDIS_MESSAGING_HOST": "127.0.0.1",
            "PREFECT_REDIS_MESSAGING_PORT": str(self.ports["redis"]),
            "PREFECT_SERVER_API_PORT": str(self.ports["prefect"]),
            "PREFECT_SERVER_UI_API_URL": self.api_url,
        }
        self.run(name, words, {**service["environment"], **moved})

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        try:
            parent = psutil.Process(process.pid)
            family = [*parent.children(recursive=True), parent]
        except psutil.NoSuchProcess:
            family = []
        for one in family:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text("utf-8", "replace")[-4000:]

    def wait_for_api(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{self.api_url}/health", timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            assert self.processes["prefect-api"].poll() is None, self.said("prefect-api")
            assert time.monotonic() < deadline, self.said("prefect-api")
            time.sleep(0.3)


@contextmanager
def running_stack(services: dict[str, Any], folder: Path) -> Iterator[Stack]:
    """Run the file's Prefect services, as Docker Compose reads them, in `folder`; all of it ends with the context."""
    secrets = {"postgres-password": "a1b2", "redis-password": "c3d4", "prefect-auth": "slmops:e5f6"}
    (folder / "secrets").mkdir()
    for name, secret in secrets.items():
        (folder / "secrets" / name).write_text(secret + "\n", "utf-8")
    stack = Stack(services, folder, {name: free_port() for name in ("postgres", "redis", "prefect")}, secrets)
    data = Path("/tmp") / f"slmops-postgres-{stack.ports['postgres']}"
    data.mkdir()
    shutil.chown(data, "postgres", "postgres")
    password = data / "password"
    password.write_text(secrets["postgres-password"], "utf-8")
    password.chmod(0o644)
    try:
        as_postgres: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []}
        subprocess.run(
            [
                POSTGRES[0] / "initdb",
                "-D",
                data / "data",
                "-U",
                "prefect",
                "-A",
                "scram-sha-256",
                f"--pwfile={password}",
            ],
            cwd=data,
            check=True,
            capture_output=True,
            **as_postgres,
        )
        port = str(stack.ports["postgres"])
        words = [
            str(POSTGRES[0] / "postgres"),
            "-D",
            str(data / "data"),
            "-p",
            port,
            "-k",
            str(data),
            "-h",
            "127.0.0.1",
        ]
        stack.run("postgres", words, **as_postgres)
        redis = ["redis-server", "--port", str(stack.ports["redis"]), "--bind", "127.0.0.1", "--save", ""]
        stack.run("redis", [*redis, "--requirepass", secrets["redis-password"]])
        login = {"PGPASSWORD": secrets["postgres-password"], "PATH": os.defpath}
        psql = [
            "psql",
            "-h",
            "127.0.0.1",
            "-p",
            port,
            "-U",
            "prefect",
            "-d",
            "postgres",
            "-c",
            "create database prefect",
        ]
        deadline = time.monotonic() + 60
        while subprocess.run(psql, env=login, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, stack.said("postgres")
            time.sleep(0.2)
        stack.start("prefect-migrate")
        assert stack.processes["prefect-migrate"].wait(180) == 0, stack.said("prefect-migrate")
        stack.start("prefect-api")
        stack.start("prefect-services")
        stack.wait_for_api()
        yield stack
    finally:
        for name in reversed(list(stack.processes)):
            stack.stop(name)
        shutil.rmtree(data, ignore_errors=True)
