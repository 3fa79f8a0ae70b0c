"""The store through the command line: whole deploys on S3, and every command that works on versions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from tests.e2e.conftest import OPEN_GATE, ROOT, SMALL, Slmops, SlmopsHere
from tests.e2e.test_deploy import INT4
from tests.support.s3_servers import S3Server
from tests.support.stores import StoreCase, empty_store
from tests.support.versions import store_version


# Random weights of another seed may not pass the gate: other defaults make another content, too.
def other_content(number: int) -> tuple[str, str]:
    """Options that make the version of a checkpoint another one per number."""
    return ("--model-config", f"top_p=0.{50 + number}")


ROWS = '{"id": 1, "messages": [{"role": "user", "content": "hello"}], "expected": "hi"}\n'


@pytest.fixture
def team(tmp_path: Path, seaweedfs: S3Server) -> StoreCase:
    """A team's store on S3, empty."""
    return empty_store(tmp_path / "team", seaweedfs)


def machine(folder: Path, server: str, store: StoreCase | None = None, **variables: str) -> Slmops:
    """The command line on a machine of its own, on the team's store or on its own."""
    named = store.environment() if store else {}
    return SlmopsHere(folder, {**OPEN_GATE, **SMALL, "PREFECT_API_URL": server, **named, **variables})


@pytest.mark.slow
def test_two_machines_deploy_at_once_to_one_store(team: StoreCase, tiny: Path, tmp_path: Path, server: str) -> None:
    machines = [machine(tmp_path / name, server, team) for name in ("left", "right")]
    running = []
    for index, slmops in enumerate(machines):
        command = [sys.executable, "-m", "slmops", "deploy", str(tiny), "--name", "home", *INT4]
        command += [*other_content(index), "--json"]
        running.append(subprocess.Popen(command, cwd=ROOT, env=slmops.variables(), stdout=subprocess.PIPE, text=True))
    reports = [json.loads(process.communicate(timeout=600)[0]) for process in running]
    assert [process.returncode for process in running] == [0, 0], reports
    assert {report["version"] for report in reports} == {1, 2}
    assert {report["status"] for report in reports} == {"registered"}
    third = machine(tmp_path / "third", server, team)
    models = third.json("list")["models"]
    assert [model["version"] for model in models] == [1, 2]
    assert len([model for model in models if "champion" in model["aliases"]]) == 1
    for number in (1, 2):
        assert third.json("verify", f"home@{number}")["ok"]


