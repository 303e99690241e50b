"""Whether the Hub can be asked at all: found out once, so that nobody waits for its client's retries.

The client tries every file of a model six times, for half a minute each, before it says that there is no network. Where
the first answer does not come, this process takes what is in the Hub's cache, as ``HF_HUB_OFFLINE=1`` has it.
"""

from __future__ import annotations

import functools
import os
from difflib import get_close_matches
from pathlib import Path

from quantcache.cli.pages import WrongUsage
from quantcache.cli.terminal import report
from quantcache.common.errors import QuantCacheError
from quantcache.common.sources import OURS, PACKAGED, is_gguf
from quantcache.data import BUNDLED_MODEL

OFFLINE = "HF_HUB_OFFLINE is set"

SECONDS = 10.0
"""How long the Hub may take to answer at all."""


@functools.cache
def hub_problem() -> str | None:
    """Why the Hub cannot be asked; where that is found out, the Hub's client goes offline.

    Returns:
        A clause; None if it answers.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # the client's classes differ by version
        constants.HF_HUB_OFFLINE = True
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"{constants.ENDPOINT} cannot be reached ({reason})"
    return None


def expect_model(name: str, revision: str | None = None) -> None:
    """Refuse a model that is neither here nor can be asked for, before anything is loaded.

    Args:
        name: Folder, file, Hub id or a name of ours.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: The name can only be meant as a path, and does not exist.
        QuantCacheError: The folder holds no model; or the Hub cannot be asked, and its cache does not have the model.
        WrongUsage: A revision is given of what is not on the Hub.
    """
    if revision is not None and (is_gguf(name) or name in (BUNDLED_MODEL, *PACKAGED) or Path(name).exists()):
        raise WrongUsage(f"{name} is on this machine, which has no revision {revision} of it: leave that out")
    if is_gguf(name):
        return  # whoever reads it says what is wrong
    require_folder(name)
    if name == BUNDLED_MODEL or name in PACKAGED:
        return
    if Path(name).exists():
        _require_config(Path(name))
        return
    problem = hub_problem()
    if problem is None:
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            if problem != OFFLINE:
                _note(f"{problem}: {name} is taken from the Hub's cache")
            return
        at = f" at revision {revision}" if revision else ""
        missing = f"the Hub's cache does not have it{at}, and {problem}"
    except HFValidationError:
        missing = "it is no Hub id"
    meant = get_close_matches(name, (BUNDLED_MODEL, *PACKAGED), 1)
    hint = f"; did you mean {meant[0]}?" if meant else ""
    raise QuantCacheError(f"cannot load {name}: there is no such folder or file; {OURS.rstrip('.')}; {missing}{hint}")


@functools.cache
def _note(message: str) -> None:
    """Say something once: a model is looked for before torch is loaded, and again where its files are."""
    report("note", message)


def _require_config(folder: Path) -> None:
    """Refuse a folder that transformers would ask for a ``model_type``, and say what it holds instead."""
    from quantcache.artifact.files import CONFIG_NAME as CALIBRATION

    if not folder.is_dir() or (folder / "config.json").exists():
        return
    if (folder / CALIBRATION).exists():
        raise QuantCacheError(f"{folder} is a calibration, not a model: give the model that it was made for")
    if (folder / "adapter_config.json").exists():
        raise QuantCacheError(f"{folder} is an adapter, not a model: merge it into its base model, and give that")
    raise QuantCacheError(f"{folder} is not a model's folder: missing config.json")


def require_folder(name: str) -> None:
    """Refuse what can only be meant as a path and does not exist.

    Args:
        name: Folder or Hub id.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)
    if looks_like_path and not Path(name).exists():
        raise FileNotFoundError(f"there is no folder {name}")
