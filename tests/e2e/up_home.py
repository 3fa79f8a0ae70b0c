"""The start of `slmops up` with a home of the previous version, in a foreign folder."""

from pathlib import Path
from typing import Any

from prefect.workers.process import ProcessWorker

from tests.conftest import unmeasured_environment
from tests.support.prefect_api import call
from tests.support.prefect_server import prefect_server

SECRET = "a-secret-that-was-kept"
BEFORE = {  # of the package whose folders lay at the top
    "deploy": "flows.deploy.deploy",
    "gc": "flows.gc.gc",
}
NIGHTLY = {"cron": "0 4 * * *", "timezone": "Europe/Berlin"}


def make_home_of_the_version_before(home: Path) -> None:
    """A home of the previous version: an open API, deployments of its modules, files that everybody may read."""
    folder = home / "prefect"
    folder.mkdir(parents=True)
    with prefect_server(folder, unmeasured_environment()) as url:

        def make(path: str, **body: Any) -> Any:
            return call("POST", f"{url}{path}", body)

        template = ProcessWorker.get_default_base_job_template()
        make("/work_pools/", name="slmops", type="process", base_job_template=template)
        for name, entrypoint in BEFORE.items():
            schedules = [{"schedule": NIGHTLY, "active": False, "slug": "mine"}] if name == "gc" else []
            make(
                "/deployments/",
                name=name,
                flow_id=make("/flows/", name=name)["id"],
                entrypoint=entrypoint,
                version="0.1.0",
                tags=["slmops"],
                work_pool_name="slmops",
                pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": "."}}],
                job_variables={"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}},
                schedules=schedules,
            )
        make("/block_types/install_system_block_types")
        secret = call("GET", f"{url}/block_types/slug/secret")["id"]
        schema = make("/block_schemas/filter", block_schemas={"block_type_id": {"any_": [secret]}})[0]["id"]
        make("/block_documents/", name="kept", data={"value": SECRET}, block_type_id=secret, block_schema_id=schema)
    folder.chmod(0o755)
    for path in folder.glob("prefect.db*"):
        path.chmod(0o644)


def hostile_folder(folder: Path) -> Path:
    """A folder, such as a checkpoint's, whose modules and settings of Prefect's leave a file `ran` behind."""
    folder.mkdir()
    touch = f"open({str(folder / 'ran')!r}, 'a').write(__name__)\n"
    for name in ("infra", "slmops", "prefect", "queue", "sitecustomize"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(touch)
    (folder / ".env").write_text(f"PREFECT_LOGGING_SETTINGS_PATH={folder / 'logging.yml'}\n")
    (folder / "prefect.toml").write_text('[api]\nurl = "http://127.0.0.1:9/api"\n')
    (folder / "pyproject.toml").write_text("[tool.prefect.flows]\ndefault_retries = 7\n")
    handler = f"{{'()': os.system, command: \"touch '{folder / 'ran'}'\"}}"
    (folder / "logging.yml").write_text(
        f"version: 1\ndisable_existing_loggers: false\nhandlers:\n  hostile: {handler}\nloggers: {{}}\n"
    )
    return folder
