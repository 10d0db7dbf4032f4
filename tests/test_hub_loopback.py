"""Downloads from a hub on loopback that interrupts, sends wrong data, stalls and refuses."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import TINY, make_model

from cn_clip import weights
from cn_clip.config import PUBLISHED

REPOSITORY = "OFA-Sys/chinese-clip-rn50"
FILE = "clip_cn_rn50.pt"


class Hub(ThreadingHTTPServer):
    """Serves the part of the hub's protocol that downloads use; ``troubles`` come first."""

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.troubles = []
        self.requests = []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        trouble = None
        troubles = self.server.troubles if "/resolve/" in self.path else []
        if troubles and troubles[0][0] == self.command:
            trouble = troubles.pop(0)[1]
        if listed := re.fullmatch(r"/api/models/([^/]+/[^/?]+)", self.path):
            return self.send_listing(listed[1])
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", self.path)
        content = self.server.repositories.get(match[1], {}).get(match[2]) if match else None
        if content is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if trouble == "429":
            return self.send(429, b"", {"Retry-After": "0"})
        etag = hashlib.sha256(content).hexdigest()
        start = 0
        if range_match := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(range_match[1])
        sent = content[start:]
        if trouble == "wrong bytes":
            sent = bytes(len(sent))
        if trouble == "wrong size":
            sent = sent[:-1000]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": "c" * 40, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        length = len(sent)
        if trouble == "break off":
            sent = sent[: length // 2]
            self.close_connection = True
        self.send(206 if start else 200, sent if body else b"", headers, length)

    def send_listing(self, repository):
        import json

        files = self.server.repositories.get(repository)
        if files is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        metadata = {"id": repository, "siblings": [{"rfilename": name} for name in files]}
        self.send(200, json.dumps(metadata).encode(), {"Content-Type": "application/json"})

    def send(self, code, content, headers, length=None):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the files of a Hugging Face folder and an official file, as bytes by name."""
    path = tmp_path_factory.mktemp("models")
    weights.save_hugging_face(make_model(TINY["vit"]), path / "hf")
    weights.save_official(make_model(TINY["resnet"]), path / "model.pt")
    inside = {file.name: file.read_bytes() for file in (path / "hf").iterdir()}
    return inside, (path / "model.pt").read_bytes()


@pytest.fixture
def server(folder):
    hf, official = folder
    other = {"config.json": b'{"model_type": "blip"}', "model.safetensors": b"x" * 1000}
    hub = Hub(
        {
            REPOSITORY: {FILE: official},
            "someone/QA-CLIP": hf,
            "someone/one-file": {"README.md": b"hello", "epoch_9.pt": official},
            "someone/blip": other,
            "someone/data": {"train.tsv": b""},
        }
    )
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


def start(tmp_path, address, name, *, first="", **environment):
    """Locate a model in a separate process, because the hub's URL is read once, at import.

    The process runs the code ``first`` before.
    """
    code = (
        f"{first}\nimport sys; from cn_clip import hub; "
        "print(hub.locate(sys.argv[1], download_root=sys.argv[2]))"
    )
    env = os.environ | {"HF_ENDPOINT": address, "HOME": str(tmp_path / "home")} | environment
    env["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return subprocess.Popen(
        [sys.executable, "-c", code, name, str(tmp_path / "root")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def locate(*arguments, **environment):
    process = start(*arguments, **environment)
    out, error = process.communicate(timeout=120)
    return out.strip(), error.strip().splitlines()[-1] if error.strip() else ""


def downloads(server):
    return [r for r in server.requests if r[0] == "GET" and "/resolve/" in r[1]]


def test_a_published_model_is_downloaded_once(tmp_path, server, folder):
    path, error = locate(tmp_path, server.address, "RN50")
    assert (path, error) == (str(tmp_path / "root" / FILE), "")
    assert (tmp_path / "root" / FILE).read_bytes() == folder[1]
    count = len(server.requests)
    assert locate(tmp_path, server.address, "RN50")[0] == path
    assert len(server.requests) == count


def test_an_interrupted_download_resumes(tmp_path, server):
    content = os.urandom(30_000_000)  # the hub's library saves chunks of 10 MB
    server.repositories[REPOSITORY] = {FILE: content}
    server.troubles = [("GET", "break off")]
    path, error = locate(tmp_path, server.address, "RN50")
    assert path, error
    assert (tmp_path / "root" / FILE).read_bytes() == content
    first, second = downloads(server)
    assert first[2] is None or first[2].startswith("bytes=0-")
    assert int(second[2].removeprefix("bytes=").split("-")[0]) > 0


def test_a_full_disk_is_reported_and_the_next_download_works(tmp_path, server):
    pytest.importorskip("resource")
    content = os.urandom(30_000_000)
    server.repositories[REPOSITORY] = {FILE: content}
    first = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (15_000_000, r.RLIM_INFINITY))"
    path, error = locate(tmp_path, server.address, "RN50", first=first)
    assert not path
    root = tmp_path / "root"
    assert f"no space in {root} to download RN50" in error
    assert error.endswith("Free some space, or give another folder: download_root")
    left = [file for file in root.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in left) < 10_000  # the disk does not stay full
    assert locate(tmp_path, server.address, "RN50")[0] == str(root / FILE)
    assert (root / FILE).read_bytes() == content


@pytest.mark.parametrize("trouble", ["wrong bytes", "wrong size"])
def test_a_file_that_differs_from_the_hubs_metadata_is_refused(tmp_path, server, trouble):
    server.troubles = [("GET", trouble)]
    path, error = locate(tmp_path, server.address, "RN50")
    assert not path
    assert re.search(r"SHA-256 0?\w+\.\.\. instead of|consistency|instead of|size", error), error
    assert not (tmp_path / "root" / FILE).exists()
    assert locate(tmp_path, server.address, "RN50")[0]  # the next download works


def test_429_is_retried(tmp_path, server):
    server.troubles = [("HEAD", "429")]
    assert locate(tmp_path, server.address, "RN50")[0]


def test_404_names_the_file_repository_and_folder(tmp_path, server):
    path, error = locate(tmp_path, server.address, "ViT-H-14")
    published = PUBLISHED["ViT-H-14"]
    assert not path
    for words in (published.filename, f"OFA-Sys/{published.repository} on Hugging Face", "404"):
        assert words in error
    assert f"put it into {tmp_path / 'root'}" in error
    assert "CN_CLIP_HUB=modelscope" in error and "HF_ENDPOINT" in error


def test_offline_fails_at_once(tmp_path, server):
    import time

    begin = time.monotonic()
    _, error = locate(tmp_path, "http://127.0.0.1:9", "RN50")
    assert FILE in error
    assert "put it into" in error
    _, error = locate(tmp_path, server.address, "RN50", HF_HUB_OFFLINE="1")
    assert "offline" in error.lower()
    assert server.requests == []
    assert time.monotonic() - begin < 20  # two processes; retries would take 23 s


def test_two_parallel_processes_download_once(tmp_path, server):
    processes = [start(tmp_path, server.address, "RN50") for _ in range(2)]
    answers = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert answers == [str(tmp_path / "root" / FILE)] * 2
    assert len(downloads(server)) == 1


@pytest.mark.parametrize(
    ("name", "kind", "file"), [("QA-CLIP", "vit", ""), ("one-file", "resnet", "epoch_9.pt")]
)
def test_any_repository_with_a_chinese_clip_loads_by_its_name(tmp_path, server, name, kind, file):
    path, error = locate(tmp_path, server.address, f"someone/{name}")
    assert path.endswith(f"someone--{name}/{file}".rstrip("/")), error
    assert weights.build(weights.read(path)).config.vision.kind == kind
    count = len(server.requests)
    assert locate(tmp_path, server.address, f"someone/{name}")[0] == path
    assert len(server.requests) == count


def test_another_architecture_is_refused_before_its_weights_are_downloaded(tmp_path, server):
    _, error = locate(tmp_path, server.address, "someone/blip")
    assert "someone/blip is a model of type 'blip', not a Chinese-CLIP" in error
    assert not any("safetensors" in path for _, path, _ in server.requests)


def test_a_repository_without_weights_lists_its_files(tmp_path, server):
    _, error = locate(tmp_path, server.address, "someone/data")
    assert "no Chinese-CLIP in a known format" in error
    assert "it has train.tsv" in error


def test_a_missing_repository_is_reported(tmp_path, server):
    _, error = locate(tmp_path, server.address, "someone/nothing")
    assert "is not a file or folder, and could not be downloaded from Hugging Face" in error


def test_an_unknown_hub_is_refused(tmp_path, server):
    _, error = locate(tmp_path, server.address, "RN50", CN_CLIP_HUB="github")
    assert "CN_CLIP_HUB='github' is not a known hub; give huggingface or modelscope" in error
