"""Every setting of slmops: one class, read from `SLMOPS_*` environment variables inside an entry point."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from platformdirs import user_cache_path, user_data_path
from pydantic import Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from slmops.infra.errors import BadInput
from slmops.infra.server_settings import (
    CatalogSettings,
    NoticeSettings,
    Seconds,
    Section,
    ServeSettings,
    WorkerSettings,
)
from slmops.infra.settings_faults import fault_of_home, found_value, near_misses, not_a_setting
from slmops.infra.settings_file import SETTINGS_FILE, read_settings_file

ENVIRONMENT_PREFIX = "SLMOPS_"
NESTED_DELIMITER = "__"

Share = Annotated[float, Field(ge=0, le=1)]


class StoreSettings(Section):
    """The store of versions."""

    uri: str | None = Field(
        None, description="Store of versions: file:///folder or s3://bucket/prefix; default: `store` under home."
    )
    endpoint_url: str | None = Field(None, description="Endpoint of an S3-compatible server; default: AWS.")
    region: str | None = Field(None, description="S3 region; default: the usual AWS chain.")
    profile: str | None = Field(None, description="Profile of AWS's configuration; default: the usual AWS chain.")
    access_key_id: str | None = Field(None, description="S3 access key; default: the usual AWS credential chain.")
    secret_access_key: SecretStr | None = Field(None, description="S3 secret key; default: the AWS credential chain.")
    addressing_style: Literal["path", "virtual", "auto"] | None = Field(
        None, description="Bucket in the path or in the host's name; default: path with an endpoint, auto without."
    )
    signing_key: Path | None = Field(
        None, description="Private key (PEM, elliptic curve) that signs new versions; default: they are not signed."
    )
    signing_key_password: SecretStr | None = Field(None, description="Password of the signing key.")
    verification_key: Path | None = Field(None, description="Public key (PEM) that verifies signatures.")
    require_signature: bool = Field(
        False, description="Register only unaltered versions that the owner of the verification key signed."
    )


class FoundrySettings(Section):
    """Foundry Local's directories."""

    cache_dir: Path | None = Field(
        None, description="Foundry Local's model cache; default: the folder `foundry` under the home directory."
    )


class GateSettings(Section):
    """Thresholds of the gate; each overrides the defaults of all precisions."""

    min_top1_agreement: Share | None = Field(
        None, description="Smallest share of positions at which variant and reference prefer the same token."
    )
    max_kl_divergence: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Largest mean KL divergence of the variant from the reference, in nats per token.",
    )
    max_quality_loss: Share | None = Field(
        None, description="Largest drop of the task score below the reference's; only a drop beyond noise fails."
    )
    min_output_conformity: Share | None = Field(
        None,
        description="Smallest share of answers in the requested output format; default: 0.95, without rows in "
        "which the source's answer has another format too.",
    )
    max_memory_growth_bytes_per_request: int = Field(
        65_536, ge=0, description="Largest growth of the resident memory per request in the soak, in bytes."
    )
    max_cliff_ratio: float = Field(
        4.0, gt=1, allow_inf_nan=False, description="Largest loss of throughput from one prompt length to the next."
    )


class EvaluationSettings(Section):
    """Size of the comparison with the reference."""

    max_rows: int = Field(200, ge=1, le=100_000, description="Evaluation rows that are used, starting with the first.")
    max_new_tokens: int = Field(128, ge=1, le=8192, description="Longest generated answer, in tokens.")
    max_positions: int = Field(
        1024, ge=1, le=100_000, description="Token positions at which the next-token distributions are compared."
    )
    batch_size: int = Field(
        32, ge=1, le=256, description="Rows that the reference answers in one batch; of long rows at most 8."
    )
    max_text_tokens: int = Field(
        8192, ge=2, le=10_000_000, description="Tokens of the text file's beginning for its perplexity."
    )


class CalibrationSettings(Section):
    """Size of the calibration texts of quantized variants."""

    max_tokens: int = Field(4096, ge=16, le=1_000_000, description="Tokens of all texts.")
    max_new_tokens: int = Field(
        128, ge=1, le=8192, description="Longest own answer of the checkpoint in the calibration texts, in tokens."
    )


class BenchmarkSettings(Section):
    """Size of the measurement of speed and memory."""

    prompt_tokens: tuple[Annotated[int, Field(ge=1, le=131_072)], ...] = Field(
        (128,), min_length=1, description="Prompt lengths, in tokens."
    )
    new_tokens: int = Field(64, ge=2, le=8192, description="Tokens generated per request.")
    warmup: int = Field(1, ge=0, le=100, description="Requests before the first measured one.")
    repetitions: int = Field(5, ge=1, le=1000, description="Measured requests per prompt length.")


