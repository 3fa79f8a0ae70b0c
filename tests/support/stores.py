"""The stores that the same tests run against: a local folder, and two S3 servers.

rclone takes part because it knows no conditional writes and verifies no checksums, SeaweedFS because it does both, as
AWS does. moto, a third one, serves the tests of S3's own behaviour (test_s3_servers, test_s3_resume).
"""

import uuid
from dataclasses import dataclass
from pathlib import Path

from slmops.infra.settings import Settings, StoreSettings
from slmops.infra.storage.objects import ObjectStore
from slmops.infra.storage.opening import open_object_store, open_registry
from slmops.infra.storage.registry import ModelRegistry
from tests.support.s3_servers import S3Server

KINDS = ("file", "rclone", "seaweedfs")
BUCKET = "slmops"  # one for all of a server: SeaweedFS keeps each in volumes of its own, and has only so many


@dataclass(frozen=True)
class StoreCase:
    """One empty store: its address, and on S3 the server that holds it."""

    uri: str
    server: S3Server | None

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.server.kind if self.server else "file"

    def environment(self, endpoint_url: str | None = None) -> dict[str, str]:
        """The settings that name this store, for a process; `endpoint_url` may be a proxy's."""
        variables = {"SLMOPS_STORE__URI": self.uri}
        if self.server:
            variables |= {
                "SLMOPS_STORE__ENDPOINT_URL": endpoint_url or self.server.endpoint_url,
                "SLMOPS_STORE__ACCESS_KEY_ID": self.server.access_key_id,
                "SLMOPS_STORE__SECRET_ACCESS_KEY": self.server.secret_access_key,
            }
        return variables

    def settings(self, home: Path, endpoint_url: str | None = None, **store: object) -> Settings:
        """The settings that name this store, with a home directory."""
        values: dict[str, object] = {"uri": self.uri}
        if self.server:
            values |= {
                "endpoint_url": endpoint_url or self.server.endpoint_url,
                "access_key_id": self.server.access_key_id,
                "secret_access_key": self.server.secret_access_key,
            }
        return Settings(home=home, store=StoreSettings.model_validate({**values, **store}))

    def open(self, home: Path) -> ObjectStore:
        """Open the store anew, as another process would."""
        return open_object_store(self.uri, self.settings(home))

    def registry(self, home: Path) -> ModelRegistry:
        """Open its registry anew; what is fetched is cached under the home directory."""
        return open_registry(self.settings(home))


def empty_store(folder: Path, server: S3Server | None) -> StoreCase:
    """Return a new store: in a folder that does not exist yet, or under a new prefix of the server's bucket."""
    if server is None:
        return StoreCase(folder.as_uri(), None)
    server.ensure_bucket(BUCKET)
    return StoreCase(f"s3://{BUCKET}/{uuid.uuid4().hex[:16]}/models", server)
