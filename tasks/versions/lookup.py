"""The store and the versions that a run begins with."""

from slmops.infra.storage.version import Version
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import workshop


@stage("check store", run_name="check-store")
def check_store() -> None:
    """Raise `BadInput` for a store that cannot be reached."""
    workshop().registry.objects.check()


@stage("find version", run_name="find-{reference}")
def find_version(reference: str) -> Version:
    """Return the version that `NAME`, `NAME@VERSION` or `NAME@ALIAS` names; raises `BadInput` if there is none."""
    return workshop().registry.find(reference)
