"""The Hugging Face Hub: downloads and uploads, each failure one clear error.

Cache, tokens, offline mode and endpoint are huggingface_hub's own (``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``,
``HF_ENDPOINT``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from quantcache.common.errors import ArtifactError, HubError

LIBRARY = "quantcache"
COMMIT_DIGITS = 40

_Result = TypeVar("_Result")


class FileNotOnHub(HubError):
    """A repository is there and has no such file."""


def require_repo_id(name: str | Path) -> str:
    """Refuse a name that is neither a folder nor a valid repository id.

    Args:
        name: What was asked for.

    Returns:
        The repository id.

    Raises:
        ArtifactError: The name is not a valid repository id.
    """
    try:
        if isinstance(name, Path):
            raise HFValidationError  # a path is never a repository
        validate_repo_id(name)
    except HFValidationError:
        raise ArtifactError(f"there is no folder {name}, and it is not a valid Hub repository id") from None
    return name


def download(
    repo_id: str, filename: str, *, subfolder: str | None = None, revision: str | None = None, **options: Any
) -> Path:
    """Download one file, or find it in the cache.

    Args:
        repo_id: Hub repository, ``owner/name``.
        filename: Name of the file inside the repository or subfolder.
        subfolder: Folder inside the repository.
        revision: Branch, tag or commit.
        options: ``token``, ``cache_dir``, ``force_download`` and ``local_files_only`` of ``hf_hub_download``.

    Returns:
        The file, complete.

    Raises:
        FileNotOnHub: The repository has no such file.
        HubError: The download failed.
    """
    what = f"{subfolder}/{filename}" if subfolder else filename
    return checked(
        lambda: Path(
            hf_hub_download(repo_id, filename, subfolder=subfolder, revision=revision, library_name=LIBRARY, **options)
        ),
        repo_id,
        revision,
        what,
    )


def commit_of(path: Path) -> str | None:
    """The commit that a downloaded file is of.

    Args:
        path: What :func:`download` returned.

    Returns:
        The commit, after which the Hub's cache names its folders; None for a file from elsewhere.
    """
    for parent, name in pairwise(path.parts):
        if parent == "snapshots" and len(name) == COMMIT_DIGITS and set(name) <= set("0123456789abcdef"):
            return name
    return None


def download_model(repo_id: str, *, revision: str | None = None, ignore: list[str], **options: Any) -> Path:
    """Download a model's repository, or find it in the cache.

    Args:
        repo_id: Hub repository, ``owner/name``.
        revision: Branch, tag or commit.
        ignore: Patterns of files that are not wanted.
        options: ``token``, ``cache_dir`` and ``local_files_only`` of ``snapshot_download``.

    Returns:
        A folder, named after its commit.

    Raises:
        HubError: The download failed.
    """
    return checked(
        lambda: Path(
            snapshot_download(repo_id, revision=revision, ignore_patterns=ignore, library_name=LIBRARY, **options)
        ),
        repo_id,
        revision,
        "the model",
    )


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    message: str,
    private: bool | None = None,
    replacing: Sequence[str] = (),
) -> str:
    """Upload a folder in one commit, creating the repository where there is none.

    Args:
        folder: Local folder; its files go to the root of the repository.
        repo_id: Hub repository, ``owner/name``.
        message: Title of the commit.
        private: Whether a new repository is private.
        replacing: Patterns of files that the repository has no more afterwards, but for those of the folder.

    Returns:
        The commit's URL.

    Raises:
        HubError: The Hub refuses, or cannot be reached.
    """

    def push() -> str:
        api = HfApi(library_name=LIBRARY)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        patterns = list(replacing) or None
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=patterns)
        return str(commit.commit_url)

    return checked(push, repo_id, None, "the folder")


def check_push(repo_id: str) -> None:
    """Refuse a push that cannot succeed, before the work that it is for.

    Args:
        repo_id: Hub repository, ``owner/name``.

    Raises:
        ArtifactError: The name is not a valid repository id.
        HubError: The Hub cannot be reached, nobody is logged in, or the repository is somebody else's.
    """
    try:
        owner, slash, _ = require_repo_id(repo_id).partition("/")
    except ArtifactError as error:
        raise ArtifactError(f"cannot push to {repo_id}: repositories on the Hub are called OWNER/NAME") from error

    def who() -> set[str]:
        found = HfApi(library_name=LIBRARY).whoami()
        return {str(found["name"]), *(str(org["name"]) for org in found.get("orgs") or ())}

    names = checked(who, repo_id, None, "the upload")
    if slash and owner not in names:
        raise HubError(f"cannot push to {repo_id}: the token belongs to {', '.join(sorted(names))}, not to {owner}")


def checked(action: Callable[[], _Result], repo_id: str, revision: str | None, what: str) -> _Result:
    """Run something that talks to the Hub, with every way it can fail in one line.

    Args:
        action: What to do.
        repo_id: The repository, for the error.
        revision: Its revision, for the error.
        what: What is transferred, for the error.

    Returns:
        What the action returns.

    Raises:
        FileNotOnHub: The repository has no such file.
        HubError: Anything else went wrong.
    """
    where = f"{repo_id} at revision {revision}" if revision else repo_id
    try:
        return action()
    except LocalTokenNotFoundError as error:
        raise HubError(f"{what} of {where} needs a login: call 'hf auth login', or set HF_TOKEN") from error
    except GatedRepoError as error:
        raise HubError(f"{where} is gated: request access on its page, then log in or pass a token") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"the Hub has no repository {repo_id}, or it is private and the token has no access") from error
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # it was reached, and refused
            raise _answered(error.__cause__, where, what) from error
        message = f"{what} of {where} is not in the local cache, and the Hub is unreachable or offline mode is on"
        raise HubError(message) from error
    except EntryNotFoundError as error:
        raise FileNotOnHub(f"{where} has no {what}") from error
    except HfHubHTTPError as error:
        raise _answered(error, where, what) from error
    except Exception as error:
        # Connections that break, files that come short, disks that fill up: the client's own classes differ by version.
        raise HubError(f"transfer of {what} of {where} failed: {_first_line(error)}") from error


def _answered(error: HfHubHTTPError, where: str, what: str) -> HubError:
    status = getattr(error.response, "status_code", None)
    if status == 401:
        return HubError(f"the Hub rejected the token for {where} (401): log in, or pass another token")
    return HubError(f"the Hub answered {status} for {what} of {where}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
