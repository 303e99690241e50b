"""What is said once."""

from __future__ import annotations

import functools
import logging


@functools.cache
def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log a message the first time that a process has it to say.

    Args:
        logger: Who says it.
        level: Such as ``logging.WARNING``.
        message: The message.
    """
    logger.log(level, message)