class SweepSettings(Section):
    """The sweep over prompt lengths: powers of two from 32 on, up to the context's limit."""

    max_prompt_tokens: int | None = Field(
        None, ge=32, le=10_000_000, description="Longest prompt, in tokens; default: what the context allows."
    )
    new_tokens: int = Field(8, ge=2, le=1024, description="Tokens generated at each length.")
    repetitions: int = Field(3, ge=1, le=100, description="Requests at each length.")
    budget_s: Seconds = Field(20, description="The sweep stops before a length that would exceed this time.")


class SoakSettings(Section):
    """The soak: many requests to one process, in genai and in Foundry Local."""

    requests: int = Field(48, ge=0, le=1_000_000, description="Requests per runtime; 0: no soak.")
    new_tokens: int = Field(8, ge=1, le=8192, description="Tokens generated per request.")


class TimeoutSettings(Section):
    """Deadlines of the child processes and of people, in seconds."""

    train_s: Seconds = Field(3600, description="Training of the demo checkpoint.")
    fine_tune_s: Seconds = Field(24 * 3600, description="A fine-tuning, and the download of its dataset.")
    merge_s: Seconds = Field(3600, description="Merging a LoRA adapter into its base.")
    build_s: Seconds = Field(4 * 3600, description="One variant's build.")
    reference_s: Seconds = Field(4 * 3600, description="The reference's answers and distributions.")
    render_s: Seconds = Field(900, description="The prompts of all conversations in one runtime.")
    evaluate_s: Seconds = Field(4 * 3600, description="One variant's answers and distributions.")
    measure_s: Seconds = Field(3600, description="One variant's benchmark.")
    exercise_s: Seconds = Field(3600, description="One variant's soak and edge inputs in one runtime.")
    lm_eval_s: Seconds = Field(24 * 3600, description="One variant's lm-eval tasks.")
    foundry_s: Seconds = Field(900, description="One session with Foundry Local's runtime.")
    approval_s: Seconds = Field(24 * 3600, description="A person's approval of a new champion, which then stays.")


class MachineSettings(Section):
    """Resources of the machine; the sizes can be set to simulate another machine."""

    threads: int = Field(0, ge=0, le=1024, description="Threads per child process; 0: the physical cores.")
    ram_bytes: int | None = Field(None, ge=0, description="Memory that counts as available; default: as measured.")
    disk_bytes: int | None = Field(None, ge=0, description="Disk space that counts as free; default: as measured.")
    ram_check: bool = Field(True, description="Refuse a build if its estimated memory is not available.")


class Settings(BaseSettings):
    """All settings; see `slmops config`."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter=NESTED_DELIMITER,
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",
    )

    home: Path = Field(
        default_factory=lambda: user_data_path("slmops", appauthor=False),
        description="Folder of everything that slmops writes, except for the user's cache.",
    )
    user_cache: Path = Field(
        default_factory=lambda: user_cache_path("slmops", appauthor=False),
        description="Cache that all home directories share: an empty database for embedded Prefect.",
    )
    secrets_dir: Path | None = Field(
        None,
        description="Folder of files named like these variables, with their values; a variable has priority.",
    )
    settings_file: Path | None = Field(
        None, description="TOML file with further settings, which variables replace; default: slmops.toml under home."
    )
    store: StoreSettings = StoreSettings()
    foundry: FoundrySettings = FoundrySettings()
    serve: ServeSettings = ServeSettings()
    catalog: CatalogSettings = CatalogSettings()
    gate: GateSettings = GateSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    benchmark: BenchmarkSettings = BenchmarkSettings()
    sweep: SweepSettings = SweepSettings()
    soak: SoakSettings = SoakSettings()
    timeout: TimeoutSettings = TimeoutSettings()
    machine: MachineSettings = MachineSettings()
    worker: WorkerSettings = WorkerSettings()
    notices: NoticeSettings = NoticeSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment, the files of `secrets_dir`, the settings file, in that order, and no `.env`."""
        sources = [init_settings, env_settings]
        if folder := _secrets_dir():
            sources.append(
                NestedSecretsSettingsSource(file_secret_settings, secrets_dir=folder, secrets_dir_missing="error")
            )
        if content := _settings_of_file():
            sources.append(InitSettingsSource(settings_cls, content))
        return tuple(sources)

    @property
    def home_dir(self) -> Path:
        """The home directory as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def user_cache_dir(self) -> Path:
        """The user's cache as an absolute path."""
        return self.user_cache.expanduser().absolute()

    @property
    def store_uri(self) -> str:
        """URI of the store: `SLMOPS_STORE__URI`, or the `file://` URI of the local folder."""
        return self.store.uri or (self.home_dir / "store").as_uri()

    @property
    def foundry_dir(self) -> Path:
        """The directory for `foundry cache cd`."""
        return (self.foundry.cache_dir or self.home_dir / "foundry").expanduser().absolute()

    @property
    def cache_dir(self) -> Path:
        """Files that can be made again: folders of child processes, logs, builds that are not yet in a version."""
        return self.home_dir / "cache"

    @property
    def threads(self) -> int:
        """Compute threads of a child process."""
        return self.machine.threads or psutil.cpu_count(logical=False) or os.cpu_count() or 1


