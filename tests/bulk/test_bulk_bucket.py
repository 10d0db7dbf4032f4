"""A bucket as the output: exactly once, though requests fail and stall."""

import json
import subprocess
import threading
import time
from contextlib import suppress
from random import Random

import numpy as np
import pytest
from bulk.runs import command, request_of, run_in, write_images
from data.object_server import serving
from data.test_index import write_shards
from obstore.store import MemoryStore
from pyarrow import parquet

from cn_clip.bulk import lease, run, summary
from cn_clip.bulk import shard as module
from cn_clip.bulk.engines.base import Outcome, Task
from cn_clip.bulk.plan import read_plans
from cn_clip.bulk.planning import make_plan
from cn_clip.bulk.shard import planned_shards, run_shard
from cn_clip.bulk.status import status_of
from cn_clip.bulk.store import bucket as bucket_store
from cn_clip.bulk.store import open_store
from cn_clip.bulk.store.base import BusyError
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
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with store.lock("driver.lock"), refused:
        monkeypatch.setattr(time, "time", lambda: 4e9)  # the clock of another machine
        with store.lock("driver.lock"):
            pass
    start = time.monotonic()
    with store.lock("driver.lock"):  # it was given back
        assert time.monotonic() - start < 0.5
    store.note(".work/locks/driver.lock", other_driver())
    start = time.monotonic()
    with store.lock("driver.lock"):
        assert time.monotonic() - start >= 0.6


def other_driver():
    """Return the lock of a process that does not renew it."""
    return json.dumps({"token": "other", "holder": "{}"}).encode()


def test_a_lock_that_another_process_has_taken_is_not_given_back(server):
    store = open_store(OUT)
    with store.lock("driver.lock") as lost:
        store.note(".work/locks/driver.lock", other_driver())
    assert store.read(".work/locks/driver.lock") == other_driver()
    with store.lock("driver.lock") as lost:
        assert not lost.wait(0.3)
        store.note(".work/locks/driver.lock", other_driver())
        assert lost.wait(2)
    assert store.read(".work/locks/driver.lock") == other_driver()


def test_a_lock_is_given_back_though_the_answer_to_its_renewal_was_lost(server):
    store = open_store(OUT)
    with store.lock("driver.lock"):
        server.faults["run/.work/locks/driver.lock"] = ["reset"]
        time.sleep(0.3)
    start = time.monotonic()
    with store.lock("driver.lock"):
        assert time.monotonic() - start < 0.5


def test_a_driver_that_lost_its_lock_stops(server, tmp_path, tiny_checkpoint):
    plan_in(tiny_checkpoint, write_images(tmp_path / "a", 6), shards_of=1)
    given = []

    def engine(task, shards):
        for number in shards:
            given.append(number)
            yield Outcome(number)
            if number == 1:
                open_store(OUT).note(".work/locks/driver-0-of-1.lock", other_driver())
                time.sleep(0.5)

    with pytest.raises(BusyError, match="another process drives s3://bucket/run now"):
        run.run(open_store(OUT), engine, Task(OUT))
    assert given == [0, 1]


def test_a_portion_whose_driver_is_gone_ends_for_the_driver_of_all(server):
    store = open_store(OUT)
    for index in range(20):
        store.note(f".work/locks/driver-{index}-of-64.lock", other_driver())
    start = time.monotonic()
    with run.driving(store):
        assert 0.6 <= time.monotonic() - start < 3  # not one after the other
    with run.driving(store, run.Portion(3, 64)):
        pass


