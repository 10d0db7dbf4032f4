"""Servers for tests, in this process, and libraries of a few images."""

import io
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import uvicorn
from conftest import make_image
from PIL import Image

from cn_clip.cli import run
from cn_clip.serve import run as running
from cn_clip.serve.app import create_app
from cn_clip.serve.settings import Settings


def photo(seed=0, *, size=(80, 60), place=True):
    """Return a JPEG file with EXIF: a place, a date, an orientation and a comment."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    exif[0x010E] = "SECRET-NOTE"
    if place:
        exif[0x8825] = {1: "N", 2: (30.0, 15.0, 0.0), 3: "E", 4: (120.0, 9.0, 0.0)}
        exif[0x8769] = {0x9003: f"2024:05:{seed + 1:02d} 12:00:00"}
    stream = io.BytesIO()
    make_image(seed, size).save(stream, "JPEG", exif=exif, comment=b"SECRET-COMMENT")
    return stream.getvalue() + b"SECRET-TRAILER"


def make_library(folder, model, count=6):
    """Return the folder of a library of photos."""
    photos = folder / "photos"
    (photos / "sub").mkdir(parents=True)
    for seed in range(count):
        name = f"sub/{seed}.jpg" if seed % 2 else f"{seed}.jpg"
        (photos / name).write_bytes(photo(seed))
    library = folder / "library"
    assert run(["index", str(photos), "--library", str(library), "--model", str(model)]) == 0
    return library


@contextmanager
def serving(settings):
    """Run a server in a thread; yield a client of it."""
    listening = running._bind(replace(settings, port=0))
    settings = replace(settings, secret=b"test" * 8)
    app = create_app(settings)
    config = running._config(settings, lambda _unused: app)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
            client.service = app._app.state.service
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive()


def body(values):
    """Return the content and headers of a JSON request, for values that json= would refuse."""
    return {
        "content": values if isinstance(values, bytes) else json.dumps(values).encode(),
        "headers": {"content-type": "application/json"},
    }


__all__ = ["Settings", "body", "make_library", "photo", "serving"]
