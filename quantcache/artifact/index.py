"""The index of published calibrations: which artifact belongs to which revision of which model."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcache import data
from quantcache.artifact import hub
from quantcache.artifact.files import ARTIFACT_FILES
from quantcache.common.errors import ArtifactError
from quantcache.common.jsonfile import read_json

INDEX_NAME = "index.json"
FORMAT = "quantcache-calibration-index"
SCHEMA_VERSION = "1.0"


@dataclass(frozen=True)
class IndexEntry:
    """One published calibration.

    Attributes:
        model: Hub id of the model calibrated, or a name of ours, such as ``wiki11m``.
        revision: Its commit; None where the model has none, like those of installed packages.
        repo: The artifact's repository, or None.
        artifact_revision: Commit of the repository that holds the artifact.
        folder: The artifact's folder where it comes with the index, or None.
        sha256: Digest of each of the artifact's files, by name.
    """

    model: str
    revision: str | None
    repo: str | None
    artifact_revision: str | None
    folder: Path | None
    sha256: dict[str, str]

    def files(self, **options: Any) -> list[Path]:
        """The artifact's files, each as the index says.

        Args:
            options: ``token``, ``cache_dir`` and ``local_files_only``, for an artifact on the Hub.

        Returns:
            Their paths, in the order of :data:`ARTIFACT_FILES`.

        Raises:
            ArtifactError: A file is missing or not the one published, or the download failed.
        """
        if self.folder is not None:
            paths = [self.folder / name for name in ARTIFACT_FILES]
        else:
            assert self.repo is not None
            options["revision"] = self.artifact_revision
            paths = [hub.download(self.repo, name, **options) for name in ARTIFACT_FILES]
        for path in paths:
            self.check(path)
        return paths

    def check(self, path: Path) -> None:
        """Compare a file with its digest.

        Args:
            path: File of the artifact, downloaded or local.

        Raises:
            ArtifactError: The digests differ, or the file does not exist.
        """
        if not path.is_file():
            raise ArtifactError(f"the index names a calibration in {path.parent}, which has no {path.name}")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256[path.name]:
            raise ArtifactError(
                f"{path.name} of {self.repo or self.folder} has SHA-256 {found}, the index says "
                f"{self.sha256[path.name]}: it is not the calibration that was published"
            )


def bundled_index() -> Path:
    """The index that comes with quantcache, ``calibrations/index.json``."""
    return data.calibrations_path() / INDEX_NAME


def bundled_calibrations() -> tuple[str, ...]:
    """Names of the models whose calibrations come with quantcache, those of the index that have a folder."""
    entries = read_index(bundled_index())
    return tuple(dict.fromkeys(entry.model for entry in entries if entry.folder is not None))


def no_such_folder(name: str) -> ArtifactError:
    """What to raise where a calibration is asked for by a name that is neither a folder nor a repository.

    Args:
        name: The name.

    Returns:
        The error; it says so where the name is that of a bundled calibration.
    """
    there = bundled_calibrations()
    hint = (
        f"the one that comes with quantcache is Calibration.for_model({name!r})"
        if name in there
        else f"make it with 'quantcache calibrate', or take one of {', '.join(there)} by Calibration.for_model()"
    )
    return ArtifactError(f"there is no folder {name}, and repositories on the Hub are called OWNER/NAME: {hint}")


def read_index(path: Path) -> list[IndexEntry]:
    """Read and check an index.

    Args:
        path: An ``index.json``.

    Returns:
        Its entries.

    Raises:
        ArtifactError: The index is missing or malformed.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a calibration index: its format must be {FORMAT!r}")
    version = str(content.get("schema_version"))
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ArtifactError(f"{path} has schema version {version}, this quantcache reads {SCHEMA_VERSION}")
    entries = content.get("calibrations")
    if not isinstance(entries, list):
        raise ArtifactError(f"{path}: calibrations must be a list, got {type(entries).__name__}")
    return [_entry(path, number, entry) for number, entry in enumerate(entries)]


def _entry(path: Path, number: int, entry: Any) -> IndexEntry:
    where = f"{path}: entry {number}"
    artifact = entry.get("artifact") if isinstance(entry, dict) else None
    if not isinstance(artifact, dict) or not isinstance(entry.get("model"), str):
        raise ArtifactError(f"{where} must have a model and an artifact")
    if ("repo" in artifact) == ("path" in artifact):
        raise ArtifactError(f"{where} must name either the repo or the path of its artifact")
    place, revision = artifact.get("repo", artifact.get("path")), entry.get("revision")
    if not isinstance(place, str) or not isinstance(revision, str | None):
        raise ArtifactError(
            f"{where} must name artifact and revision by strings, got {place!r:.60} and {revision!r:.60}"
        )
    sha256 = artifact.get("sha256")
    if not isinstance(sha256, dict) or sha256.keys() != set(ARTIFACT_FILES):
        raise ArtifactError(f"{where} must have a sha256 of each of {', '.join(ARTIFACT_FILES)}")
    for name, digest in sha256.items():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ArtifactError(f"{where}: sha256 of {name} must be 64 hexadecimal digits, got {digest!r}")
    if "repo" in artifact:
        for owner, key in ((entry, "revision"), (artifact, "revision")):
            if not isinstance(owner.get(key), str) or not re.fullmatch("[0-9a-f]{40}", owner[key]):
                raise ArtifactError(f"{where} must name commits of 40 hexadecimal digits, got {owner.get(key)!r}")
    folder = path.parent / artifact["path"] if "path" in artifact else None
    return IndexEntry(
        entry["model"], entry.get("revision"), artifact.get("repo"), artifact.get("revision"), folder, sha256
    )


def find_entry(entries: list[IndexEntry], model: str, revision: str | None) -> IndexEntry:
    """The calibration of a model.

    Args:
        entries: Entries of an index.
        model: Hub id, or a name of ours.
        revision: Its commit; None takes the last entry of the model.

    Returns:
        The entry.

    Raises:
        ArtifactError: The index has no calibration of the model.
    """
    of_model = [entry for entry in entries if entry.model == model]
    if not of_model:
        known = ", ".join(dict.fromkeys(entry.model for entry in entries)) or "nothing"
        raise ArtifactError(f"the index has no calibration of {model}; it has {known}")
    if revision is None:
        return of_model[-1]
    for entry in reversed(of_model):
        if entry.revision in (revision, None):
            return entry
    known = ", ".join(str(entry.revision) for entry in of_model)
    raise ArtifactError(f"the index has no calibration of {model} at revision {revision}; it has {known}")
