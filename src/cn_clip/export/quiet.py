"""Other libraries kept quiet: their progress lines, logs and warnings about their own internals."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Silence stdout, warnings, and logs below errors of the root logger and ``loggers``."""
    root = logging.getLogger()
    handler = logging.NullHandler()  # without one, logging.warning() adds one for good
    root.addHandler(handler)
    levels = {logger: logger.level for logger in (root, *map(logging.getLogger, loggers))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as null,
            contextlib.redirect_stdout(null),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)
        for logger, level in levels.items():
            logger.setLevel(level)
