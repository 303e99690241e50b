"""Finding the calibration of a model where none is named: bundled, in the model's folder, or on the Hub."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantcache.artifact.calibration import SUBFOLDER, Calibration
from quantcache.artifact.files import CONFIG_NAME
from quantcache.artifact.index import bundled_index, find_entry, read_index
from quantcache.common import compat
from quantcache.common.errors import ArtifactError, HubError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NothingFound(ArtifactError):
    """There is no calibration of a model where one was looked for."""


@dataclass(frozen=True)
class Found:
    """A calibration that was found.

    Attributes:
        calibration: The calibration.
        source: Where it is from, for people to read.
    """

    calibration: Calibration
    source: str


def find_calibration(model: PreTrainedModel, *, hub: bool = False) -> Found:
    """Find a model's calibration by the model's id: in the index, in its own folder and, if asked, on the Hub.

    Args:
        model: The model.
        hub: Also download: what the index has on the Hub, and what the model's own repository carries.

    Returns:
        The calibration, not yet compared with the model.

    Raises:
        NothingFound: There is none. The message says where it was looked for, and how to make one.
        ArtifactError: The calibration that was found is damaged.
        HubError: The Hub refuses, or cannot be reached.
    """
    name = compat.model_id(model)
    if not name:
        raise NothingFound(f"a model without a name has no calibration to be found by it: {_how_to('MODEL')}")
    folder = Path(name)
    if any((place / CONFIG_NAME).is_file() for place in (folder, folder / SUBFOLDER)):
        return Found(Calibration.from_pretrained(folder), f"the one in the model's folder {folder}")
    entries, revision = read_index(bundled_index()), compat.model_revision(model)
    try:
        entry = find_entry(entries, name, revision)
    except ArtifactError as error:
        if os.path.isdir(name) or not hub:
            look = "" if hub or os.path.isdir(name) else ", hub=True also looks on the Hub"
            raise NothingFound(f"{error}: {_how_to(name)}{look}") from None
        return _in_repository(name, revision)
    if entry.folder is None and not hub:
        raise NothingFound(f"the calibration of {name} is on the Hub, in {entry.repo}: hub=True downloads it")
    source = "the one that comes with quantcache" if entry.folder is not None else f"{entry.repo} on the Hub"
    return Found(Calibration.for_model(name, revision=revision), source)


def _in_repository(name: str, revision: str | None) -> Found:
    """What a model's own repository carries: beside these weights, else the newest."""
    source = f"the one in {name} on the Hub"
    if revision is not None:
        with suppress(HubError):  # it may have come later than these weights
            return Found(Calibration.from_pretrained(name, revision=revision), source)
    try:
        return Found(Calibration.from_pretrained(name), source)
    except ArtifactError as error:
        raise NothingFound(f"no calibration of {name} comes with quantcache, and {error}: {_how_to(name)}") from error


def _how_to(name: str) -> str:
    return f"'quantcache calibrate {shlex.quote(name)} --text FILE -o calibration/' makes one"
