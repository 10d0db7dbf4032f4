"""Tests of embedding shards."""

import pytest


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Let faiss use one thread, as its threads wait for each other on a busy machine."""
    from cn_clip.shards import building, training

    for module in (building, training):
        monkeypatch.setattr(module, "usable_cpus", lambda: 1)
