"""The settings of the servers, `slmops serve` and `slmops catalog`, and of a Prefect server's workers and notices."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr

PREFECT_TAG = "slmops"  # of every deployment and run of slmops in Prefect

Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]


class Section(BaseModel):
    """A section of the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ServeSettings(Section):
    """The server of models, `slmops serve`."""

    token: SecretStr | None = Field(
        None, description="Token that clients send as their API key; required on addresses other than loopback."
    )
    max_concurrency: int = Field(2, ge=1, le=1024, description="Requests that one model answers concurrently.")
    max_queue: int = Field(64, ge=0, le=100_000, description="Requests that may wait for one model; more get a 429.")
    max_request_bytes: int = Field(16_000_000, ge=1024, description="Largest request body.")
    max_memory_bytes: int | None = Field(
        None, ge=1, description="Memory of all loaded models; the least recently used ones are unloaded. Default: none."
    )
    load_timeout_s: Seconds = Field(600, description="Longest time for loading a model.")
    request_timeout_s: Seconds = Field(600, description="Longest wait for a model's next piece of an answer.")
    drain_s: Seconds = Field(60, description="Longest wait for running requests at a stop or a hand-over.")
    follow_s: float = Field(
        10, ge=0, le=86_400, description="Seconds between checks of the store for a new champion; 0: no checks."
    )
    receive_timeout_s: Seconds = Field(30, description="Longest time for a request's header, and for its body.")
    max_connections: int = Field(512, ge=1, le=100_000, description="Open connections; more are closed at once.")
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Host names that requests may use besides localhost and IP addresses; default: any with a token.",
    )
    allowed_origins: tuple[str, ...] = Field(
        (), description="Origins of web pages that may send requests, such as http://localhost:3000; default: none."
    )


class CatalogSettings(Section):
    """The private catalog."""

    token: SecretStr | None = Field(
        None,
        min_length=16,
        description="Token that a URL of the catalog must contain as ?token=; required for serving other machines.",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Host names that requests may use besides localhost and IP addresses; default: any with a token.",
    )
    allowed_origins: tuple[str, ...] = Field(
        (), description="Origins of web pages that may send requests; default: none."
    )


class WorkerSettings(Section):
    """Flow runs on the workers of a Prefect server."""

    pool: str | None = Field(
        None,
        min_length=1,
        description="Work pool on whose workers deploys build variants; default: in their own process.",
    )
    measure_pool: str | None = Field(
        None, min_length=1, description="Work pool on whose workers variants are measured; default: the one of `pool`."
    )
    builds: int = Field(1, ge=1, le=64, description="Concurrent builds under one home directory; others wait.")
    lost_after_s: Seconds = Field(
        90, ge=60, description="Silence after which a run has crashed; signs come every 30 s."
    )
    pending_s: Seconds = Field(
        120, description="A variant's run that a worker accepted and did not start in this time is started again."
    )


class NoticeSettings(Section):
    """Notices of failed runs and of regressions."""

    webhook_url: SecretStr | None = Field(
        None, description="URL to which Prefect posts notices as JSON, set up by `slmops up`; default: no notices."
    )
    block: str | None = Field(
        None,
        pattern=r"^[a-z0-9-]+/[a-z0-9-]+$",
        description="Prefect's notification block for notices, TYPE/NAME, such as slack-webhook/team; default: none.",
    )
