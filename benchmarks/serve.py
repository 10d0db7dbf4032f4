"""`cn-clip serve` under load from another process.

    python benchmarks/serve.py texts [--model mini] [--seconds 60] [--peer OTHER/bin/python]
                                     [--infinity OTHER/bin/infinity_emb]
    python benchmarks/serve.py overload [--model mini] [--seconds 60]
    python benchmarks/serve.py mixed [--model mini] [--requests 100000]
    python benchmarks/serve.py sizes --models mini EXPORT ViT-B-16 ... [--seconds 20]

`texts`: 64 clients, each of which sends a text that nobody sent before, waits for its embedding,
and sends the next. Contestants run in turn: `serve`; the same server with batches of one; the same
server with a model that returns a constant at once; and a plain FastAPI wrapper of the official
`cn-clip` 1.6.0 as people write it, if PEER is a Python that has both (ViT-B-16 only). `bare` is the
model alone on batches of 64 texts, in a process of its own. INFINITY serves the same weights as a
Hugging Face folder; 0.0.78 needs transformers 4.49, and with 4.57 no text of Chinese-CLIP is
answered while /health says 200.

`overload`: images that arrive at half, twice and ten times the rate that the server reaches,
whether it answers or not. Beyond that rate, accepted requests wait in a full queue. `mixed`:
requests of all kinds, every hundredth with a damaged image. `sizes`: memory and throughput of
models and exports, one after the other: 64 clients send texts, then 8 send a photo.

Weights: ViT-B-16 gets random ones, whose speed is that of trained ones.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = 64
_WORDS = "红色的汽车停在海边日落时分一只猫坐窗台上看着外面城市夜景雪山下木屋"


# The servers: each in a process of its own.


def serve_ours(kind: str, model: str, port: int) -> None:
    import numpy as np

    from cn_clip.serve import engine
    from cn_clip.serve.run import serve
    from cn_clip.serve.settings import Settings

    if kind == "batches of one":
        engine._TEXTS_PER_BATCH = 1  # read when the queue is made
    if kind == "no model":
        vector = np.ones(512, np.float32)
        engine.Engine._run_texts = lambda self, texts: [  # type: ignore[method-assign]
            engine.EmbeddedText(vector, 8) for _text in texts
        ]
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  the log
    serve(Settings(model=model, port=port), lambda address: None)


# What people write; its answer has the shape of ours.
WRAPPER = """
import sys, torch, uvicorn
import cn_clip.clip as clip
from fastapi import FastAPI
from pydantic import BaseModel

folder, port = sys.argv[1], int(sys.argv[2])
model, preprocess = clip.load_from_name("ViT-B-16", device="cpu", download_root=folder)
model.eval()
app = FastAPI()

class Request(BaseModel):
    input: str

@app.get("/readyz")
def ready():
    return "ok"

@app.post("/v1/embeddings")
def embeddings(request: Request):
    with torch.no_grad():
        features = model.encode_text(clip.tokenize([request.input]))
        features = features / features.norm(dim=-1, keepdim=True)
    return {"data": [{"index": 0, "embedding": features[0].tolist()}]}

uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")
"""


class Server:
    """A server in a process of its own."""

    def __init__(
        self, kind: str, model: str, folder: Path, *, peer: str = "", infinity: str = ""
    ) -> None:
        self.path = "/embeddings" if kind == "infinity" else "/v1/embeddings"
        self._health = b"/health" if kind == "infinity" else b"/readyz"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        if kind == "wrapper":
            command = [peer, "-E", "-c", WRAPPER, str(folder), str(self.port)]
        elif kind == "infinity":
            command = [infinity, "v2", "--model-id", str(folder / "hf"), "--device", "cpu"]
            command += ["--served-model-name", "default", "--port", str(self.port)]
            command += ["--engine", "torch", "--no-bettertransformer", "--no-model-warmup"]
        else:
            command = [sys.executable, __file__, "server", kind, model, str(self.port)]
        environment = dict(os.environ)
        if kind in ("wrapper", "infinity"):
            environment.pop("PYTHONPATH", None)  # ours has the same name
            environment["DO_NOT_TRACK"] = "1"
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        deadline = time.monotonic() + 300
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{kind} did not start: {' '.join(command)}")
            time.sleep(0.1)

    def ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                head = b"GET " + self._health + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"
                connection.sendall(head)
                return b" 200 " in connection.recv(100)
        except OSError:
            return False

    @property
    def megabytes(self) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) / 1024

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# The load.


class Connection(asyncio.Protocol):
    """One connection that is kept; one request at a time."""

    def __init__(self) -> None:
        self.buffer = b""
        self.answer: asyncio.Future[tuple[int, bytes]] | None = None
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        lower = head.lower()
        length = int(lower.partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(body) >= length:
            self.buffer = b""
            if self.answer is not None and not self.answer.done():
                self.answer.set_result((int(head[9:12]), body))

    def connection_lost(self, error: Exception | None) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ConnectionError("closed"))

    async def ask(self, content: bytes, path: str = "/v1/embeddings") -> tuple[int, bytes]:
        self.answer = asyncio.get_running_loop().create_future()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        return await self.answer


async def connect(port: int) -> Connection:
    loop = asyncio.get_running_loop()
    _transport, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    return connection


def text_request(rng: random.Random) -> bytes:
    text = "".join(rng.choices(_WORDS, k=rng.randint(4, 14))) + str(rng.random())[2:6]
    values = {"input": text, "encoding_format": "base64", "model": "default"}
    return json.dumps(values, ensure_ascii=False).encode()


async def closed_loop(
    port: int, seconds: float, clients: int, path: str, content: bytes = b""
) -> dict[str, Any]:
    """Let each client ask again as soon as it has its answer: new texts, or always the content."""
    end = time.perf_counter() + seconds
    latencies: list[float] = []
    statuses: collections.Counter[int] = collections.Counter()

    async def client(number: int) -> None:
        connection = await connect(port)
        rng = random.Random(f"{port} {number}")
        while (start := time.perf_counter()) < end:
            status, _body = await connection.ask(content or text_request(rng), path)
            latencies.append(time.perf_counter() - start)
            statuses[status] += 1

    start = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    return summary(latencies, statuses, time.perf_counter() - start)


async def open_loop(port: int, seconds: float, rate: float, content: bytes) -> dict[str, Any]:
    """Send at a rate, whether answers come or not."""
    accepted: list[float] = []
    refused: list[float] = []
    statuses: collections.Counter[int] = collections.Counter()
    free: list[Connection] = []
    tasks: set[asyncio.Task[None]] = set()

    async def one() -> None:
        start = time.perf_counter()
        try:
            connection = free.pop() if free else await connect(port)
            status, _body = await connection.ask(content)
            free.append(connection)
        except OSError:
            status = 0
        statuses[status] += 1
        (accepted if status == 200 else refused).append(time.perf_counter() - start)

    begin = time.perf_counter()
    sent = 0
    while (now := time.perf_counter() - begin) < seconds:
        while sent < now * rate:
            task = asyncio.ensure_future(one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    took = time.perf_counter() - begin
    return summary(accepted, statuses, took) | {"refused": summary(refused, statuses, took)}


async def mixed(port: int, count: int, image: bytes, damaged: bytes) -> dict[str, Any]:
    """Send requests of all kinds from several clients; check each answer's status."""
    remaining = iter(range(count))
    wrong: list[str] = []
    latencies: list[float] = []
    statuses: collections.Counter[int] = collections.Counter()
    good = base64.b64encode(image).decode()
    bad = base64.b64encode(damaged).decode()

    async def client(number: int) -> None:
        connection = await connect(port)
        rng = random.Random(number)
        for index in remaining:
            broken = index % 100 == 7
            kind = (
                "image" if broken else rng.choice(["text"] * 6 + ["texts", "image", "similarity"])
            )
            values: dict[str, Any] = {"input": f"{rng.random()}", "encoding_format": "base64"}
            path = "/v1/embeddings"
            if kind == "texts":
                values["input"] = [f"{rng.random()}猫" for _n in range(rng.randint(2, 20))]
            elif kind == "image":
                values["input"] = [{"image": bad if broken else good}]
            elif kind == "similarity":
                path, values = "/v1/similarity", {"texts": ["猫", f"{index}"]}
            start = time.perf_counter()
            try:
                status, _body = await connection.ask(json.dumps(values).encode(), path)
            except OSError:
                status, connection = 0, await connect(port)
            latencies.append(time.perf_counter() - start)
            statuses[status] += 1
            if status != (400 if broken else 200):
                wrong.append(f"{kind} {'damaged ' if broken else ''}{status}")

    start = time.perf_counter()
    await asyncio.gather(*map(client, range(16)))
    return summary(latencies, statuses, time.perf_counter() - start) | {
        "wrong": dict(collections.Counter(wrong))
    }


