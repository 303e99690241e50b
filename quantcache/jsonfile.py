"""Results as JSON: strict, and written complete or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


def to_json(data: Any) -> str:
    """Serialize a result; numbers that JSON cannot hold (infinite, not a number) become null.

    Args:
        data: The result.

    Returns:
        Indented JSON.
    """
    return json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False)


def finite(data: Any) -> Any:
    """A copy of a result in which numbers that JSON cannot hold are None.

    Args:
        data: The result.

    Returns:
        Dicts, lists and values of the same structure.
    """
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path, data: Any) -> None:
    """Write a result, complete or not at all.

    Args:
        path: The file; its folder must exist.
        data: The result.
    """
    write_file(path, (to_json(data) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all.

    Args:
        path: The file; its folder must exist.
        content: What is to be in it.
    """
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.close()
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # temporary files are made readable by their owner only
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
