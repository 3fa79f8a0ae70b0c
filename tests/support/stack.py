"""docker-compose.yml's Prefect server and workers on this machine: processes in place of containers.

PostgreSQL and Redis are Debian's, the store is rclone's S3 server. All else is what the file says: entry points,
commands, environment, secrets and health checks, with hosts, ports and folders moved.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.s3_servers import S3Server, rclone_server
from tests.test_compose import FILE, GUIDE, ROOT, free_ports, read_by_compose

POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
IS_INSTALLED = POSTGRES is not None and shutil.which("redis-server") is not None
MISSING = "PostgreSQL and redis-server are not installed: make apt"
GUIDES = (GUIDE, ROOT / "docs" / "stack.md")
START_DEADLINE_S = 240  # a hang, not a slow machine, fails here
MARK = "SLMOPS_TESTS_STACK"  # a variable that all processes of a stack inherit


@dataclass
class Stack:
    """The services of the file, each a process with a folder of its own; `variables` are added to all of them."""

    composed: dict[str, Any]
    folder: Path
    store: S3Server
    variables: Mapping[str, str]
    ports: dict[str, int] = field(default_factory=lambda: free_ports(["postgres", "redis", "prefect-api"]))
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def api_url(self) -> str:
        """The API's address."""
        return f"http://127.0.0.1:{self.ports['prefect-api']}/api"

    @property
    def authentication(self) -> str:
        """The API's user and password, as the guide's commands made them."""
        return Path(self.composed["secrets"]["prefect-auth"]["file"]).read_text("utf-8").strip()

    def home(self, name: str) -> Path:
        """The folder of a process, which stands for its container's disk."""
        return self.folder / name

    def said(self, name: str) -> str:
        """The end of a process's log."""
        return (self.folder / f"{name}.log").read_text("utf-8", "replace")[-6000:]

    def start(self, service: str, name: str | None = None) -> None:
        """Start a service as the file says; `name` tells several of one service apart."""
        name = name or service
        said = self.composed["services"][service]
        home = self.home(name)
        (home / "secrets").mkdir(parents=True)
        for secret in said.get("secrets", ()):
            shutil.copy(
                self.composed["secrets"][secret["source"]]["file"], home / "secrets" / Path(secret["target"]).name
            )
        if published := said.get("healthcheck", {}).get("test", [""])[-1]:
            for port in re.findall(r"127\.0\.0\.1:(\d+)/", published):
                self.ports.setdefault(name, free_ports([port])[port])
        words = [*(said.get("entrypoint") or ["slmops"]), *(said.get("command") or ())]
        if words[0] == "slmops" and "--host" in words:  # serve and catalog take their port from the command
            words += ["--port", str(self.ports[name])]
        self._run(name, [self._moved(word, name) for word in words], self.environment(service, name))

    def environment(self, service: str, name: str) -> dict[str, str]:
        """The environment of a service's process; the file's own variables are moved, not left out."""
        home = str(self.home(name))
        moved = {
            "HOME": home,
            "PREFECT_HOME": f"{home}/prefect",
            "PREFECT_SERVER_DATABASE_HOST": "127.0.0.1",
            "PREFECT_SERVER_DATABASE_PORT": str(self.ports["postgres"]),
            "PREFECT_REDIS_MESSAGING_HOST": "127.0.0.1",
            "PREFECT_REDIS_MESSAGING_PORT": str(self.ports["redis"]),
            "PREFECT_API_URL": self.api_url,
            "PREFECT_WORKER_WEBSERVER_PORT": str(self.ports.get(name, 0)),
            "SLMOPS_SECRETS_DIR": f"{home}/secrets",
            "SLMOPS_STORE__ENDPOINT_URL": self.store.endpoint_url,
            "SLMOPS_STORE__ACCESS_KEY_ID": self.store.access_key_id,
        }
        own = self.composed["services"][service].get("environment") or {}
        path = os.pathsep.join([str(self.folder / "bin"), sysconfig.get_path("scripts"), os.defpath])
        return {
            "PATH": path,
            "HOME": home,  # as the image sets it, and the next one
            "SLMOPS_HOME": home,
            "PREFECT_SERVER_API_PORT": str(self.ports["prefect-api"]),
            "SLMOPS_STORE__REGION": "us-east-1",
            MARK: str(self.folder),
            **self.variables,
            **{key: moved.get(key, value) for key, value in own.items()},
        }

    def _moved(self, word: str, name: str) -> str:
        home = self.home(name)
        word = word.replace("$$", "$").replace("/run/secrets", str(home / "secrets"))
        word = word.replace("/tmp/redis.conf", f"{home}/redis.conf")
        word = word.replace("--dir /data", f"--dir {home} --port {self.ports['redis']} --bind 127.0.0.1")
        return "127.0.0.1" if word == "0.0.0.0" else word

    def _run(self, name: str, command: list[str], environment: Mapping[str, str], **options: Any) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=options.pop("cwd", self.home(name)),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **options,
            )

    def run_postgres(self) -> Path:
        """Do what the image's entry point does; returns the folder, which `postgres` owns where root runs this."""
        assert POSTGRES
        own = self.composed["services"]["postgres"]["environment"]
        folder = Path(tempfile.mkdtemp(prefix="slmops-postgres-"))
        password = folder / "password"
        secret = Path(own["POSTGRES_PASSWORD_FILE"]).name
        password.write_bytes(Path(self.composed["secrets"][secret]["file"]).read_bytes())
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL does not run as
            as_user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            for path in (folder, password):
                shutil.chown(path, "postgres", "postgres")
        data, user = folder / "data", own["POSTGRES_USER"]
        initdb = [POSTGRES / "initdb", "-D", data, "-U", user, "-A", "scram-sha-256", f"--pwfile={password}", "-N"]
        subprocess.run(initdb, cwd=folder, check=True, capture_output=True, **as_user)
        words = ["-D", data, "-p", self.ports["postgres"], "-k", folder, "-h", "127.0.0.1", "-F"]
        self.home("postgres").mkdir()
        variables = {MARK: str(self.folder), "PATH": os.defpath}
        self._run("postgres", [str(POSTGRES / "postgres"), *map(str, words)], variables, cwd=folder, **as_user)
        make = ["psql", "-h", "127.0.0.1", "-p", str(self.ports["postgres"]), "-U", user, "-d", "postgres"]
        make += ["-c", f"create database {own['POSTGRES_DB']}"]
        login = {"PGPASSWORD": password.read_text("utf-8").strip(), "PATH": os.defpath}
        self._wait(
            "postgres", lambda: subprocess.run(make, env=login, capture_output=True, check=False).returncode == 0
        )
        return folder

    def is_healthy(self, service: str, name: str | None = None) -> bool:
        """Ask what the service's health check asks."""
        name = name or service
        kind, *words = self.composed["services"][service]["healthcheck"]["test"]
        command = words if kind == "CMD" else ["/bin/sh", "-c", *words]
        command = [self._moved(word, name) for word in command]
        command = [re.sub(r"127\.0\.0\.1:\d+/", f"127.0.0.1:{self.ports.get(name)}/", word) for word in command]
        command = [word.replace("#1", f"#{self.processes[name].pid}") for word in command]
        command = [word.replace("redis-cli", f"redis-cli -p {self.ports['redis']}") for word in command]
        environment = self.environment(service, name)
        done = subprocess.run(command, env=environment, cwd=self.home(name), capture_output=True, check=False)
        return done.returncode == 0

    def wait_until_healthy(self, service: str, name: str | None = None) -> None:
        """Wait until the service's health check passes."""
        self._wait(name or service, lambda: self.is_healthy(service, name))

    def _wait(self, name: str, is_ready: Any) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while not is_ready():
            assert self.processes[name].poll() is None, self.said(name)
            assert time.monotonic() < deadline, self.said(name)
            time.sleep(0.3)

    def tree(self, name: str) -> list[psutil.Process]:
        """A process and all that it started."""
        try:
            root = psutil.Process(self.processes[name].pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self, name: str) -> None:
        """End a process and all that it started as a power cut does."""
        for process in self.tree(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.processes.pop(name).wait()

    def left(self) -> list[psutil.Process]:
        """What still runs of it, whoever its parent is."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder):
                    found.append(process)
        return found


def _secrets(folder: Path, store: S3Server) -> Path:
    """Return the folder of secrets that the guides' own commands make, the store's key replaced by the one it knows."""
    for guide in GUIDES:
        for block in re.findall(r"```sh\n(.*?)```", guide.read_text("utf-8"), re.DOTALL):
            if "openssl" in block:
                subprocess.run(["/bin/sh", "-eu", "-c", block.split("\ndocker ")[0]], cwd=folder, check=True)
    (folder / "secrets" / "object-store-key").write_text(store.secret_access_key, "utf-8")
    return folder / "secrets"


@contextlib.contextmanager
def running_stack(folder: Path, variables: Mapping[str, str]) -> Iterator[Stack]:
    """Run PostgreSQL, Redis, the migration, the API and the services in `folder`; all of it ends with the context."""
    with rclone_server(folder / "buckets") as store:
        store.ensure_bucket("slmops")
        composed = read_by_compose(FILE, SLMOPS_SECRETS=str(_secrets(folder, store)))
        stack = Stack(composed, folder, store, variables)
        (folder / "bin").mkdir()
        slmops = folder / "bin" / "slmops"
        slmops.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m slmops "$@"\n', "utf-8")
        slmops.chmod(0o755)
        data = None
        try:
            stack.start("redis")
            data = stack.run_postgres()
            stack.wait_until_healthy("redis")
            stack.start("prefect-migrate")
            assert stack.processes.pop("prefect-migrate").wait(START_DEADLINE_S) == 0, stack.said("prefect-migrate")
            for service in ("prefect-api", "prefect-services"):
                stack.start(service)
            for service in ("prefect-api", "prefect-services"):
                stack.wait_until_healthy(service)
            yield stack
        finally:
            for name in reversed(list(stack.processes)):
                stack.kill(name)
            deadline = time.monotonic() + 30
            while left := stack.left():
                for process in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                assert time.monotonic() < deadline, left
            if data:
                shutil.rmtree(data, ignore_errors=True)
