"""These tests run in a process of their own; see ``tests/test_exports.py``."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder to ``tests/test_exports.py``, unless a path is given to pytest."""
    return True if config.args_source is pytest.Config.ArgsSource.TESTPATHS else None
