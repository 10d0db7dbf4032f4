"""An index run started from the page: its state, its errors, and who may start it."""

import os
import time

import pytest
from serve.servers import Settings, make_library, photo, serving

from cn_clip.serve.index_run import IndexRuns, main


@pytest.fixture
def library(tmp_path, tiny_checkpoint):
    return make_library(tmp_path, tiny_checkpoint, 2)


def test_a_run_adds_images_and_leaves_its_counts(library, tmp_path):
    runs = IndexRuns(library, tmp_path)
    assert runs.state() == {}
    (tmp_path / "photos" / "new.jpg").write_bytes(photo(7))
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no image")
    assert main(str(library), str(tmp_path / "index.json")) == 0
    state = runs.state()
    assert not state["running"] and "error" not in state
    assert (state["new"], state["failed"], state["done"], state["total"]) == (1, 1, 2, 2)


def test_a_run_that_fails_says_why(tmp_path):
    assert main(str(tmp_path / "none"), str(tmp_path / "index.json")) == 1
    assert "none" in IndexRuns(tmp_path, tmp_path).state()["error"]


def test_a_run_whose_process_is_gone_is_not_running(tmp_path):
    process = os.posix_spawn("/bin/true", ["true"], os.environ)
    state = f'{{"running": true, "pid": {process}}}'
    (tmp_path / "index.json").write_text(state)
    deadline = time.monotonic() + 5
    while IndexRuns(tmp_path, tmp_path).state()["running"]:
        assert time.monotonic() < deadline
    (tmp_path / "index.json").write_text('{"running": true, "pid": "x"}')
    assert not IndexRuns(tmp_path, tmp_path).state()["running"]


def test_only_the_owner_allows_runs(library):
    with serving(Settings(library=str(library), image_batch=1)) as client:
        assert client.post("/v1/library/index").status_code == 403
        assert client.get("/v1/library").json()["may_index"] is False


def test_a_run_is_started_once_and_the_server_sees_its_images(library, tmp_path, monkeypatch):
    import subprocess
    import sys

    started = []

    def start(runs):
        """Index at once, instead of in a process that takes seconds to start."""
        main(str(runs.library), str(runs.run_folder / "index.json"))
        process = subprocess.Popen([sys.executable, "-c", ""])
        started.append(process)
        return process

    monkeypatch.setattr(IndexRuns, "start", start)
    settings = Settings(
        library=str(library), image_batch=1, allow_index=True, run_folder=str(tmp_path)
    )
    with serving(settings) as client:
        before = client.get("/v1/library").json()
        assert before["may_index"] and before["images"] == 2 and before["index"] is None
        (tmp_path / "photos" / "new.jpg").write_bytes(photo(7))
        assert client.post("/v1/library/index").status_code == 202
        after = client.get("/v1/library").json()
        assert after["images"] == 3 and after["index"]["new"] == 1
        paths = [hit["path"] for hit in client.get("/v1/search?q=x").json()["hits"]]
        assert "photos/new.jpg" in paths
    for process in started:
        process.wait()