def load_settings() -> Settings:
    """Read the settings from the environment and the settings file; an empty variable counts as unset.

    Raises `BadInput` that names each variable which is not valid, with its value unless that may be a secret.
    """
    faults = "; ".join(near_misses([*_variables()], ENVIRONMENT_PREFIX, NESTED_DELIMITER))
    try:
        settings = Settings()
        if not (faults := faults or fault_of_home(settings.home)):
            return settings
    except ValidationError as error:
        faults = "; ".join(map(_told, error.errors()))
    except SettingsError as error:
        cause = error.__cause__
        faults = str(error)
        if isinstance(cause, json.JSONDecodeError):
            ours = ((name, value) for name, value in os.environ.items() if name.upper().startswith(ENVIRONMENT_PREFIX))
            named = [name for name, value in ours if value == cause.doc]
            faults = f"{', '.join(named) or error}: Input should be JSON, such as [128, 512]"
    except (OSError, UnicodeDecodeError) as error:
        faults = f"{_variable(('secrets_dir',))}: a file in it cannot be read: {error}"
    raise BadInput(f"Settings are not valid: {faults}.", "Correct or unset them.", code="settings-not-valid")


def _told(fault: ErrorDetails) -> str:
    named = _named(fault["loc"])
    if fault["type"] == "extra_forbidden":
        return not_a_setting(named, [*_variables()])
    return f"{named}: {fault['msg']}{found_value(fault)}"


def _named(location: tuple[int | str, ...]) -> str:
    """Return a setting's variable, or its name in the settings file if that is where its value comes from."""
    variable = _variable(location)
    in_file = _in_settings_file(location) and not any(
        _sets(name, value, variable) for name, value in os.environ.items()
    )
    return f"{'.'.join(map(str, location))} of {_settings_file()}" if in_file else variable


def _in_settings_file(location: tuple[int | str, ...]) -> bool:
    found: object = _settings_of_file()
    for part in location:
        if not isinstance(found, dict) or part not in found:
            return False
        found = found[part]
    return True


def _variables() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        keys = getattr(field.annotation, "model_fields", None)
        yield from (_variable((name, key)) for key in keys) if keys else [_variable((name,))]


def describe_settings(settings: Settings) -> Iterator[tuple[str, object, str, str]]:
    """Yield (variable, value, source, description) of each setting; secrets are masked."""
    files = _secret_files()
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if not isinstance(value, Section):
            yield _described((name,), value, field.description, files)
            continue
        for key, nested in type(value).model_fields.items():
            yield _described((name, key), getattr(value, key), nested.description, files)


def _described(
    location: tuple[str, ...], value: object, description: str | None, files: Mapping[str, str]
) -> tuple[str, object, str, str]:
    variable = _variable(location)
    shown = str(value) if isinstance(value, Path | SecretStr) else value
    source = "default"
    if any(found and _sets(name, found, variable) for name, found in os.environ.items()):
        source = "environment"
    elif any(_sets(name, found, variable) for name, found in files.items()):
        source = "file"
    elif _in_settings_file(location):
        source = SETTINGS_FILE
    return variable, shown, source, description or ""


def _secrets_dir() -> Path | None:
    return _path_of_environment("secrets_dir")


def _path_of_environment(setting: str) -> Path | None:
    variable = _variable((setting,))
    found = next((value for name, value in os.environ.items() if name.upper() == variable), "")
    return Path(found).expanduser() if found else None


def _settings_file() -> Path | None:
    """Return the settings file: the named one, or that of the home directory if there is one."""
    if named := _path_of_environment("settings_file"):
        return named
    with suppress(OSError, RuntimeError):  # a home that cannot be used: `fault_of_home` says why
        home = _path_of_environment("home") or user_data_path("slmops", appauthor=False)
        return path if (path := home / SETTINGS_FILE).is_file() else None
    return None


def _settings_of_file() -> dict[str, Any]:
    path = _settings_file()
    known = {name: getattr(field.annotation, "model_fields", ()) for name, field in Settings.model_fields.items()}
    return read_settings_file(path, known) if path else {}


def _secret_files() -> dict[str, str]:
    folder = _secrets_dir()
    return NestedSecretsSettingsSource.load_secrets(folder.resolve()) if folder else {}


def _sets(name: str, found: str, variable: str) -> bool:
    section, _, key = variable.removeprefix(ENVIRONMENT_PREFIX).partition(NESTED_DELIMITER)
    if key and name.upper() == ENVIRONMENT_PREFIX + section:  # a whole section as one JSON object
        return key.lower() in json.loads(found)
    return name.upper() == variable


def _variable(location: tuple[int | str, ...]) -> str:
    return ENVIRONMENT_PREFIX + NESTED_DELIMITER.join(str(part) for part in location).upper()
