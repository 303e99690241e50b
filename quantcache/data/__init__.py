"""The small model and the two texts that come with quantcache."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

BUNDLED_MODEL = "wiki11m"
"""What the bundled model is called, wherever it is installed."""


def _resource(*parts: str) -> Path:
    path = Path(str(files(__name__).joinpath(*parts)))
    if not path.exists():
        raise FileNotFoundError(f"bundled data is missing: {path} does not exist; reinstall quantcache")
    return path


def demo_model_path() -> Path:
    """Directory of wiki11m, the bundled 11M-parameter Llama with its tokenizer.

    Returns:
        A directory that ``from_pretrained`` takes.

    Raises:
        FileNotFoundError: The installation lacks the weights.
    """
    return _resource(BUNDLED_MODEL, "model.safetensors").parent


def calibrations_path() -> Path:
    """Directory of the index of calibrations, of the recipes, and of the bundled model's calibration.

    Returns:
        The directory, ``calibrations/`` of a checkout.

    Raises:
        FileNotFoundError: The installation lacks the index.
    """
    return _resource("calibrations", "index.json").parent


def measurements_path() -> Path:
    """The figures of the newest benchmark records, made from them by ``benchmarks/tables.py``.

    Returns:
        The file.

    Raises:
        FileNotFoundError: The installation lacks it.
    """
    return _resource("measurements.json")


def text_path(name: str) -> Path:
    """A bundled text.

    Args:
        name: Name of a file in ``quantcache/data/texts``.

    Returns:
        The file.

    Raises:
        FileNotFoundError: No bundled text has that name.
    """
    return _resource("texts", name)


def calibration_text() -> str:
    """Wikipedia articles to calibrate on, never to evaluate on.

    Returns:
        About 290,000 characters; articles end with two blank lines.

    Raises:
        FileNotFoundError: The installation lacks the text.
    """
    return _resource("texts", "wiki_calibration.txt").read_text(encoding="utf-8")


def evaluation_text() -> str:
    """Wikipedia articles to evaluate on, which neither the bundled model nor a calibration has seen.

    Returns:
        About 120,000 characters; articles end with two blank lines.

    Raises:
        FileNotFoundError: The installation lacks the text.
    """
    return _resource("texts", "wiki_evaluation.txt").read_text(encoding="utf-8")
