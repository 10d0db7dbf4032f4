"""Work on a Ray cluster: the output of one process, byte for byte. It needs Ray."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from data.formats import jpeg
from shards.shard_folders import clustered, unit, write_shards

from cn_clip.cli import run as cli
from cn_clip.data.process_map import parallel_map
from cn_clip.data.ray_cluster import Cluster
from cn_clip.data.shard import write_shard
from cn_clip.data.sources.tar import Sample
from cn_clip.errors import DataError, UsageError
from cn_clip.shards.building import Options, build_index
from cn_clip.shards.index import INDEX

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]  # warnings of Ray

TWO = Cluster(2)
RAY = ["--engine", "ray", "--workers", "2"]
ALONE = ["--workers", "0"]


@pytest.fixture(scope="module", autouse=True)
def needs_ray():
    pytest.importorskip("ray")


@pytest.fixture(scope="module")
def connected():
    """Connect once for many tests."""
    with TWO.connected():
        yield


# Functions of functions: those of this module could not be imported in an actor.


def slow_square():
    def square(number):
        time.sleep(0.05 if number % 7 == 0 else 0)
        return number * number

    return square


def killed(folder, always=False):
    """Return a function that ends its process: always, or the first time."""

    def run(number):
        mark = Path(folder, str(number))
        if number == 3 and (always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    return run


def test_ray_leaves_the_handler_of_sigterm_as_it_was():
    def ours(number, frame):
        raise AssertionError(number)

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with TWO.connected():
            assert signal.getsignal(signal.SIGTERM) is ours
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ray_that_a_busy_machine_could_not_start_is_started_again():
    """Ray waits 30 seconds for its raylet; here the first one is stopped."""
    stopped = []

    def stop():
        while not stopped:
            for path in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
                for child in path.read_text().split():
                    if Path(f"/proc/{child}/comm").read_text().strip() == "raylet":
                        os.kill(int(child), signal.SIGSTOP)
                        stopped.append(int(child))
            time.sleep(0.005)

    threading.Thread(target=stop, daemon=True).start()
    with Cluster(1).connected() as ray:
        assert stopped and ray.is_initialized()
        assert ray.available_resources()["CPU"] >= 1


def test_a_cluster_maps_in_the_order_of_the_jobs(connected):
    with parallel_map(slow_square(), TWO) as run:
        assert list(run(range(60))) == [number * number for number in range(60)]
        assert list(run([])) == []


def test_an_error_of_the_function_is_raised_as_it_was(connected):
    def refuse(number):
        raise UsageError(f"number {number}")

    with parallel_map(refuse, TWO) as run, pytest.raises(UsageError, match=r"^number 5$"):
        list(run([5, 6]))


def test_a_job_whose_actor_is_killed_runs_again(connected, tmp_path):
    with parallel_map(killed(tmp_path), TWO) as run:
        assert list(run(range(8))) == list(range(8))
    assert (tmp_path / "3").exists()


def test_a_job_that_always_kills_its_actor_is_one_error(connected, tmp_path, capsys):
    always = killed(tmp_path, always=True)
    with parallel_map(always, TWO) as run, pytest.raises(DataError, match="again and again"):
        list(run(range(8)))
    time.sleep(1)  # Ray prints in a thread
    assert capsys.readouterr().out == ""


def test_actors_that_wait_for_room_do_not_hold_up_the_others(connected):
    with parallel_map(slow_square(), Cluster(50)) as run:
        assert list(run(range(20))) == [number * number for number in range(20)]


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def train(tmp_path):
    """300 pairs in two shards, in more than one job of each kind; some repeat, one is damaged."""
    for number in range(2):
        samples = [
            Sample(jpeg(image % 280), ".jpg", f"{image}", [(f"t{image}", f"第{image % 250}句话")])
            for image in range(number, 300, 2)
        ]
        samples[7] = replace(samples[7], image=jpeg(7)[:200])
        write_shard(tmp_path / f"{number}.tar", samples)
    return f"tar:{tmp_path}/*.tar"


def test_a_check_on_a_cluster_prints_what_one_process_prints(connected, train, capsys):
    printed = []
    for engine in (ALONE, RAY):
        cli(["data", "check", train, "--json", *engine])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and '"image": 2' in printed[0]


def test_a_pack_on_a_cluster_has_the_bytes_of_one_process(connected, train, tmp_path):
    for name, engine in (("alone", ALONE), ("ray", RAY)):
        out = str(tmp_path / name)
        assert cli(["data", "pack", train, "--out", out, "--images-per-shard", "40", *engine]) == 1
    alone, cluster = files_of(tmp_path / "alone"), files_of(tmp_path / "ray")
    assert alone == cluster and len(alone) == 9


def test_decontamination_on_a_cluster_writes_the_bytes_of_one_process(connected, train, tmp_path):
    test = tmp_path / "test"
    test.mkdir()
    (test / "a.jpg").write_bytes(jpeg(3))
    (test / "a.txt").write_text("第200句话", encoding="utf-8")
    for name, engine in (("alone", ALONE), ("ray", RAY)):
        out = str(tmp_path / f"{name}.jsonl")
        cli(["data", "decontaminate", train, "--against", str(test), "--out", out, *engine])
    alone, cluster = ((tmp_path / f"{name}.jsonl").read_bytes() for name in ("alone", "ray"))
    assert alone == cluster and alone.count(b"\n") == 1 + 2 + 1  # by its image, by its caption


def test_an_index_built_on_a_cluster_is_that_of_one_process(connected, tmp_path, monkeypatch):
    from cn_clip.shards import encoding

    monkeypatch.setattr(encoding, "_PART_ROWS", 500)
    built = {}
    for name, workers in (("alone", 0), ("ray", TWO)):
        folder = write_shards(tmp_path / name, clustered(2000), 250)
        build_index(folder, lambda: clustered(64, seed=2), Options(workers=workers))
        built[name] = {
            path: content
            for path, content in files_of(folder / INDEX).items()
            if not path.endswith((".npz", ".lock"))  # an archive holds the time
        }
    assert built["alone"].keys() == built["ray"].keys()
    assert sum(name.endswith(".rows.npy") for name in built["ray"]) == 4
    for name, content in built["alone"].items():
        if name.endswith(".npy"):
            assert content == built["ray"][name], name


def test_lists_of_kept_images_made_on_a_cluster_are_those_of_one_process(connected, tmp_path):
    vectors = clustered(1200)
    vectors[1000:] = vectors[:200]  # copies
    texts = unit(vectors + clustered(1200, seed=5))
    folder = write_shards(tmp_path / "shards", vectors, 100, text_emb=texts)
    build_index(folder, lambda: clustered(64, seed=2), Options())
    for command in (["dedupe"], ["filter", "--share", "0.3"]):
        kept = []
        for name, engine in (("alone", ALONE), ("ray", RAY)):
            out = tmp_path / f"{command[0]}-{name}.jsonl"
            words = ["bulk", command[0], str(folder), "--out", str(out), *command[1:], *engine]
            assert cli(words) == 0
            kept.append(out.read_bytes())
        assert kept[0] == kept[1] and 100 < kept[0].count(b"\n") < 1100
