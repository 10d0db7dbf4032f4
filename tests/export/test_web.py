"""The page in examples/web: it gives the embeddings and probabilities of this package."""

import http.client
import importlib.util
import json
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import cosines
from PIL import Image

import cn_clip
from cn_clip.export import export
from cn_clip.image.decode import read_pixels
from cn_clip.sample import embedded_sample

ROOT = Path(__file__).parents[2]
WEB = ROOT / "examples" / "web"
DRIVERS = Path(__file__).parent / "web"
LABELS = ["猫", "狗", "火箭", "宇航员", "一杯咖啡"]
SIZE = 224


def load_server():
    spec = importlib.util.spec_from_file_location("serve", WEB / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def serving(folder):
    server = load_server().serve(0, folder)
    server.RequestHandlerClass.func.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def get(server, path):
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_the_server_sends_the_headers_for_threads_and_is_on_loopback_only(tmp_path):
    (tmp_path / "a.mjs").write_text("export {}")
    (tmp_path / "a.wasm").write_bytes(b"\0asm")
    with serving(tmp_path) as server:
        assert server.server_address[0] == "127.0.0.1"
        for name, kind in (("a.mjs", "text/javascript"), ("a.wasm", "application/wasm")):
            response, body = get(server, f"/{name}")
            assert (response.status, body) == (200, (tmp_path / name).read_bytes())
            assert response.headers["Content-Type"] == kind
            assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"


def test_the_server_sends_no_file_outside_its_folder_and_no_list(tmp_path):
    folder = tmp_path / "page"
    (folder / "inside").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "page-2").mkdir()
    (tmp_path / "page-2/secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").symlink_to(tmp_path)
    paths = ["/../secret", "/%2e%2e/secret", "/inside/../../secret", "/link", "/folder/secret"]
    paths += ["/../page-2/secret", f"/{tmp_path}/secret", "//etc/passwd", "/inside/", "/", "/%00"]
    with serving(folder) as server:
        for path in paths:
            response, body = get(server, path)
            assert response.status == 404 and b"root:" not in body, path
            assert b"secret" not in body.replace(path.encode(), b""), path


def test_the_page_has_every_text_in_both_languages_and_loads_nothing_from_elsewhere():
    words = json.loads((WEB / "words.json").read_text(encoding="utf-8"))
    assert shape(words["zh"]) == shape(words["en"])
    html = (WEB / "index.html").read_text(encoding="utf-8")
    used = re.findall(r'data-word="(\w+)"', html)
    assert used and set(used) <= set(words["zh"])
    for path in [*WEB.glob("*.mjs"), *WEB.glob("*.css"), WEB / "index.html"]:
        assert not re.search(r"https?://", path.read_text(encoding="utf-8")), path
    for name in re.findall(r'(?:src|href)="([^":]+)"', html):
        assert (WEB / name).is_file()


def shape(words):
    """Return keys and placeholders."""
    if isinstance(words, dict):
        return {key: shape(value) for key, value in words.items()}
    return sorted(re.findall(r"\{\w+\}", words))


