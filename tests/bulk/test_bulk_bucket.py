"""A bucket as the output: exactly once, though requests fail and stall."""

import json
import subprocess
import threading
import time
from random import Random

import numpy as np
import pytest
from bulk.runs import command, request_of, run_in, write_images
from data.object_server import serving
from data.test_index import write_shards
from pyarrow import parquet

from cn_clip.bulk import lease, run
from cn_clip.bulk import shard as module
from cn_clip.bulk.planning import make_plan
from cn_clip.bulk.shard import planned_shards, run_shard
from cn_clip.bulk.status import status_of
from cn_clip.bulk.store import BusyError, open_store
from cn_clip.bulk.verify import verify
from cn_clip.cli import run as cli
from cn_clip.data.sources import remote
from cn_clip.errors import DataError

OUT = "s3://bucket/run"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Forget stores, plans and models of other tests; wait less."""
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "_TIMEOUT", 0.6)
    monkeypatch.setattr(lease, "RENEWAL", 0.1)
    monkeypatch.setattr(lease, "PATIENCE", 0.6)
    monkeypatch.setattr(lease, "_POLL", 0.05)
    remote._asked.clear()
    remote._store.cache_clear()
    yield
    for cached in (planned_shards, module._embedder, remote._store, remote._blocks):
        cached.cache_clear()


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "bucket"
    folder.mkdir()
    with serving(folder) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        yield server


def plan_in(model, *sources, **options):
    return make_plan(open_store(OUT), request_of(model, *sources, **options))


def test_a_run_into_a_bucket_is_whole_though_requests_fail_and_stall(
    server, tmp_path, tiny_checkpoint
):
    (server.folder / "in").mkdir()
    write_shards(server.folder / "in", 6)
    server.stall = 0.8  # more than the client waits
    server.random, server.failure_rate = Random(0), 0.05
    plan_in(tiny_checkpoint, "tar:s3://bucket/in/*.tar", shards_of=4)
    report = run_in(OUT)
    assert (report.failures, report.rows) == (0, 30)
    assert verify(open_store(OUT), checksums=True).complete
    server.random = None
    ids = []
    for path in sorted((server.folder / "run" / "metadata").glob("*.parquet")):
        ids += parquet.read_table(path)["caption"].to_pylist()
    assert ids == [f"第{shard}片第{n}张图" for shard in range(6) for n in range(5)]
    status = status_of(open_store(OUT))
    assert (status.done, status.rows_out, status.running) == (8, 30, 0)


def test_listings_of_many_pages_are_whole(server):
    server.page = 7
    store = open_store(OUT)
    for number in range(40):
        store.note(f"manifests/{number:05}.json", b"{}")
    store.note("manifests/below/x", b"")
    names = [entry.name for entry in store.entries("manifests")]
    assert names == [f"{number:05}.json" for number in range(40)]
    assert list(store.entries("none")) == []


def test_of_several_writers_one_creates_a_file(server):
    store = open_store(OUT)
    results = []

    def create(number):
        results.append(store.create("x", f"{number}".encode()))

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]


def test_a_creation_whose_answer_was_lost_counts(server):
    server.faults["run/x"] = ["reset"]
    store = open_store(OUT)
    assert store.create("x", b"mine")
    assert not store.create("x", b"other") and store.read("x") == b"mine"


def test_a_large_file_arrives_whole(server, tmp_path):
    content = np.random.default_rng(0).bytes(12 << 20)
    (tmp_path / "file").write_bytes(content)
    store = open_store(OUT)
    store.publish("large", tmp_path / "file")
    assert store.read("large") == content
    assert store.read("large", 5 << 20, (5 << 20) + 9) == content[5 << 20 :][:9]
    store.remove("large")
    assert store.read("large") is None
    store.remove("large")


def test_a_driver_that_renews_its_lock_keeps_it_and_a_dead_one_loses_it(server, monkeypatch):
    store = open_store(OUT)
    refused = pytest.raises(BusyError, match="another process runs")
    with store.lock("driver.lock"), refused, store.lock("driver.lock"):
        pass
    with store.lock("driver.lock"):  # it was given back
        pass
    store.note(".work/driver.lock", json.dumps({"token": "dead", "holder": "{}"}).encode())
    start = time.monotonic()
    with store.lock("driver.lock"):
        assert time.monotonic() - start >= 0.6
    assert store.read(".work/driver.lock") is None


def test_two_processes_on_one_shard_cannot_both_finish_it(server, tmp_path, tiny_checkpoint):
    plan_in(tiny_checkpoint, write_images(tmp_path / "a", 3))
    create = module.manifest_name
    other = {}

    def meanwhile(number):
        """Another process finishes the shard just before this one does."""
        if "done" not in other and other.setdefault("calls", 0) == 2:
            other["done"] = True
            planned_shards.cache_clear()
            run_shard(OUT, 0)
        other["calls"] = other.get("calls", 0) + 1
        return create(number)

    module.manifest_name = meanwhile
    try:
        with pytest.raises(DataError, match="at the same time"):
            run_shard(OUT, 0)
    finally:
        module.manifest_name = create
    assert run_shard(OUT, 0).attempt >= 1
    assert verify(open_store(OUT)).complete


def test_a_bucket_that_does_not_answer_is_an_error(server, tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(remote, "_ATTEMPTS", 2)
    server.faults["*"] = [500] * 50
    assert cli(["bulk", "status", OUT]) == 1
    assert "s3://bucket/run" in capsys.readouterr().err
    assert run.missing_shards is not None


@pytest.mark.full
def test_worker_processes_into_a_bucket_that_fails_are_exactly_once(
    server, tmp_path, tiny_checkpoint
):
    (server.folder / "in").mkdir()
    write_shards(server.folder / "in", 40)
    plan_in(tiny_checkpoint, "tar:s3://bucket/in/*.tar", shards_of=7)
    server.stall = 2.0
    server.random, server.failure_rate = Random(1), 0.02
    words = command("run", OUT, "--workers", 2, "--retries", 0)
    assert subprocess.run(words, timeout=300).returncode == 0
    assert subprocess.run(command("verify", OUT, "--checksums"), timeout=300).returncode == 0
    server.random = None
    texts = []
    for path in sorted((server.folder / "run" / "metadata").glob("*.parquet")):
        texts += parquet.read_table(path)["caption"].to_pylist()
    assert texts == [f"第{shard}片第{n}张图" for shard in range(40) for n in range(5)]
    manifests = (server.folder / "run" / "manifests").glob("*.json")
    assert {json.loads(path.read_text())["attempt"] for path in manifests} == {1}


def test_more_inputs_are_a_second_plan_in_a_bucket_too(server, tmp_path, tiny_checkpoint):
    images = write_images(tmp_path / "a", 3)
    plan_in(tiny_checkpoint, images)
    assert plan_in(tiny_checkpoint, images) is None
    more = plan_in(tiny_checkpoint, images, write_images(tmp_path / "b", 2))
    assert (more.rows, more.number) == (2, 1)