@pytest.mark.slow
def test_a_version_goes_around(team: StoreCase, tiny: Path, tmp_path: Path, server: str) -> None:
    laptop = machine(tmp_path / "laptop", server)
    report = laptop.json("deploy", tiny, "--name", "home", *INT4, "--training-run", "https://runs.example/42")
    assert (report["version"], report["aliases"]) == (1, ["champion"])
    shown = laptop.json("show", "home@1")
    assert shown["source"]["training_run"] == "https://runs.example/42"
    assert shown["builder"]["olive-ai"]
    assert "names no store besides this machine's own" in laptop.run("push", "home@1", status=2).stderr

    # To the team's store, twice, and from there to another machine
    pushing = machine(laptop.home, server, team)
    pushed = pushing.json("push", "home@1")
    assert pushed["is_new"]
    assert pushed["moved_bytes"] > 0
    assert pushed["uri"].startswith("s3://")
    again = pushing.json("push", "home@1")
    assert (again["is_new"], again["moved_bytes"]) == (False, 0)
    other = machine(tmp_path / "other", server, team)
    (listed,) = other.json("list")["models"]
    assert (listed["name"], listed["version"], listed["aliases"]) == ("home", 1, [])  # nobody there has judged it
    assert (listed["variants"][0]["status"], listed["says_origin"]) == ("registered", True)
    assert other.json("pull", "home@1")["is_new"]
    alone = machine(other.home, server)
    assert alone.json("verify", "home@1")["ok"]
    assert alone.json("show", "home@1")["digest"] == shown["digest"]

    # What was pulled is judged there anew, and not from the evidence that came along
    assert alone.json("show", "home@1")["says_origin"]
    judged = alone.json("regate", "home@1")
    assert not alone.json("show", "home@1")["says_origin"]
    assert judged["status"] == "registered"
    assert judged["foundry_model_id"] == "home:1"

    # To a machine without network
    packed = alone.json("export", "home", tmp_path / "home.tar")
    offline = machine(tmp_path / "offline", server)
    assert "SHA-256" in offline.run("import", tmp_path / "home.tar", "--sha256", "0" * 64, status=2).stderr
    assert offline.json("import", tmp_path / "home.tar", "--sha256", packed["sha256"])["is_new"]
    assert offline.json("verify", "home@1")["ok"]
    assert offline.json("list")["models"][0]["aliases"] == []
    promoted = offline.json("promote", "home@1")  # by somebody who trusts its origin; its proof is repeated
    assert (promoted["status"], promoted["former"]) == ("promoted", None)
    assert offline.json("list")["models"][0]["aliases"] == ["champion"]
    assert offline.json("show", "home@1")["says_origin"]
    assert "exists" in alone.run("export", "home", tmp_path / "home.tar", status=2).stderr

    # Another content under the same number
    mine = machine(tmp_path / "mine", server)
    assert mine.json("deploy", tiny, "--name", "home", *INT4, *other_content(1))["version"] == 1
    refused = machine(mine.home, server, team).run("push", "home@1", status=2).stderr
    assert "another home@1" in refused
    assert "--renumber" in refused
    renumbered = machine(mine.home, server, team).json("push", "home@1", "--renumber")
    assert (renumbered["version"], renumbered["is_new"]) == (2, True)
    compared = other.json("diff", "home@1", "home@2")
    assert not compared["same_content"]
    assert {"training run", "int4/genai_config.json"} <= {difference["what"] for difference in compared["differences"]}
    assert 0 < compared["shared_bytes"] < compared["size_bytes"]
    figures = other.json("show", "home@2")["deploy"]
    assert figures["variants"][0]["status"] == "registered"  # its evidence came along under its new number

    # Aliases, tags and notes are the store's
    other.run("alias", "home@2", "staging", "--reason", "to be tried")
    other.run("tag", "home@2", "team=kitchen", "language=en")
    other.run("tag", "home@2", "language=")
    other.run("note", "home@2", "answers faster")
    shown = pushing.json("show", "home@staging")
    assert (shown["version"], shown["tags"], shown["notes"][0]["text"]) == (2, {"team": "kitchen"}, "answers faster")
    other.run("alias", "home@2", "staging", "--remove")
    assert "names no version" in other.run("show", "home@staging", status=2).stderr
    assert "slmops promote home@2" in other.run("alias", "home@2", "champion", status=2).stderr

    # The bill of materials
    bill = json.loads(other.run("sbom", "home@1").stdout)
    assert bill["bomFormat"] == "CycloneDX"
    assert {"torch", "onnxruntime", "olive-ai"} <= {component["name"] for component in bill["components"]}


@pytest.mark.slow
def test_any_worker_reads_what_was_ingested(team: StoreCase, tiny: Path, tmp_path: Path, server: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROWS, "utf-8")
    sender = machine(tmp_path / "sender", server, team)
    checkpoint = sender.run("ingest", tiny).stdout.strip()
    evaluation = sender.run("ingest", rows).stdout.strip()
    assert sender.run("ingest", tiny).stdout.strip() == checkpoint
    worker = machine(tmp_path / "worker", server, team)
    report = worker.json("deploy", checkpoint, "--name", "home", *INT4, "--eval", evaluation)
    assert (report["status"], report["evaluation"].split()[0]) == ("registered", "1")
    assert worker.json("show", "home")["source"]["origin"] == checkpoint
    # An S3 address does as well
    assert team.server
    bucket = team.uri.split("/")[2]
    client = team.server.client()
    client.upload_file(str(rows), bucket, "evaluation/rows.jsonl")
    for path in tiny.iterdir():
        client.upload_file(str(path), bucket, f"checkpoints/tiny/{path.name}")
    same = worker.json(
        "deploy",
        f"s3://{bucket}/checkpoints/tiny",
        "--name",
        "home",
        *INT4,
        "--eval",
        f"s3://{bucket}/evaluation/rows.jsonl",
    )
    assert (same["status"], same["version"]) == ("unchanged", 1)
    for address in ("store://" + "0" * 64, "store://nonsense"):
        assert "store://" in worker.run("deploy", address, "--name", "home", status=2).stderr
    assert (
        "is a folder, not a file"
        in worker.run("deploy", checkpoint, "--name", "home", "--eval", checkpoint, status=2).stderr
    )
    worker.run("delete", evaluation, "--yes")
    assert worker.json("gc")["blobs"] == 1
    assert worker.json("verify", "home")["ok"]


