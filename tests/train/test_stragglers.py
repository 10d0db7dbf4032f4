"""A process or data worker that the others wait for is named."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tomli_w
import torch
from data.formats import jpeg
from train.runs import recipe_values

from cn_clip import distributed
from cn_clip.data.loading.loader import Loader, Preparation
from cn_clip.data.sources.base import Row
from cn_clip.data.sources.open import WeightedSource
from cn_clip.errors import CNClipError
from cn_clip.train.run.log import read_log
from cn_clip.train.stragglers import (
    ProcessTimes,
    StepTimes,
    long_waits_reported,
    slow_processes,
    slowest_worker,
)

EVEN = ProcessTimes(1.0, 0.01, 0.02, 0.5, -1, 0, 0)


class SlowInWorker:
    """Pairs whose images take longer in worker 1, as if its disk were slow."""

    name = "slow"

    def __init__(self, seconds):
        self.seconds, self.content = seconds, jpeg(0)

    def __len__(self):
        return 24

    def row(self, index):
        return Row("一只猫", str(index), str(index))

    def image(self, index):
        if torch.utils.data.get_worker_info().id == 1:
            time.sleep(self.seconds)
        return self.content

    def where(self, index):
        return f"slow, row {index}"


def loader_of(seconds):
    return Loader([WeightedSource(SlowInWorker(seconds))], Preparation(32), 4, workers=2)


def test_even_processes_are_not_named():
    assert not list(slow_processes([EVEN] * 4))
    assert not list(slow_processes([EVEN]))
    # all wait for data: none is slower than the others
    assert not list(slow_processes([EVEN._replace(data=0.8)] * 4))


def test_the_process_with_slow_forward_passes_is_named():
    ((rank, cause, message),) = slow_processes([EVEN, EVEN, EVEN._replace(forward=0.9), EVEN])
    assert (rank, cause) == (2, "forward")
    assert message.startswith("process 2 is slow: its forward pass takes 0.90 s, 1.8 times")


def test_the_process_that_waits_for_a_slow_worker_is_named_with_it():
    slow = EVEN._replace(data=0.4, longest_data=2, worker=3, worker_seconds=5, other_workers=1)
    ((rank, _, message),) = slow_processes([EVEN, slow])
    assert rank == 1
    assert message.startswith("process 1 waits 0.40 s a step for data (at most 2.00 s)")
    assert message.endswith("its worker 3 takes 5.00 s a batch, the others 1.00 s")


def test_the_slow_worker_of_a_single_process_is_named():
    slow = EVEN._replace(data=0.4, worker=0, worker_seconds=5, other_workers=1)
    assert [message for _rank, _cause, message in slow_processes([slow])] == [
        "a step waits 0.40 s for data; its worker 0 takes 5.00 s a batch, the others 1.00 s"
    ]
    assert not list(slow_processes([slow._replace(worker_seconds=1)]))


def test_a_batch_that_does_not_come_is_reported_with_its_worker():
    loader, messages = loader_of(0.2), []
    times = StepTimes(torch.device("cpu"))
    pids = set()
    with long_waits_reported(times, loader, messages.append, patience=0.15):
        for _ in times.waits(loader.batches(0)):
            pids.add(loader.next_worker)
    (pid,) = (pid for number, pid in pids if number == 1)
    assert any(f"for a batch of its worker 1 (process id {pid})" in text for text in messages)
    worker, seconds, others = slowest_worker(loader)
    assert worker == 1 and seconds >= 0.8 and others < 0.4


def test_processes_that_cannot_connect_are_told_why(monkeypatch):
    monkeypatch.setattr(distributed, "_TIMEOUT", distributed.timedelta(seconds=1))
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}  # nobody listens
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **places}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CNClipError) as error, distributed.start("cpu"):
        pass
    assert "cannot connect (" in str(error.value) and "127.0.0.1" in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "[/torch/third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:3",
            "Connection closed by peer [::1]:3",
        ),
        (
            "NCCL error in: /torch/csrc/NCCLUtils.cpp:94, invalid usage, NCCL version 2.27.5\n"
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
            "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device a0",
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device a0",
        ),
    ],
)
def test_the_reason_of_a_lost_connection_is_kept(text, reason):
    with (
        pytest.raises(CNClipError) as error,
        distributed._connection_errors_named(distributed._disconnected),
    ):
        raise torch.distributed.DistBackendError(text)
    assert f"({reason})" in str(error.value)


def slow_down(pid, ended):
    """Let a process run 20 of every 100 ms."""
    while not ended.is_set():
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.08)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)


def children(pid):
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="/proc has the processes")
def test_a_slowed_process_is_named_in_the_log(pairs, start, tmp_path):
    recipe = recipe_values(pairs, start, tmp_path / "run", {"epochs": 200})
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "cn_clip", "train"]
    process = subprocess.Popen([*command, "--recipe", tmp_path / "recipe.toml"])
    while not any(event["kind"] == "step" for event in read_log(tmp_path / "run")):
        time.sleep(0.1)
        assert process.poll() is None
    ranks = {Path(f"/proc/{pid}/environ").read_bytes(): pid for pid in children(process.pid)}
    (pid,) = (pid for environ, pid in ranks.items() if b"\0RANK=1\0" in environ)
    ended = threading.Event()
    slowing = threading.Thread(target=slow_down, args=(pid, ended))
    slowing.start()
    try:
        while process.poll() is None:
            warnings = [e["text"] for e in read_log(tmp_path / "run") if e["kind"] == "warning"]
            if any(text.startswith("process 1 is slow") for text in warnings):
                break
            time.sleep(0.2)
    finally:
        ended.set()
        slowing.join()
        process.terminate()
        process.wait()
    assert any(text.startswith("process 1 is slow") for text in warnings), warnings
    assert not any(text.startswith("process 0") for text in warnings), warnings