def test_packages_are_pinned_and_locked():
    package = json.loads((WEB / "package.json").read_text(encoding="utf-8"))
    lock = json.loads((WEB / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    for name, version in (package["dependencies"] | package["devDependencies"]).items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
        assert lock[f"node_modules/{name}"]["version"] == version
    assert all("integrity" in entry for name, entry in lock.items() if name)


def run(*command, data=None, cwd=None):
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=600, input=json.dumps(data)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """Return a built copy of the page, with mini's export."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    web = tmp_path_factory.mktemp("clone") / "examples" / "web"
    ignored = shutil.ignore_patterns("node_modules", "vendor", "model")
    shutil.copytree(ROOT / "examples", web.parent, dirs_exist_ok=True, ignore=ignored)
    install = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(install, cwd=web, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"npm ci failed, perhaps without a registry: {done.stderr[-200:]}")
    run("npm", "run", "build", cwd=web)
    export("mini", web / "model")
    return web


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::cn_clip.tokenizer.TruncationWarning")
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_node_gives_our_ids_and_embeddings(page, precision, golden_strings, tmp_path):
    folder = page / "model"
    if precision != "float32":
        folder = tmp_path / "model"
        export("mini", folder, precision=precision)
    ours = cn_clip.load(folder, backend="onnx")
    golden = json.loads((folder / "golden/golden.json").read_text(encoding="utf-8"))
    images = [folder / "golden" / image["file"] for image in golden["images"]]
    raw = [tmp_path / f"{path.name}.rgba" for path in images]
    for path, pixels in zip(images, raw, strict=True):
        pixels.write_bytes(Image.open(path).convert("RGBA").tobytes())
    texts = [text for text in golden_strings if "[" not in text]  # see Tokenizer.save
    texts += embedded_sample().texts
    data = {"texts": texts, "images": list(map(str, raw))}
    report = json.loads(run("node", DRIVERS / "node.mjs", page, folder, data=data))
    assert report["ids"] == ours.prepare_texts(texts)
    assert cosines(report["texts"], ours.embed_texts(texts)).min() >= 0.9999
    assert cosines(report["images"], ours.embed_images(images)).min() >= 0.9999
    assert report["cosine"] >= {"float32": 0.99999, "float16": 0.999}[precision]


@pytest.mark.full
def test_the_page_in_chromium_gives_our_probabilities(page, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed")
    golden = json.loads((page / "model/golden/golden.json").read_text(encoding="utf-8"))
    names = [image["file"] for image in golden["images"]]
    images = [
        *sorted((ROOT / "examples").glob("*.jpg")),
        *(page / "model/golden" / n for n in names),
    ]
    (page / "check").mkdir()
    shapes = [(100, 80), (80, 300), (300, 80), (300, 370), (300, 380), (1500, 400), (1, 2)]
    for shape in shapes:  # both orders of the two passes of Pillow, to smaller and larger sides
        noise = np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(page / f"check/{shape[0]}x{shape[1]}.png")
    resized = [f"check/{path.name}" for path in (page / "check").iterdir()]
    Image.new("1", (8000, 7000)).save(tmp_path / "large.png")
    (tmp_path / "notes.txt").write_text("notes")
    shutil.copytree(page, tmp_path / "no-model", ignore=shutil.ignore_patterns("model", "node_*"))
    with serving(page) as server, serving(tmp_path / "no-model") as broken:
        data = {
            "url": f"http://127.0.0.1:{server.server_port}/",
            "broken": f"http://127.0.0.1:{broken.server_port}/",
            "labels": LABELS,
            "images": list(map(str, images)),
            "pixels": [*(f"model/golden/{name}" for name in names), *resized],
            "bad": {
                "notAnImage": str(tmp_path / "notes.txt"),
                "tooLarge": str(tmp_path / "large.png"),
            },
        }
        report = json.loads(run("node", DRIVERS / "browser.mjs", page, chromium, data=data))
    assert report["errors"] == report["foreign"] == []
    assert report["isolated"] and "self-test cosine ≥ 0.99999" in report["details"]
    for path, pixels in report["pixels"].items():
        ours = read_pixels(page / path, SIZE).astype(int)
        difference = np.abs(np.reshape(pixels, (SIZE, SIZE, 4))[..., :3] - ours)
        assert difference.max() <= (path in resized) and difference.mean() < 0.01, path
    expected = cn_clip.classify(cn_clip.load("mini"), images, LABELS)
    for path, best in zip(images, expected.top(len(LABELS)), strict=True):
        ranking = report["results"][str(path)]
        assert ranking[0][0] == best[0][0]
        assert ranking[0][1] == pytest.approx(best[0][1], abs=1e-3)
    assert report["example"][0][0] == "火箭" and report["status"].startswith("Most likely “火箭”")
    assert report["chinese"][0].startswith("最可能是“火箭”") and all(report["alts"])
    problems = report["problems"]
    assert problems["missingModel"].startswith("model/config.json cannot be read; run cn-clip")
    assert problems["notAnImage"].startswith("notes.txt is damaged or not an image")
    assert problems["tooLarge"].startswith("large.png has 8000 × 7000 pixels, above the limit of")
    assert problems["wrongEmbeddings"].startswith("The model gives wrong results in this browser")
    assert problems["manyLabels"] == "There are 101 labels, the limit is 100; remove some."
    assert problems["fewLabels"] == "Write at least two different labels."
