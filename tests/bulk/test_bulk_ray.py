"""The Ray engine: the same shards as on this machine, whatever dies. It needs Ray."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from bulk.runs import manifests_in, plan_in, rows_in, run_in, write_images

from cn_clip.bulk import shard as module
from cn_clip.bulk.engines.base import Task
from cn_clip.bulk.engines.ray import RayEngine
from cn_clip.bulk.run import run
from cn_clip.bulk.shard import planned_shards
from cn_clip.bulk.store import open_store
from cn_clip.cli import run as cli
from cn_clip.data.ray_cluster import Cluster
from cn_clip.errors import CNClipError, UsageError

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]  # warnings of Ray


@pytest.fixture(autouse=True)
def fresh():
    pytest.importorskip("ray")
    yield
    planned_shards.cache_clear()
    module._embedder.cache_clear()


def test_actors_write_what_one_process_writes(tmp_path, tiny_checkpoint):
    images = write_images(tmp_path / "images", 10)
    plan_in(tmp_path / "ray", tiny_checkpoint, images, shards_of=2)
    out = tmp_path / "ray"
    assert cli(["bulk", "run", str(out), "--engine", "ray", "--workers", "2"]) == 0
    plan_in(tmp_path / "alone", tiny_checkpoint, images, shards_of=2)
    run_in(tmp_path / "alone")
    ours, theirs = rows_in(out), rows_in(tmp_path / "alone")
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-5)


def test_a_killed_actor_costs_its_shard_one_more_attempt(tmp_path, tiny_checkpoint):
    out = tmp_path / "out"
    plan_in(out, tiny_checkpoint, write_images(tmp_path / "images", 24), shards_of=2)
    killed = []

    def kill(report):
        for note in (out / ".work" / "notes").glob("*.json"):
            if report.done in (2, 5) and len(killed) < 2:
                killed.append(json.loads(note.read_text())["pid"])
                os.kill(killed[-1], signal.SIGKILL)

    store = open_store(str(out))
    report = run(store, RayEngine(Cluster(2)), Task(str(out), retries=5), on_progress=kill)
    assert report.failures == 0 and len(rows_in(out)) == 24
    attempts = sum(each["attempt"] for each in manifests_in(out).values())
    assert attempts - 12 <= len(killed)


def test_a_driver_whose_ray_ends_says_so_and_the_next_one_goes_on(tmp_path, tiny_checkpoint):
    out = tmp_path / "out"
    plan_in(out, tiny_checkpoint, write_images(tmp_path / "images", 400), shards_of=1)

    def kill(report):
        if report.done == 1:
            for path in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
                for child in path.read_text().split():
                    if Path(f"/proc/{child}/comm").read_text().strip() == "raylet":
                        os.kill(int(child), signal.SIGKILL)

    task = Task(str(out), retries=5)
    with pytest.raises(CNClipError, match="Ray has ended"):
        run(open_store(str(out)), RayEngine(Cluster(1)), task, on_progress=kill)
    report = run(open_store(str(out)), RayEngine(Cluster(1)), task)
    assert report.earlier >= 1 and report.failures == 0 and len(rows_in(out)) == 400


def test_an_actor_with_another_version_is_refused(tmp_path, tiny_checkpoint):
    out = tmp_path / "out"
    plan_in(out, tiny_checkpoint, write_images(tmp_path / "images", 2))
    path = out / "plan_00000.json"
    values = json.loads(path.read_text()) | {"version": "0.0.1"}
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="planned with"):
        run(open_store(str(out)), RayEngine(Cluster(1)), Task(str(out)))