def files_of(folder, mark, quarantine):
    """Write the files of an attempt, each of which holds its mark."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"quarantine/00000.jsonl": None, "img_emb/img_emb_00000.npy": folder / "img"}
    files["metadata/metadata_00000.parquet"] = folder / "metadata"
    if quarantine:
        files["quarantine/00000.jsonl"] = folder / "quarantine"
    for file in files.values():
        if file is not None:
            file.write_bytes(mark)
    return files


def assert_whole(store, content):
    """Check that a manifest has all files of its attempt, and no other."""
    mark = content[:1]
    assert store.read("manifests/00000.json") == content
    for name in ("img_emb/img_emb_00000.npy", "metadata/metadata_00000.parquet"):
        assert store.read(name) == mark
    assert store.read("quarantine/00000.jsonl") == (mark if b"quarantine" in content else None)


MANIFEST = "manifests/00000.json"


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("contents", [(b"1 quarantine", b"2"), (b"1", b"2 quarantine")])
def test_files_of_two_attempts_are_never_mixed_wherever_one_pauses_or_dies(
    tmp_path, monkeypatch, is_killed, contents
):
    """Before each request of the first attempt, the second one is made from start to end."""
    first, second = contents
    sent, pause_at = 0, 0

    def attempt(content):
        files = files_of(tmp_path / content[:1].decode(), content[:1], b"quarantine" in content)
        return store.complete(MANIFEST, content, files)

    def counted(name, send):
        nonlocal sent
        sent += 1
        if sent == pause_at:
            assert_whole(store, attempt(second))
            if is_killed:
                raise KeyboardInterrupt
        return remote.request(name, send)

    monkeypatch.setattr(bucket_store, "request", counted)
    wins, is_paused = [], True
    while is_paused:
        bucket = MemoryStore()
        monkeypatch.setattr(bucket_store, "locate", lambda url, to=bucket: (to, url[5:]))
        store = open_store(OUT)
        sent, pause_at = 0, len(wins) + 1
        with suppress(KeyboardInterrupt):
            assert_whole(store, attempt(first))
        is_paused, pause_at = sent >= pause_at, 0
        wins.append(store.completed(MANIFEST))
        assert_whole(store, wins[-1])
        if not is_killed:
            assert not [each for page in bucket.list("bucket/run/.work") for each in page]
    assert wins[0] == second and wins[-1] == first and len(wins) > 8


def test_a_commit_of_a_dead_worker_is_ended_by_one_process_or_two(tmp_path, monkeypatch):
    """Before each request of the one, the other ends it from start to end."""
    sent, pause_at = 0, 0

    def counted(name, send):
        nonlocal sent
        sent += 1
        if sent == pause_at:
            assert store.completed(MANIFEST) == b"1"
        return remote.request(name, send)

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(bucket_store, "request", counted)
    pauses, is_paused = 0, True
    while is_paused:
        bucket = MemoryStore()
        monkeypatch.setattr(bucket_store, "locate", lambda url, to=bucket: (to, url[5:]))
        store = open_store(OUT)
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(bucket_store.BucketStore, "_end", die)
            store.complete(MANIFEST, b"1", files_of(tmp_path, b"1", quarantine=False))
        assert store.read(MANIFEST) is None
        pauses += 1
        sent, pause_at = 0, pauses
        assert store.completed(MANIFEST) == b"1"
        is_paused, pause_at = sent >= pause_at, 0
        assert_whole(store, b"1")
        assert not [each for page in bucket.list("bucket/run/.work") for each in page]
    assert pauses > 8


def test_a_late_worker_leaves_the_files_of_a_done_shard_alone(
    server, tmp_path, tiny_checkpoint, monkeypatch
):
    plan_in(tiny_checkpoint, write_images(tmp_path / "a", 3))
    embed, late = module._embed, []

    def slow(*args):
        """Another process, whose vectors round differently, begins and finishes meanwhile."""
        parts = embed(*args)
        if not late:
            late.append(True)
            run_shard(OUT, 0)
            return {stem: part + np.float32(1e-4) for stem, part in parts.items()}
        return parts

    monkeypatch.setattr(module, "_embed", slow)
    manifest = run_shard(OUT, 0)
    assert manifest == run_shard(OUT, 0)
    assert verify(open_store(OUT), checksums=True).complete
    assert not list((server.folder / "run/.work").rglob("*.*"))


def test_discarding_ends_what_was_begun_and_removes_what_came_too_late(
    server, tmp_path, tiny_checkpoint
):
    plan_in(tiny_checkpoint, write_images(tmp_path / "a", 3), shards_of=1)
    store = open_store(OUT)
    manifest = run_shard(OUT, 0)
    content, files = store.read("manifests/00000.json"), list(manifest.files)
    for name in files:  # as if its worker had died before it copied them
        staged = f".work/staged/00000-{'0' * 16}-{name.rpartition('/')[2]}"
        store.note(staged, store.read(name))
        store.remove(name)
    commit = {"token": "0" * 16, "content": content.decode(), "files": files, "absent": []}
    store.note(".work/commits/00000.json", json.dumps(commit).encode())
    store.remove("manifests/00000.json")
    lost = commit | {"token": "1" * 16}
    store.note(".work/commits/00001.json", json.dumps(lost).encode())
    with pytest.raises(DataError, match="bulk resume"):
        run_shard(OUT, 1)
    store.note(f".work/staged/00000-{'2' * 16}-img_emb_00000.npy", b"late")
    store.note(f".work/staged/00002-{'2' * 16}-img_emb_00002.npy", b"half")
    found = verify(store)
    assert (found.done, found.leftovers) == (0, 4)
    found = verify(store, checksums=True, discard=True)
    assert (found.done, found.damages, found.leftovers) == (1, 0, 1)
    assert found.orphans == [f".work/staged/00000-{'2' * 16}-img_emb_00000.npy"]
    assert not verify(store).orphans
    assert run_in(OUT).done == 2 and verify(store, checksums=True).complete


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


def test_manifests_of_a_bucket_are_read_once(server, tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(summary, "_WORTH", 1)
    plan_in(tiny_checkpoint, write_images(tmp_path / "a", 3), shards_of=1)
    run_in(OUT)
    first = status_of(open_store(OUT))
    server.requests.clear()
    assert status_of(open_store(OUT)) == first and verify(open_store(OUT)).complete
    assert not [path for _method, path in server.requests if "manifests/" in path]
    path = server.folder / "run/manifests/00001.json"
    path.write_text(path.read_text().replace('"attempt": 1', '"attempt": 5'))
    assert status_of(open_store(OUT)).attempts == first.attempts + 4


def test_plans_of_a_bucket_are_read_without_listing_its_files(server, tmp_path, tiny_checkpoint):
    plan_in(tiny_checkpoint, write_images(tmp_path / "a", 3))
    server.requests.clear()
    assert [plan.number for plan in read_plans(open_store(OUT))] == [0]
    assert set(server.requests) == {
        ("GET", "run/plan_00000.json"), ("GET", "run/plan_00001.json"),
    }  # fmt: skip
