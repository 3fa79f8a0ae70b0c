"""Fetch a checkpoint from the Hugging Face Hub, in a child process whose environment keeps telemetry off."""

import functools
import os
from pathlib import Path

from pydantic import Field, SecretStr

from slmops.infra.checkpoints.source import check_hub_id
from slmops.infra.errors import BadInput, PassingFault
from slmops.infra.process.call import Call, OnProgress, Progress
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.settings import Settings

DEADLINE_S = 4 * 3600
# Only safetensors weights and the files that describe them: pickles and Python code are never fetched.
ALLOWED_FILES = ("*.safetensors", "*.json", "*.jsonl", "*.jinja", "*.model", "*.txt", "README.md")
CONNECT_TIMEOUT_S = 5


def fetch_from_hub(
    repo_id: str,
    revision: str | None,
    settings: Settings,
    *,
    token: SecretStr | None = None,
    files: tuple[str, ...] = ALLOWED_FILES,
    on_progress: OnProgress | None = None,
) -> Path:
    """Download `OWNER/NAME` at `revision` (branch, tag, commit; None: the default branch) and return its folder.

    The revision is resolved to a commit first and all files are of that commit, which is the folder's name. They are in
    Hugging Face's own cache, so a second call does not download them. `files` are the patterns of their names; `token`
    defaults to the login of Hugging Face's tools. `HF_HUB_OFFLINE=1` in the environment is respected: then only the
    cache is read.

    Raises `BadInput` for an id or revision that is malformed, missing or not accessible to this user, and without
    network; `PassingFault` if the download fails.
    """
    check_hub_id(repo_id, revision)
    work_dir = settings.cache_dir / "hub"
    result = run_in_child(
        DownloadSnapshot(
            repo_id=repo_id,
            revision=revision,
            token=token.get_secret_value() if token else None,
            files=files,
        ),
        deadline_s=DEADLINE_S,
        log_path=work_dir / f"{repo_id.replace('/', '--')}.log",
        work_dir=work_dir,
        on_progress=on_progress,
        environment={
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
            "HF_HUB_ETAG_TIMEOUT": str(CONNECT_TIMEOUT_S),
        },
    )
    return result.value


class DownloadSnapshot(Call[Path]):
    """Download the files of `repo_id` at `revision` whose names match `files`; the answer is their folder."""

    repo_id: str
    revision: str | None
    token: str | None = Field(repr=False)
    files: tuple[str, ...]

    def perform(self, progress: Progress) -> Path:
        """See `fetch_from_hub`."""
        return _download(self, progress)


def _download(call: DownloadSnapshot, progress: Progress) -> Path:
    from huggingface_hub import errors, snapshot_download

    repo_id, revision = call.repo_id, call.revision
    progress(0, 1, f"downloading {repo_id}")
    fetch = functools.partial(
        snapshot_download, repo_id, revision=revision, token=call.token, etag_timeout=CONNECT_TIMEOUT_S
    )
    try:
        directory = fetch(allow_patterns=list(call.files))
        if call.files == ALLOWED_FILES and not _has_weights(Path(directory)):
            gguf = _only_gguf(repo_id, Path(directory).name, call.token)
            directory = fetch(allow_patterns=[*call.files, *gguf])
    except errors.GatedRepoError:
        raise BadInput(
            f"The Hub refuses {repo_id} to this user: the model is gated.",
            "Accept its terms on its page and log in with `hf auth login`.",
            code="hub-gated",
        ) from None
    except errors.RepositoryNotFoundError:
        raise BadInput(
            f"The Hugging Face Hub has no model {repo_id}, or it is private.",
            "Correct OWNER/NAME, log in with `hf auth login`, or give a folder.",
            code="hub-model-missing",
        ) from None
    except errors.RevisionNotFoundError:
        raise BadInput(
            f"{repo_id} has no revision {revision!r}.",
            "Give a branch, a tag or a commit of it.",
            code="hub-revision-missing",
        ) from None
    except errors.HfHubHTTPError as error:
        raise PassingFault(
            f"The Hugging Face Hub failed to send {repo_id} (HTTP status {error.response.status_code}).",
            "Try again.",
            code="hub-failed",
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError):
        raise BadInput(
            f"{repo_id} is not a local folder, and the Hugging Face Hub cannot be reached.",
            "Connect to the network (and unset HF_HUB_OFFLINE), or give the folder of a downloaded checkpoint.",
            code="hub-unreachable",
        ) from None
    progress(1, 1, f"downloaded {repo_id}")
    return Path(directory)


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", ".gguf") for path in folder.iterdir())


def _only_gguf(repo_id: str, commit: str, token: str | None) -> list[str]:
    """Return the GGUF file of a repository without other weights, if it has one; raises `BadInput` for several."""
    from huggingface_hub import list_repo_files

    names = list_repo_files(repo_id, revision=commit, token=token)
    found = [name for name in names if name.endswith(".gguf") and "/" not in name and not name.startswith("mmproj")]
    if len(found) > 1:
        raise BadInput(
            f"{repo_id} has {len(found)} GGUF files and no other weights: {', '.join(found[:5])}.",
            f"Download the one to deploy, and give its path: hf download {repo_id} {found[0]}.",
            code="gguf-several",
        )
    return found
