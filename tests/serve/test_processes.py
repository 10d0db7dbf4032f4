"""``cn-clip serve`` as a process: its start, its end, and its workers."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from cn_clip.serve import service
from cn_clip.serve.settings import Settings

TEXTS = [f"第{number}句话，关于海边的日落和一只猫" for number in range(256)]


@contextlib.contextmanager
def started(*options, **variables):
    """Start a server; yield the process and a client."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cn_clip", "serve", "--port", "0", "--image-batch", "1", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
    )
    lines = []
    with process:
        try:
            line = process.stderr.readline()
            address = re.search(r"http://\S+", line)
            assert address, line + process.stderr.read()
            reader = threading.Thread(target=lambda: lines.extend(process.stderr))
            reader.start()
            with httpx.Client(base_url=address[0], timeout=60, trust_env=False) as client:
                client.url, client.log = address[0].rstrip("/"), lines
                assert client.get("/readyz").status_code == 200  # once the model is loaded
                yield process, client
        finally:
            process.kill()
            reader.join()


def test_a_signal_ends_the_server_after_it_has_answered(tiny_checkpoint):
    with started("--model", str(tiny_checkpoint)) as (process, client):
        content = json.dumps({"input": TEXTS}).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}"
        address = (client.base_url.host, client.base_url.port)
        with contextlib.ExitStack() as stack:
            asking = [
                stack.enter_context(socket.create_connection(address, 30)) for _number in range(3)
            ]
            for connection in asking:
                connection.sendall(f"{head}\r\n\r\n".encode() + content[:-9])
            time.sleep(0.3)  # the requests are inside, their bodies not complete
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            for connection in asking:
                connection.sendall(content[-9:])
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                assert answer.status == 200
                assert len(json.loads(answer.read())["data"]) == len(TEXTS)
        assert process.wait(20) == 128 + signal.SIGTERM
        log = "".join(client.log)
        assert "日落" not in log and '"route": "/v1/embeddings"' in log  # no text of queries


@pytest.mark.full
def test_a_killed_worker_is_replaced_and_metrics_add_up(tiny_checkpoint):
    with started("--model", str(tiny_checkpoint), "--workers", "2") as (process, client):

        def embeddings():
            # A connection of its own each time: both workers get some.
            answer = httpx.post(
                f"{client.url}/v1/embeddings",
                json={"input": "猫"},
                timeout=30,
                trust_env=False,
            )
            return answer.json()["data"]

        deadline = time.monotonic() + 60
        while "cnclip_models_loaded 2.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        expected = embeddings()
        for _number in range(20):
            assert embeddings() == expected
        before = workers_of(process)
        assert len(before) == 2
        os.kill(min(before), signal.SIGKILL)
        failures, deadline = 0, time.monotonic() + 30
        while time.monotonic() < deadline and not (
            len(now := workers_of(process)) == 2 and now != before
        ):
            try:
                assert embeddings() == expected
            except httpx.HTTPError:  # it was inside of the killed worker
                failures += 1
            time.sleep(0.05)
        assert now != before and len(now) == 2 and failures <= 1
        for _number in range(10):
            assert embeddings() == expected
        text = client.get("/metrics").text
        pattern = r'cnclip_requests_total\{.*route="/v1/embeddings",status="200".*\} (\S+)'
        counted = sum(map(float, re.findall(pattern, text)))
        assert counted >= 31
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, 128 + signal.SIGTERM)
        assert not workers_of(process)


@pytest.mark.full
def test_a_worker_that_is_killed_while_it_is_asked_whether_it_is_alive_is_replaced_at_once(
    tiny_checkpoint,
):
    with started("--model", str(tiny_checkpoint), "--workers", "2") as (process, client):
        deadline = time.monotonic() + 90
        while "cnclip_models_loaded 2.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        before = workers_of(process)
        os.kill(min(before), signal.SIGSTOP)
        time.sleep(2)  # it is asked every half second, and does not answer
        os.kill(min(before), signal.SIGKILL)
        killed = time.monotonic()
        while min(before) in (now := workers_of(process)) or len(now) < 2:
            assert time.monotonic() - killed < 10
            time.sleep(0.1)


def workers_of(process):
    found = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return {int(line.split()[0]) for line in found if "spawn_main" in line}


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "cn_clip", "serve", "--port", "0", "--model", str(tmp_path / "no")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1 or run.returncode == 2
    assert len(run.stderr.splitlines()) == 2 and "no such" in run.stderr.splitlines()[1].lower()


def test_the_loaded_objects_are_exempt_from_garbage_collection(tiny_checkpoint):
    # A full collection of them stops all requests for 150 ms.
    code = f"""
import gc
from cn_clip.serve.run import _create_app
from cn_clip.serve.settings import Settings
app = _create_app(Settings(model={str(tiny_checkpoint)!r}, image_batch=1))
print(gc.get_freeze_count(), len(gc.get_objects()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    frozen, left = map(int, run.stdout.split())
    assert frozen > 100_000 and left < 1_000


def test_a_worker_takes_the_batch_size_that_another_has_measured(
    tiny_checkpoint, tmp_path, monkeypatch
):
    measured = []
    monkeypatch.setattr(service, "best_image_batch", lambda embedder: measured.append(1) or 7)
    settings = Settings(model=str(tiny_checkpoint), run_folder=str(tmp_path))
    sizes = [service.Service(settings)._image_batch for _number in range(2)]
    assert sizes == [7, 7] and len(measured) == 1
    (tmp_path / "image_batch").write_text("")  # the disk was full
    assert service.Service(settings)._image_batch == 7 and len(measured) == 2
