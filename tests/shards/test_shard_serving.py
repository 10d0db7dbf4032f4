"""Search of embedding shards by the command line, a server, and servers of parts behind a front."""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from serve.servers import Settings, serving
from shard_folders import image_shards, use_one_thread

import cn_clip
from cn_clip.cli import run
from cn_clip.errors import LibraryError, UsageError
from cn_clip.serve import parts
from cn_clip.serve.app import create_app
from cn_clip.serve.parts import Parts
from cn_clip.serve.problems import RequestError
from cn_clip.shards.folder import SPAN
from cn_clip.shards.library import ShardLibrary

COUNT, OF = 24, 3
QUERIES = ["海边的日落", "一只猫", "2:猫 -室内"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    use_one_thread(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_checkpoint):
    return image_shards(tmp_path_factory.mktemp("images"), tiny_checkpoint, COUNT, OF)


@pytest.fixture(scope="module")
def expected(folder, tiny_checkpoint):
    """The order of the images for a text, by numpy."""
    embedder = cn_clip.load(str(tiny_checkpoint), device="cpu")
    images = embedder.embed_images([folder.parent / "photos" / f"{n}.png" for n in range(COUNT)])

    def order(text):
        cosines = images @ embedder.embed_texts([text])[0]
        return [str(n) for n in np.argsort(-cosines)], cosines

    return order


def numbers(hits):
    return [hit["path"].rpartition("/")[2].removesuffix(".png") for hit in hits]


def test_the_command_line_searches_shards(folder, expected, capsys, tmp_path):
    words = ["search", "一只猫", "--library", str(folder), "--device", "cpu", "--top", "5"]
    assert run([*words, "--json", "--out", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    order, cosines = expected("一只猫")
    assert numbers(found["hits"]) == order[:5] and found["images"] == COUNT
    assert abs(found["hits"][0]["cosine"] - cosines.max()) < 1e-3
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("data:image/webp") == 5
    assert run([*words, "--like", str(2 * SPAN + 1), "--image", str(found["hits"][0]["path"])]) == 0
    assert run([*words, "--min-side", "3"]) == 2
    assert "without filters" in capsys.readouterr().err


def test_an_index_by_the_command_line(folder, expected, capsys, tmp_path):
    import shutil

    copied = tmp_path / "shards"
    shutil.copytree(folder, copied)
    words = ["bulk", "index", str(copied), "--device", "cpu", "--workers", "0"]
    assert run([*words, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["rows"], done["shards"], done["encoded"]) == (COUNT, COUNT // OF, 1)
    assert run([*words, "--shards", "0:4"]) == 0
    assert run([*words, "--shards", "4:0"]) == 2
    with ShardLibrary(copied, device="cpu") as library:
        assert library.index.lists is not None
        hits = library.search("海边", k=3)
        assert numbers([hit.to_dict() for hit in hits]) == expected("海边")[0][:3]
        assert hits[0].caption.startswith("图") and hits[0].uri.startswith("file:///")


def test_another_model_is_refused(folder, tmp_path_factory):
    from conftest import TINY, make_model

    from cn_clip import weights

    other = tmp_path_factory.mktemp("other")
    weights.save_folder(make_model(TINY["vit"], 3), other)
    with pytest.raises(LibraryError, match="is another model"):
        ShardLibrary(folder, model=str(other), device="cpu").search("猫")


def settings(folder, **options):
    return Settings(library=str(folder), image_batch=1, device="cpu", **options)


def test_a_server_of_shards(folder, expected):
    with serving(settings(folder, shards=range(2, 6))) as client:
        found = client.post("/v1/search", json={"query": "一只猫", "k": 4}).json()
        inside = [n for n in expected("一只猫")[0] if 2 <= int(n) // OF < 6]
        assert numbers(found["hits"]) == inside[:4] and found["more"]
        assert found["images"] == 4 * OF and "/" not in found["hits"][0]["path"]
        again = client.get("/v1/search", params={"q": "一只猫", "k": 2, "offset": 2}).json()
        assert again["hits"] == found["hits"][2:]
        first = found["hits"][0]
        assert client.get(first["thumbnail"]).headers["content-type"] == "image/webp"
        image = client.get(first["image"], params={"side": 32})
        assert image.headers["content-type"] == "image/jpeg"
        assert client.get("/v1/images/1").status_code == 404  # of another part
        assert client.get("/v1/images/1/thumbnail").status_code == 404
        like = client.post("/v1/search", json={"like": [first["id"]], "k": 1}).json()
        assert like["hits"][0]["id"] == first["id"]
        far = client.post("/v1/search", json={"like": [1], "k": 1})
        assert far.status_code == 200  # its vector is read from the folder
        state = client.get("/v1/library").json()
        assert state["images"] == 12 and state["shards"] == {"first": 2, "last": 5, "count": 4}
        near = client.post("/knn-service", json={"text": "一只猫", "num_images": 3}).json()
        assert [hit["id"] for hit in near] == [hit["id"] for hit in found["hits"][:3]]
        assert client.get("/indices-list").json() == ["shards"]
        bad = client.post("/v1/search", json={"query": "猫", "filters": {"folder": "x"}})
        assert bad.status_code == 400 and "without filters" in bad.json()["error"]["message"]
        assert client.get("/v1/search", params={"q": "猫", "k": 0}).status_code == 400
        assert client.get("/v1/search").status_code == 400
        for wrong in ({"like": 0}, {"q": "x", "k": 2**31}, {"q": "x", "offset": 2**70}):
            assert client.get("/v1/search", params=wrong).status_code == 400
        described = client.get("/openapi.json").json()["paths"]
        assert "/v1/search" in described and "/v1/embeddings" in described


def test_parts_behind_a_front_find_what_one_index_finds(folder):
    with contextlib.ExitStack() as stack:
        whole = stack.enter_context(serving(settings(folder)))
        ranges = [range(at, at + 2) for at in range(0, 8, 2)]
        behind = [stack.enter_context(serving(settings(folder, shards=each))) for each in ranges]
        urls = tuple(str(part.base_url) for part in behind)
        front = stack.enter_context(serving(Settings(parts=urls)))
        compare(whole, front)
        first = whole.post("/v1/search", json={"query": QUERIES[0], "k": 1}).json()["hits"][0]
        assert front.get(first["image"]).content == whole.get(first["image"]).content
        assert front.get(first["thumbnail"]).status_code == 200
        assert front.get(f"/v1/images/{99 * SPAN + 1}").status_code == 404
        state = front.get("/v1/library").json()
        assert state["images"] == COUNT and state["parts"]["answered"] == 4
        texts = {"input": ["一只猫"]}
        assert (
            front.post("/v1/embeddings", json=texts).json()["data"]
            == whole.post("/v1/embeddings", json=texts).json()["data"]
        )
        bad = front.post("/v1/search", json={"query": "-室内"})
        assert bad.status_code == 400 and "what to avoid" in bad.json()["error"]["message"]
        assert front.post("/v1/search", json={"k": 3}).status_code == 400
        assert front.get("/v1/search", params={"like": 0}).status_code == 400
        for language in ("zh-CN", "en"):
            headers = {"accept-language": language}
            bad = front.post("/v1/classify", json={"images": []}, headers=headers)
            same = whole.post("/v1/classify", json={"images": []}, headers=headers)
            assert bad.json()["error"] == same.json()["error"]
        assert front.get("/readyz").status_code == 200
        assert front.get("/").status_code == 200


def compare(whole, front):
    """Check that results, their order, probabilities and pages are equal."""
    for query in QUERIES:
        for k, offset in ((1, 0), (10, 0), (7, 5), (COUNT, 0), (50, 0)):
            asked = {"query": query, "k": k, "offset": offset}
            one = whole.post("/v1/search", json=asked).json()
            merged = front.post("/v1/search", json=asked).json()
            state = merged.pop("parts")
            assert state == {"asked": 4, "answered": 4, "missing": []}
            assert merged == one
        near = {"text": query, "num_images": 9}
        answer = front.post("/knn-service", json=near)
        assert answer.json() == whole.post("/knn-service", json=near).json()
        assert answer.headers["x-missing-parts"] == "0"


def test_a_part_that_is_down_is_said_in_the_answer(folder):
    with contextlib.ExitStack() as stack:
        up = stack.enter_context(serving(settings(folder, shards=range(4))))
        urls = ("http://127.0.0.1:1", str(up.base_url))
        front = stack.enter_context(serving(Settings(parts=urls, timeout=5.0)))
        found = front.post("/v1/search", json={"query": "猫", "k": 30}).json()
        assert found["parts"]["asked"] == 2 and found["parts"]["answered"] == 1
        assert found["parts"]["missing"] == [{"part": 1, "reason": "no connection"}]
        assert len(found["hits"]) == 12 == found["images"]
        near = front.post("/knn-service", json={"text": "猫"})
        assert near.headers["x-missing-parts"] == "1"
        assert front.get("/v1/library").json()["parts"]["missing"][0]["part"] == 1
        assert front.get(f"/v1/images/{5 * SPAN + 1}").status_code == 503  # it may be there
        assert front.get("/v1/images/1").status_code == 200
        assert front.get("/readyz").status_code == 200
        for _number in range(3):  # asked in turn
            assert front.post("/v1/embeddings", json={"input": "猫"}).status_code == 200


@contextlib.contextmanager
def hanging(answers_probes):
    """A server that accepts requests and never answers them, but for probes if so; yield its
    address."""

    async def answer(reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while (head := await reader.readuntil(b"\r\n\r\n")) and answers_probes:
                if b"/readyz" in head:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await stopped.wait()
        writer.close()

    async def serve():
        nonlocal stopped
        stopped = asyncio.Event()
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        address.set_result((f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", loop))
        await stopped.wait()
        server.close()

    stopped = None
    loop = asyncio.new_event_loop()
    address = concurrent.futures.Future()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield address.result(10)[0]
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()
        loop.close()


def test_a_part_that_hangs_takes_no_connection_of_another(folder, monkeypatch):
    monkeypatch.setattr(parts, "_CONNECTIONS", 2)
    monkeypatch.setattr(parts, "_PROBE_SECONDS", 0.1)
    with contextlib.ExitStack() as stack:
        up = stack.enter_context(serving(settings(folder, shards=range(4))))
        hung = stack.enter_context(hanging(True))
        front = stack.enter_context(serving(Settings(parts=(hung, str(up.base_url)), timeout=1.5)))

        def search(_number):
            return front.post("/v1/search", json={"query": "猫", "k": 1}).json()

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            found = list(threads.map(search, range(8)))
        for each in found:
            assert each["parts"]["missing"] == [{"part": 1, "reason": "no answer in time"}]
        assert front.get("/readyz").status_code == 200


def test_nobody_waits_for_a_part_that_does_not_answer_probes(folder, monkeypatch):
    monkeypatch.setattr(parts, "_PROBE_TIMEOUT", 0.3)
    with contextlib.ExitStack() as stack:
        up = stack.enter_context(serving(settings(folder, shards=range(4))))
        hung = stack.enter_context(hanging(False))
        front = stack.enter_context(serving(Settings(parts=(hung, str(up.base_url)), timeout=60)))
        front.timeout = 5
        found = front.post("/v1/search", json={"query": "猫", "k": 1}).json()
        assert found["parts"]["missing"] == [{"part": 1, "reason": "no answer in time"}]


def test_an_error_of_one_part_that_no_one_foresaw_costs_this_part_only(folder, monkeypatch):
    monkeypatch.setattr(parts, "_PROBE_SECONDS", 0.05)
    with contextlib.ExitStack() as stack:
        up = stack.enter_context(serving(settings(folder, shards=range(4))))
        front = stack.enter_context(serving(Settings(parts=(str(up.base_url), "http://a.invalid"))))
        behind = front.service.parts
        behind.urls[1] = "http://xn--"  # httpx raises what is none of its own errors
        found = front.post("/v1/search", json={"query": "猫", "k": 1}).json()
        assert found["parts"]["missing"] == [{"part": 2, "reason": "no connection"}]
        behind.reasons = {}
        deadline = time.monotonic() + 10
        while not behind.reasons and time.monotonic() < deadline:
            time.sleep(0.02)
        assert behind.reasons == {2: "no connection"} and not behind._watch.done()


def test_without_any_part_the_front_is_not_ready():
    with serving(Settings(parts=("http://127.0.0.1:1", "http://127.0.0.1:2"))) as front:
        for answer in (
            front.post("/v1/search", json={"query": "猫"}),
            front.post("/v1/embeddings", json={"input": "猫"}),
            front.get("/v1/library"),
            front.get("/readyz"),
        ):
            assert answer.status_code == 503


def test_a_part_that_is_another_program_is_no_crash(tiny_checkpoint):
    with contextlib.ExitStack() as stack:
        model = Settings(model=str(tiny_checkpoint), device="cpu", image_batch=1)
        other = stack.enter_context(serving(model))  # no library
        urls = (str(other.base_url),)
        front = stack.enter_context(serving(Settings(parts=urls)))
        assert front.post("/v1/search", json={"query": "猫"}).status_code == 404
        assert front.get("/v1/library").status_code == 404
        front.service.parts.urls = [f"{urls[0]}/v1/models#"]  # answers other JSON
        assert front.get("/v1/library").status_code == 503


def test_what_is_no_address_of_a_part_is_refused(folder, capsys):
    for urls in (
        ("x",), ("ftp://a",), ("http://",), ("http://a:b",), ("http://a", "http://a/"),
        ("http://a?",), ("http://a/#part",), ("http://a#",), ("http://xn--/",), ("http://[::1",),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="--parts"):
            Parts(urls, key=None, timeout=1)
    with pytest.raises(UsageError, match="CN_CLIP_PARTS_KEY") as refused:
        Parts(("http://me:secret@a",), key=None, timeout=1)
    assert "secret" not in str(refused.value)
    for words in (
        ["--parts", "http://a", "--library", str(folder)],
        ["--parts", "http://a", "--model", "mini"],
        ["--shards", "0:3"],
        ["--shards", "3:0", "--library", str(folder)],
    ):
        assert run(["serve", *words]) == 2
    with pytest.raises(UsageError, match="no finished shard in that range"):
        create_app(settings(folder, shards=range(90, 99)))
    capsys.readouterr()


@contextlib.contextmanager
def started(*options):
    """Start a server as a process; yield it and a client."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cn_clip", "serve", "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    with process:
        try:
            line = process.stderr.readline()
            address = re.search(r"http://\S+", line)
            assert address, line + process.stderr.read()
            reader = threading.Thread(target=lambda: [*process.stderr])
            reader.start()
            with httpx.Client(base_url=address[0], timeout=120, trust_env=False) as client:
                assert client.get("/readyz").status_code == 200
                yield process, client
        finally:
            process.kill()
            reader.join()


@pytest.mark.full
@pytest.mark.parametrize("indexed", [False, True])
def test_four_processes_and_a_front_find_what_one_index_finds(tmp_path, tiny_checkpoint, indexed):
    folder = image_shards(tmp_path, tiny_checkpoint, 400, 25)
    if indexed:
        for shards in ([], *(["--shards", f"{at}:{at + 4}"] for at in (0, 4, 8, 12))):
            words = ["bulk", "index", str(folder), "--device", "cpu", "--workers", "0"]
            assert run([*words, "--recall", "0.999", *shards]) == 0
    common = ("--library", str(folder), "--device", "cpu", "--image-batch", "1")
    with contextlib.ExitStack() as stack:
        _whole, whole = stack.enter_context(started(*common))
        behind = [
            stack.enter_context(started(*common, "--shards", f"{at}:{at + 4}"))
            for at in (0, 4, 8, 12)
        ]
        urls = [str(client.base_url) for _process, client in behind]
        _front, front = stack.enter_context(started("--parts", *urls))
        for query in QUERIES:
            asked = {"query": query, "k": 10}
            merged = front.post("/v1/search", json=asked).json()
            assert merged.pop("parts")["answered"] == 4
            assert merged == whole.post("/v1/search", json=asked).json()
        behind[2][0].kill()
        found = front.post("/v1/search", json={"query": QUERIES[0], "k": 400}).json()
        assert found["parts"]["missing"] == [{"part": 3, "reason": "no connection"}]
        assert len(found["hits"]) == 300


def test_a_part_that_is_busy_or_has_another_key_is_passed_over():
    statuses = {"a": 401, "b": 429, "c": 200}

    def answer(request):
        return httpx.Response(statuses[request.url.host], json={})

    async def asked(method):
        behind = Parts(("http://a", "http://b", "http://c"), key=None, timeout=1)
        behind._clients = [httpx.AsyncClient(transport=httpx.MockTransport(answer))] * 3
        return [(await method(behind)).status_code for _number in range(3)]

    def one(behind):
        return behind.ask_one("POST", "/v1/embeddings", body=b"{}")

    def image(behind):
        return behind.ask_for("/v1/images/1", "")

    assert asyncio.run(asked(one)) == [200, 200, 200]
    statuses["c"] = 503
    assert asyncio.run(asked(one)) == [429, 429, 429]
    statuses |= {"a": 404, "b": 404, "c": 404}
    with pytest.raises(RequestError) as refused:
        asyncio.run(asked(image))
    assert refused.value.status == 404
    statuses["b"] = 429  # it may have the image
    with pytest.raises(RequestError) as refused:
        asyncio.run(asked(image))
    assert refused.value.status == 503
    statuses["b"] = 400
    assert asyncio.run(asked(image)) == [400, 400, 400]