def summary(
    latencies: list[float], statuses: collections.Counter[int], seconds: float
) -> dict[str, Any]:
    ordered = sorted(latencies) or [0.0]
    return {
        "rate": len(latencies) / seconds,
        "p50": 1000 * ordered[len(ordered) // 2],
        "p99": 1000 * ordered[int(len(ordered) * 0.99)],
        "statuses": dict(statuses),
    }


def load_from_another_process(kind: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "load", kind, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)  # type: ignore[no-any-return]


def run_load(kind: str, arguments: list[str]) -> None:
    import uvloop

    port = int(arguments[0])
    work: Any
    if kind == "closed":
        work = closed_loop(port, float(arguments[1]), int(arguments[2]), arguments[3])
    elif kind == "images":
        content = image_request(photo())
        work = closed_loop(port, float(arguments[1]), int(arguments[2]), arguments[3], content)
    elif kind == "open":
        content = image_request(photo())
        work = open_loop(port, float(arguments[1]), float(arguments[2]), content)
    else:
        image = photo()
        work = mixed(port, int(arguments[1]), image, image[: len(image) // 3])
    print(json.dumps(uvloop.run(work)))


def photo() -> bytes:
    from cn_clip.sample import embedded_sample

    return Path(next(p for p in embedded_sample().images if p.suffix == ".jpg")).read_bytes()


def image_request(content: bytes) -> bytes:
    values = {"input": [{"image": base64.b64encode(content).decode()}]}
    return json.dumps(values | {"encoding_format": "base64"}).encode()


# The measurements.

_OPTION = {"wrapper": "peer", "infinity": "infinity"}


def model_file(name: str, folder: Path) -> str:
    """Return what `load` takes; ViT-B-16 with random weights."""
    if name != "ViT-B-16":
        return name
    import torch

    from cn_clip import weights
    from cn_clip.config import MODELS
    from cn_clip.model.clip import CLIP, initialize

    model = CLIP(MODELS[name])
    initialize(model, torch.Generator().manual_seed(0))
    path = folder / "clip_cn_vit-b-16.pt"
    weights.save_official(model, path)
    return str(path)


def bare_rate(model: str, seconds: float) -> float:
    code = f"""
import random, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from serve import _WORDS
from cn_clip import load
embedder, rng = load({model!r}), random.Random(0)
batches = [["".join(rng.choices(_WORDS, k=rng.randint(4, 14))) + str(rng.random())[2:6]
            for _n in range({CLIENTS})] for _m in range(50)]
embedder.embed_texts(batches[0])
start, count = time.perf_counter(), 0
while time.perf_counter() - start < {seconds}:
    count += len(embedder.embed_texts(batches[count // {CLIENTS} % 50]))
print(count / (time.perf_counter() - start))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


def measure_texts(options: argparse.Namespace, folder: Path) -> None:
    model = model_file(options.model, folder)
    kinds = ["serve", "batches of one", "no model"]
    kinds += [kind for kind in ("wrapper", "infinity") if getattr(options, _OPTION[kind])]
    if options.infinity:
        from cn_clip.convert import convert

        convert(Path(model), folder / "hf", "hf")
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    bare = []
    slice_seconds = options.seconds / options.rounds
    for _round in range(options.rounds):
        bare.append(bare_rate(model, slice_seconds / 2))
        for kind in kinds:
            server = Server(kind, model, folder, peer=options.peer, infinity=options.infinity)
            load_from_another_process("closed", server.port, 1, CLIENTS, server.path)
            found = load_from_another_process(
                "closed", server.port, slice_seconds, CLIENTS, server.path
            )
            results[kind].append(found | {"MB": server.megabytes})
            server.stop()
    print(f"| {options.model}, {CLIENTS} clients | texts/s | p50 ms | p99 ms | MB |")
    print("|---|---:|---:|---:|---:|")
    print(f"| bare, batches of {CLIENTS} | {median(bare):,.0f} | | | |")
    for kind, found in results.items():
        cells = [median([values[name] for values in found]) for name in ("rate", "p50", "p99")]
        print(
            f"| {kind} | {cells[0]:,.0f} | {cells[1]:.0f} | {cells[2]:.0f} | "
            f"{found[-1]['MB']:.0f} |"
        )
        if any(set(values["statuses"]) != {"200"} for values in found):
            print(f"statuses of {kind}:", [values["statuses"] for values in found])


def measure_overload(options: argparse.Namespace, folder: Path) -> None:
    model = model_file(options.model, folder)
    server = Server("serve", model, folder)
    # A flood is no measure of the capacity: its client and the refusals need the same cores.
    offered, capacity = 2.5, float("inf")
    while capacity > 0.9 * offered:
        offered *= 2
        found = load_from_another_process("open", server.port, options.seconds / 6, offered)
        capacity = found["rate"]
    half = load_from_another_process("open", server.port, options.seconds / 4, capacity / 2)
    twice = load_from_another_process("open", server.port, options.seconds, 2 * capacity)
    before = server.megabytes
    found = load_from_another_process("open", server.port, options.seconds, 10 * capacity)
    print(f"{options.model}: {capacity:.1f} images/s accepted of {offered:.0f} offered")
    print("| | accepted/s | p50 ms | p99 ms | refused p50 ms | refused p99 ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, values in (("half of it", half), ("twice", twice), ("ten times", found)):
        refused = values["refused"]
        print(
            f"| {name} | {values['rate']:.1f} | {values['p50']:.0f} | {values['p99']:.0f} | "
            f"{refused['p50']:.1f} | {refused['p99']:.1f} |"
        )
    print("statuses:", found["statuses"], f"memory: {before:.0f} -> {server.megabytes:.0f} MB")
    server.stop()


def measure_mixed(options: argparse.Namespace, folder: Path) -> None:
    model = model_file(options.model, folder)
    server = Server("serve", model, folder)
    part = options.requests // 5
    sizes = []
    for _part in range(5):
        found = load_from_another_process("mixed", server.port, part)
        sizes.append(round(server.megabytes))
        print(f"{part:,} requests, {found['rate']:.0f}/s: {found['statuses']}", end="; ")
        print(f"wrong: {found['wrong'] or 'none'}; {sizes[-1]} MB", flush=True)
    server.stop()


def measure_sizes(options: argparse.Namespace, folder: Path) -> None:
    print("| model | ready, MB | texts/s | p99 ms | images/s | p99 ms | then, MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in options.models:
        server = Server("serve", model_file(name, folder), folder)
        ready = server.megabytes
        cells = []
        for kind, clients in (("closed", CLIENTS), ("images", 8)):
            arguments = (kind, server.port, options.seconds, clients, server.path)
            found = load_from_another_process(*arguments)
            cells.append(f"{found['rate']:,.0f} | {found['p99']:.0f}")
        print(f"| {Path(name).name} | {ready:.0f} | {' | '.join(cells)} | {server.megabytes:.0f} |")
        server.stop()


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    if sys.argv[1:2] == ["server"]:
        serve_ours(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    if sys.argv[1:2] == ["load"]:
        run_load(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    measures: dict[str, Callable[[argparse.Namespace, Path], None]] = {
        "texts": measure_texts,
        "overload": measure_overload,
        "mixed": measure_mixed,
        "sizes": measure_sizes,
    }
    parser.add_argument("measure", choices=measures)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--models", nargs="+", default=["mini"])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--infinity", default="", help="the command infinity_emb; ViT-B-16 only")
    parser.add_argument(
        "--peer", default="", help="a Python with the official cn-clip, fastapi and uvicorn"
    )
    options = parser.parse_args()
    from cn_clip.processes import cpu_info

    print(*cpu_info("model name")[:1], f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        measures[options.measure](options, Path(folder))


if __name__ == "__main__":
    main()
