"""Checks of output files and folders before the work starts."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantcache.common.errors import CalibrationMismatch, QuantCacheError
from quantcache.common.writing import destination

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COMMON = {"README.md", "LICENSE"}


@contextlib.contextmanager
def output_folder(path: Path | None, own: tuple[str, ...] = ()) -> Iterator[None]:
    """A folder that results will be written into; it is made now, and taken away again if nothing comes of it.

    Args:
        path: The folder; nothing is done if None.
        own: Files of which a folder that is not empty must have one; any folder will do without them.

    Yields:
        Nothing.

    Raises:
        QuantCacheError: The folder holds something else.
        OSError: The folder cannot be written to.
    """
    if path is None:
        yield
        return
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: give a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        held = sorted(
            each.name for each in path.iterdir() if not each.name.startswith(".") and each.name not in _COMMON
        )
        if own and held and not any((path / name).exists() for name in own):
            raise QuantCacheError(
                f"{path} holds {held[0]} and none of {', '.join(own)}: give a new or empty folder, or the model's own"
            )
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty
        raise


def holds_calibration(folder: Path, model: PreTrainedModel, name: str, overwrite: bool) -> bool:
    """Whether a folder holds a calibration that a new one would replace; one of another model is refused.

    Args:
        folder: Where the new one is to go.
        model: The model that it will be of.
        name: What the user calls the model.
        overwrite: Take whatever calibration is there.

    Returns:
        Whether there is one.

    Raises:
        QuantCacheError: It is another model's, or cannot be read.
    """
    from quantcache.artifact.calibration import Calibration
    from quantcache.artifact.files import CONFIG_NAME

    if not (folder / CONFIG_NAME).exists():
        return False
    if overwrite:
        return True
    try:
        there = Calibration.from_pretrained(folder)
    except QuantCacheError as error:
        found = f"cannot be read ({error})"
    else:
        try:
            there.check_compatible(model, strict=True)
            return True
        except CalibrationMismatch as error:
            theirs = there.metadata.base_model.get("id") or "another model"
            found = f"is of {theirs} and does not belong to {name} ({error})"
    raise QuantCacheError(f"the calibration in {folder} {found}: give another folder, or --overwrite")


def check_output_file(path: Path) -> None:
    """Refuse a file that cannot be written, before the work is done.

    Args:
        path: File that will be written or replaced.

    Raises:
        OSError: Its folder is missing or cannot be written to, or it is no file.
    """
    folder = destination(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    with tempfile.TemporaryFile(dir=folder):
        pass
