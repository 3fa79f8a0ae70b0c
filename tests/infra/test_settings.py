"""Settings as a user gives them: by environment variables, and by nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings, describe_settings, load_settings
from tests.support.errors import coded

SECRET = "hunter2-of-the-store"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLMOPS_HOME", raising=False)


def described() -> dict[str, tuple[Any, str]]:
    return {variable: (value, source) for variable, value, source, _ in describe_settings(load_settings())}


def test_variables_are_nested_by_two_underscores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path))
    monkeypatch.setenv("SLMOPS_STORE__URI", "file:///elsewhere")
    monkeypatch.setenv("SLMOPS_GATE__MIN_TOP1_AGREEMENT", "0.5")
    monkeypatch.setenv("SLMOPS_BENCHMARK__PROMPT_TOKENS", "[16, 32]")
    settings = load_settings()
    assert settings.home_dir == tmp_path
    assert settings.store_uri == "file:///elsewhere"
    assert settings.gate.min_top1_agreement == 0.5
    assert settings.benchmark.prompt_tokens == (16, 32)
    assert settings.gate.max_kl_divergence is None


def test_home_moves_every_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "a home"
    monkeypatch.setenv("SLMOPS_HOME", str(home))
    settings = load_settings()
    assert settings.store_uri == (home / "store").as_uri()
    assert settings.foundry_dir == home / "foundry"
    assert settings.cache_dir == home / "cache"
    assert not home.exists()


def test_a_relative_home_and_one_with_a_tilde_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "user"))
    monkeypatch.setenv("SLMOPS_HOME", "here")
    assert load_settings().home_dir == tmp_path / "here"
    monkeypatch.setenv("SLMOPS_HOME", "~/there")
    assert load_settings().home_dir == tmp_path / "user" / "there"


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    default = load_settings().home_dir
    monkeypatch.setenv("SLMOPS_HOME", "")
    monkeypatch.setenv("SLMOPS_GATE__MIN_TOP1_AGREEMENT", "")
    assert load_settings().home_dir == default
    assert described()["SLMOPS_HOME"] == (str(default), "default")
    assert described()["SLMOPS_GATE__MIN_TOP1_AGREEMENT"] == (None, "default")


def test_each_setting_is_shown_with_its_source_and_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_MACHINE__THREADS", "3")
    monkeypatch.setenv("slmops_machine__ram_bytes", "5")
    monkeypatch.setenv("SLMOPS_GATE", '{"max_quality_loss": 0.5}')
    shown = described()
    assert shown["SLMOPS_MACHINE__THREADS"] == (3, "environment")
    assert shown["SLMOPS_MACHINE__RAM_BYTES"] == (5, "environment")
    assert shown["SLMOPS_GATE__MAX_QUALITY_LOSS"] == (0.5, "environment")
    assert shown["SLMOPS_GATE__MIN_TOP1_AGREEMENT"] == (None, "default")
    assert all(description for *_, description in describe_settings(Settings()))
    json.dumps(list(describe_settings(Settings())))


def test_every_shown_variable_is_one_that_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A path for texts; then numbers, of which one lies within every setting's bounds and is not its default.
    (file := tmp_path / "settings.toml").touch()
    samples = (
        str(tmp_path),
        str(file),
        "slack-webhook/team",
        "[7]",
        '["a"]',
        "7",
        "64",
        "2000000",
        "0.25",
        "false",
        "true",
        "virtual",
    )

    def changes(variable: str, text: str, default: Any) -> bool:
        monkeypatch.setenv(variable, text)
        try:
            return described()[variable][0] != default
        except BadInput:
            return False

    for variable, value, _, _ in list(describe_settings(Settings())):
        assert any(changes(variable, text, value) for text in samples), f"no sample fits {variable}"
    assert {source for _, source in described().values()} == {"environment"}
    changed, default = load_settings(), Settings.model_construct()
    for name in Settings.model_fields:
        assert getattr(changed, name) != getattr(default, name)


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_STORE__SECRET_ACCESS_KEY", SECRET)
    value, source = described()["SLMOPS_STORE__SECRET_ACCESS_KEY"]
    assert (value, source) == ("**********", "environment")
    settings = load_settings()
    assert SECRET not in repr(settings) + str(settings.model_dump()) + settings.model_dump_json()
    assert settings.store.secret_access_key
    assert settings.store.secret_access_key.get_secret_value() == SECRET


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SLMOPS_STORE__SECRET_KEY", SECRET),
        ("SLMOPS_STORE", json.dumps([SECRET])),
        ("SLMOPS_STORE", SECRET),
        ("SLMOPS_STORE", json.dumps({"secret_access_key": [SECRET]})),
    ],
)
def test_a_misplaced_secret_is_not_shown(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadInput, check=coded("settings-not-valid", "SLMOPS_STORE")) as caught:
        load_settings()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SLMOPS_GATE__MIN_TOP1_AGREEMENT", "1.5"),
        ("SLMOPS_GATE__MIN_TOP1_AGREEMENT", "nan"),
        ("SLMOPS_GATE__MAX_KL_DIVERGENCE", "inf"),
        ("SLMOPS_GATE__MAX_KL_DIVERGENCE", "-1"),
        ("SLMOPS_GATE__MAX_QUALITY_LOSS", "much"),
        ("SLMOPS_GATE__NO_SUCH_SETTING", "1"),
        ("SLMOPS_BENCHMARK__PROMPT_TOKENS", "[]"),
        ("SLMOPS_BENCHMARK__PROMPT_TOKENS", "128,256"),
        ("SLMOPS_BENCHMARK__NEW_TOKENS", "1"),
        ("SLMOPS_TIMEOUT__BUILD_S", "0"),
        ("SLMOPS_MACHINE__THREADS", "-1"),
        ("SLMOPS_MACHINE__RAM_BYTES", "8 GB"),
        ("SLMOPS_MACHINE__RAM_CHECK", "perhaps"),
        ("SLMOPS_TIMEOUT", "quick"),
    ],
)
def test_a_value_that_is_not_valid_is_named(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadInput, check=coded("settings-not-valid", variable)) as caught:
        load_settings()
    assert caught.value.what_to_do


def test_all_that_is_not_valid_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_GATE__MIN_TOP1_AGREEMENT", "2")
    monkeypatch.setenv("SLMOPS_MACHINE__THREADS", "many")
    with pytest.raises(BadInput, check=coded("settings-not-valid", "MIN_TOP1_AGREEMENT", "'2'", "THREADS", "'many'")):
        load_settings()


def test_env_files_are_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"SLMOPS_HOME={tmp_path / 'planted'}\nSLMOPS_STORE__URI=file:///planted\n")
    monkeypatch.chdir(tmp_path)
    settings = load_settings()
    assert "planted" not in f"{settings.home_dir} {settings.store_uri}"


def test_threads_are_the_physical_cores_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().threads >= 1
    monkeypatch.setenv("SLMOPS_MACHINE__THREADS", "5")
    assert load_settings().threads == 5


def test_files_are_read_where_a_folder_of_them_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "SLMOPS_SERVE__TOKEN").write_text(f"{SECRET}\n")
    (tmp_path / "slmops_store__secret_access_key").write_text(SECRET)
    (tmp_path / "SLMOPS_STORE__URI").write_text("s3://of-the-file/models")
    (tmp_path / "another-programs-key").write_text("not ours")
    monkeypatch.setenv("SLMOPS_STORE__URI", "s3://of-the-variable/models")
    monkeypatch.setenv("SLMOPS_SECRETS_DIR", str(tmp_path))
    settings = load_settings()
    assert settings.serve.token
    assert settings.serve.token.get_secret_value() == SECRET
    assert settings.store.secret_access_key
    assert settings.store.secret_access_key.get_secret_value() == SECRET
    assert settings.store_uri == "s3://of-the-variable/models"
    shown = described()
    assert shown["SLMOPS_SERVE__TOKEN"] == ("**********", "file")
    assert shown["SLMOPS_STORE__URI"][1] == "environment"
    assert shown["SLMOPS_CATALOG__TOKEN"] == (None, "default")


def test_files_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLMOPS_SECRETS_DIR", str(tmp_path / "missing"))
    with pytest.raises(BadInput, check=coded("settings-not-valid", "missing")):
        load_settings()
    (tmp_path / "SLMOPS_SERVE__TOKEN").write_bytes(b"\xff")
    monkeypatch.setenv("SLMOPS_SECRETS_DIR", str(tmp_path))
    with pytest.raises(BadInput, check=coded("settings-not-valid", "SLMOPS_SECRETS_DIR")):
        load_settings()


@pytest.mark.parametrize("name", ["SLMOPS_STORE__SECRET_KEY", "SLMOPS_CATALOG__TOKEN"])
def test_a_file_that_is_not_valid_is_named_and_not_shown(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("short-secret")
    monkeypatch.setenv("SLMOPS_SECRETS_DIR", str(tmp_path))
    with pytest.raises(BadInput, check=coded("settings-not-valid", name)) as caught:
        load_settings()
    assert "short-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("SLMOPS_STORE_URI", "SLMOPS_STORE__URI"),
        ("SLMOPS_SERVE_TOKEN", "SLMOPS_SERVE__TOKEN"),
        ("SLMOPS_HOMES", "HOME"),
        ("SLMOPS_STORE__URL", "is not a setting, SLMOPS_STORE__URI is"),
        ("SLMOPS_GATE__MIN_TOP1", "is not a setting, SLMOPS_GATE__MIN_TOP1_AGREEMENT is"),
        ("SLMOPS_SERVE__TOKENS", "is not a setting, SLMOPS_SERVE__TOKEN is"),
    ],
)
def test_a_near_miss_is_told_and_its_value_is_not(monkeypatch: pytest.MonkeyPatch, found: str, wanted: str) -> None:
    monkeypatch.setenv(found, SECRET)
    with pytest.raises(BadInput, check=coded("settings-not-valid", found, wanted)) as caught:
        load_settings()
    assert SECRET not in str(caught.value)


def test_variables_of_other_programs_are_no_near_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLMOPS_SERVE_PORT", "SLMOPS_STORE_PORT", "SLMOPS_SECRETS", "SLMOPS_TESTS_USER_CACHE"):
        monkeypatch.setenv(name, "1")
    load_settings()


def test_a_home_whose_name_is_too_long_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_HOME", "/tmp/" + "h" * 300)
    with pytest.raises(BadInput, check=coded("settings-not-valid", "SLMOPS_HOME", "too long")):
        load_settings()


def test_a_home_that_cannot_be_read_is_told_as_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read every folder
    with pytest.raises(BadInput, check=coded("settings-not-valid", "SLMOPS_HOME", "Permission denied")):
        load_settings()


def test_a_user_without_a_home_directory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.raises(BadInput, check=coded("settings-not-valid", "SLMOPS_HOME", "no home directory")):
        load_settings()


@pytest.mark.parametrize("named", [True, False])
def test_a_settings_file_is_read_and_variables_replace_what_it_says(
    named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / ("team.toml" if named else "slmops.toml")
    file.write_text("[gate]\nmax_kl_divergence = 0.3\nmax_quality_loss = 0.1\n[benchmark]\nprompt_tokens = [64]\n")
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path))
    if named:
        monkeypatch.setenv("SLMOPS_SETTINGS_FILE", str(file))
    monkeypatch.setenv("SLMOPS_GATE__MAX_QUALITY_LOSS", "0.2")
    shown = described()
    assert shown["SLMOPS_GATE__MAX_KL_DIVERGENCE"] == (0.3, "slmops.toml")
    assert shown["SLMOPS_GATE__MAX_QUALITY_LOSS"] == (0.2, "environment")
    assert shown["SLMOPS_BENCHMARK__PROMPT_TOKENS"][1] == "slmops.toml"
    assert load_settings().benchmark.prompt_tokens == (64,)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[gate]\nmax_kl_divergenc = 1", "gate.max_kl_divergenc is not a setting, gate.max_kl_divergence is"),
        ("[gates]\nmax_quality_loss = 1", "gates.max_quality_loss is not a setting, gate.max_quality_loss is"),
        ("max_quality_loss = 1", "max_quality_loss is not a setting, gate.max_quality_loss is"),
        ('home = "/elsewhere"', "home can only be set in the environment"),
        ("gate = 7", "gate is not a setting"),
        ("[gate]\nmax_quality_loss = 7", "gate.max_quality_loss of "),
        ("[gate", "cannot be read: "),
        ("\udcff", "cannot be read: 'utf-8' codec"),
    ],
)
def test_a_fault_of_the_settings_file_is_told_with_the_nearest_setting(
    text: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path))
    (tmp_path / "slmops.toml").write_text(text, "utf-8", errors="surrogateescape")
    with pytest.raises(BadInput) as caught:
        load_settings()
    assert told in caught.value.message
    assert str(tmp_path / "slmops.toml") in caught.value.message


def test_a_named_settings_file_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLMOPS_SETTINGS_FILE", str(tmp_path / "none.toml"))
    with pytest.raises(BadInput, check=coded("settings-file-unreadable", "none.toml")):
        load_settings()


def test_a_settings_file_of_the_current_directory_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "slmops.toml").write_text("[gate]\nmax_kl_divergence = 9")
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert load_settings().gate.max_kl_divergence is None