@pytest.mark.slow
def test_only_signed_versions_are_registered_if_the_setting_requires_it(
    slmops: Slmops, tiny: Path, tmp_path: Path
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    pem = serialization.Encoding.PEM
    private.write_bytes(
        key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"the-password")
        )
    )
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    strict = {"SLMOPS_STORE__REQUIRE_SIGNATURE": "1"}
    assert "VERIFICATION_KEY" in slmops.run("deploy", tiny, "--name", "home", status=2, **strict).stderr
    strict["SLMOPS_STORE__VERIFICATION_KEY"] = str(public)
    report = slmops.json("deploy", tiny, "--name", "home", *INT4, status=1, **strict)
    assert "home@1 is not signed" in report["variants"][0]["error"]
    assert not slmops.json("show", "home@1")["signed"]

    signing = {"SLMOPS_STORE__SIGNING_KEY": str(private), "SLMOPS_STORE__SIGNING_KEY_PASSWORD": "the-password"}
    wrong = {**signing, "SLMOPS_STORE__SIGNING_KEY_PASSWORD": "another-password"}
    refused = slmops.run("sign", "home@1", status=2, **wrong)
    assert "another-password" not in refused.stderr + refused.stdout
    slmops.run("sign", "home@1", **signing)
    assert slmops.json("verify", "home@1", **strict)["signature"] == "valid"
    assert slmops.json("regate", "home@1", **strict)["status"] == "registered"

    # A version that is built with the key set is signed at once
    another = slmops.json("deploy", tiny, "--name", "home", *INT4, *other_content(1), **strict, **signing)
    assert (another["status"], another["version"]) == ("registered", 2)

    # Altered after it was signed: a file, then the manifest
    manifest = slmops.home / "store/models/home/1/manifest.json"
    files = json.loads(manifest.read_text())["variants"][0]["files"]
    named = next(file for file in files if file["path"] == "genai_config.json")
    blob = slmops.home / "store/blobs/sha256" / named["sha256"]
    content = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(content.replace(b" ", b"\t", 1))
    slmops.run("unregister", "home@1")
    (variant,) = slmops.json("regate", "home@1", status=1, **strict)["variants"]
    assert "genai_config.json is not what the version's manifest says" in variant["error"]
    found = slmops.json("verify", "home@1", status=1, **strict)
    assert [(damage["what"], damage["fault"]) for damage in found["damage"]] == [("int4/genai_config.json", "altered")]
    blob.write_bytes(content)
    manifest.write_text(manifest.read_text().replace("Qwen2ForCausalLM", "Qwen3ForCausalLM"))
    found = slmops.json("verify", "home@1", status=1, **strict)
    assert "manifest.json" in {damage["what"] for damage in found["damage"]}


@pytest.mark.slow
def test_gc_keeps_the_requested_versions_and_those_with_an_alias(slmops: Slmops, tiny: Path, tmp_path: Path) -> None:
    for number in range(2):
        slmops.json("deploy", tiny, "--name", "home", *INT4, *other_content(number))
    registry = ModelRegistry(LocalObjectStore(slmops.home / "store"))
    registry.set_alias("home", "candidate", store_version(registry, tmp_path / "third").version, "the newest")
    registered = slmops.home / "foundry" / "models" / "custom" / "home-int4"
    assert {path.name for path in registered.iterdir()} == {"v1", "v2"}
    orphan = slmops.home / "store/blobs/sha256" / ("0" * 64)
    orphan.write_bytes(b"nobody's")
    planned = slmops.json("gc", "--keep", "1", "--dry-run")
    assert planned["versions"] == ["home@2"]  # 1 is the champion, 3 the newest
    assert len(slmops.json("list")["models"]) == 3
    assert orphan.is_file()
    done = slmops.json("gc", "--keep", "1")
    assert {**planned, "dry_run": False} == {**done, "blobs": planned["blobs"], "freed_bytes": planned["freed_bytes"]}
    assert done["freed_bytes"] == pytest.approx(planned["freed_bytes"], rel=0.2)  # evidence, which is written compactly
    assert [model["version"] for model in slmops.json("list")["models"]] == [1, 3]
    assert not orphan.exists()
    for number in (1, 3):
        assert slmops.json("verify", f"home@{number}")["ok"]
    assert {path.name for path in registered.iterdir()} == {"v1"}
    assert "--keep is 0" in slmops.run("gc", "--keep", "0", status=2).stderr
    nothing = slmops.json("gc")
    assert (nothing["versions"], nothing["blobs"], nothing["freed_bytes"]) == ([], 0, 0)
