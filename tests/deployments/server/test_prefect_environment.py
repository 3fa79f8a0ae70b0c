"""Prefect's environment: its API, the place of its files, no telemetry."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slmops.deployments.server.access import make_password, make_private
from slmops.deployments.server.environment import announced_server, prefect_api, prefect_home, prepare_prefect
from slmops.infra.errors import BadInput, SlmopsError, StageFailed
from slmops.infra.settings import Settings
from tests.support.errors import coded

ROOT = Path(__file__).resolve().parents[3]
URL = "http://127.0.0.1:4999/api"
PROGRAM = """
import json, os, sys
from slmops.deployments.server.environment import prepare_prefect
from slmops.infra.settings import load_settings

prepare_prefect(load_settings(), log_level=(sys.argv[1:] or [None])[0])
assert "prefect" not in sys.modules
from prefect.settings import get_current_settings

current = get_current_settings()
print(json.dumps({
    "api": current.api.url,
    "home": str(current.home),
    "database": str(current.server.database.connection_url.get_secret_value()),
    "analytics": current.server.analytics_enabled,
    "level": current.logging.level,
    "environment": {name: os.environ.get(name) for name in ("DO_NOT_TRACK", "NO_PROXY", "no_proxy")},
}))
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, environment: None, tmp_path: Path) -> None:
    for name in [*os.environ]:
        if name.startswith("PREFECT_") or name.upper() == "NO_PROXY":
            monkeypatch.delenv(name)
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "user"))


def write_profiles(home: Path, url: str = URL) -> None:
    home.mkdir(parents=True, exist_ok=True)
    profiles = (
        f'active = "work"\n[profiles.work]\nPREFECT_API_URL = "{url}"\nPREFECT_API_KEY = "key"\n[profiles.local]\n'
    )
    (home / "profiles.toml").write_text(profiles)


class TestWhichApi:
    def test_the_environments_wins(self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_profiles(tmp_path / "user" / ".prefect", "http://profile/api")
        monkeypatch.setenv("PREFECT_API_URL", URL)
        prepare_prefect(settings)
        assert os.environ["PREFECT_API_URL"] == URL
        assert os.environ["NO_PROXY"] == "127.0.0.1,localhost"  # it may be there, and a proxy may be set

    def test_else_the_active_profiles(self, settings: Settings, tmp_path: Path) -> None:
        write_profiles(tmp_path / "user" / ".prefect")
        prepare_prefect(settings)
        assert os.environ["PREFECT_API_URL"] == URL
        assert os.environ["PREFECT_API_KEY"] == "key"

    def test_of_profiles_elsewhere_too(
        self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_profiles(tmp_path / "elsewhere")
        monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "elsewhere"))
        prepare_prefect(settings)
        assert os.environ["PREFECT_API_URL"] == URL

    def test_the_profile_that_the_environment_names_is_the_active_one(
        self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_profiles(tmp_path / "user" / ".prefect")
        monkeypatch.setenv("PREFECT_PROFILE", "local")
        prepare_prefect(settings)
        assert "PREFECT_API_URL" not in os.environ
        assert "PREFECT_PROFILE" not in os.environ

    def test_else_an_embedded_one(self, settings: Settings) -> None:
        prepare_prefect(settings)
        assert "PREFECT_API_URL" not in os.environ
        assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "127.0.0.1,localhost"
        assert not settings.home_dir.exists()

    def test_the_users_own_bypass_of_the_proxy_stays(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("no_proxy", "intranet")
        prepare_prefect(settings)
        assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "intranet,127.0.0.1,localhost"
        prepare_prefect(settings)
        assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "intranet,127.0.0.1,localhost"

    @pytest.mark.parametrize("variable", ["PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"])
    @pytest.mark.parametrize("given", ["", "mine:secret"])
    def test_a_running_ups_with_its_password_unless_the_user_gives_one(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch, given: str, variable: str
    ) -> None:
        monkeypatch.setenv(variable, given)
        make_private(prefect_home(settings))
        password = make_password(prefect_home(settings))
        with announced_server(settings, URL):
            prepare_prefect(settings)
        assert os.environ["PREFECT_API_URL"] == URL
        assert os.environ["PREFECT_API_AUTH_STRING"] == (given or password)

    def test_the_password_is_not_sent_to_the_users_own_server(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
        make_private(prefect_home(settings))
        make_password(prefect_home(settings))
        with announced_server(settings, URL):
            prepare_prefect(settings)
        assert os.environ["PREFECT_API_URL"] == "http://elsewhere/api"
        assert "PREFECT_API_AUTH_STRING" not in os.environ

    def test_a_damaged_profiles_file_is_bad_input(self, settings: Settings, tmp_path: Path) -> None:
        write_profiles(tmp_path / "user" / ".prefect")
        path = tmp_path / "user" / ".prefect" / "profiles.toml"
        path.write_text("active = ")
        with pytest.raises(BadInput, check=coded("prefect-profiles-unreadable", "profiles.toml")):
            prepare_prefect(settings)


@pytest.mark.parametrize("variable", ["ALL_PROXY", "all_proxy", "HTTPS_PROXY"])
def test_a_socks_proxy_without_its_package_is_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "socks5://127.0.0.1:1080")
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(SlmopsError, check=coded("socks-proxy", "SOCKS proxy", "socksio")):
        prepare_prefect(settings)


def test_a_proxy_of_an_unknown_kind_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks4://127.0.0.1:1080")
    with pytest.raises(SlmopsError, check=coded("proxy-kind", "ALL_PROXY", "socks4")):
        prepare_prefect(settings)


def test_an_api_that_is_down_is_told_before_anything_is_written(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # nothing listens at its port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        with pytest.raises(StageFailed, check=coded("prefect-api-unusable", url)), prefect_api(settings):
            pass
    assert not settings.home_dir.exists()


def prefect_settings(home: Path, *arguments: str, **variables: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLMOPS_HOME": str(home), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    found: dict[str, object] = json.loads(done.stdout)
    return found


class TestWhatPrefectMakesOfIt:
    def test_embedded(self, home: Path) -> None:
        found = prefect_settings(
            home, "debug", DO_NOT_TRACK="0", PREFECT_SERVER_ANALYTICS_ENABLED="true", PREFECT_HOME="/gone/for/good"
        )
        assert found["api"] is None
        assert found["home"] == str(home / "prefect")
        assert str(home / "prefect") in str(found["database"])
        assert found["analytics"] is False
        assert found["level"] == "DEBUG"
        assert found["environment"] == {
            "DO_NOT_TRACK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        assert not home.exists()

    def test_the_users_server(self, home: Path, tmp_path: Path) -> None:
        write_profiles(tmp_path / "user" / ".prefect")
        found = prefect_settings(home)
        assert found["api"] == URL
        assert found["home"] == str(home / "prefect")
        assert found["analytics"] is False
        assert found["level"] == "INFO"
        assert not (tmp_path / "user" / ".prefect" / "prefect.db").exists()
