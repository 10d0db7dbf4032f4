"""What ``cn-clip serve`` was told; the same for all its workers."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from cn_clip.config import BackendName, Precision

PARTS_KEY_VARIABLE = "CN_CLIP_PARTS_KEY"  # of the environment: the API key of the parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of a server.

    Attributes:
        library: name or path, of embedding shards too; None serves a model alone.
        shards: those of embedding shards that are searched; None is all.
        parts: addresses of servers whose results are merged; no model and no library then.
        parts_key: API key for these.
        model: name or path; None is the library's own, or mini.
        backend, device, precision, fast_decode: as ``cn_clip.load``.
        host, port: where it listens.
        keys: file of API keys; None is none.
        key: one more API key, from the environment.
        no_auth: whether everyone who can connect may do everything.
        secret: signs the sessions of the page.
        workers: number of processes.
        run_folder: shared by the processes, for metrics and the state of an index run.
        timeout: seconds until a request fails.
        body_seconds: within which a body must arrive.
        max_body: bytes of a body.
        max_buffered: bytes of all bodies inside one process.
        max_inputs: texts, images and labels of a request.
        max_text: characters of a text.
        max_pixels: of an image in a request.
        max_results: of a search.
        text_bound: tokens of all texts inside one process.
        image_bound: images inside one process.
        max_wait: estimated seconds in the queue of images, beyond which requests are refused.
        search_bound: searches inside one process.
        image_batch: images per batch; None measures what pays.
        cached_texts: embeddings of texts that are kept.
        unload_after: seconds without a request after which the model is unloaded; None is never.
        fetch: whether images may be given as URLs.
        original_files: whether files may be served as they are, with EXIF and GPS.
        show_paths: whether results have absolute paths.
        allow_index: whether a client may start ``cn-clip index``.
        log_queries: whether the log has the text of queries.
    """

    library: str | None = None
    shards: range | None = None
    parts: tuple[str, ...] = ()
    parts_key: str | None = field(default=None, repr=False)
    model: str | None = None
    backend: BackendName = "auto"
    device: str = "auto"
    precision: Precision = "auto"
    fast_decode: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    keys: str | None = None
    key: str | None = field(default=None, repr=False)
    no_auth: bool = False
    secret: bytes = field(default=b"", repr=False)
    workers: int = 1
    run_folder: str | None = None
    timeout: float = 30.0
    body_seconds: float = 20.0
    max_body: int = 32 << 20
    max_buffered: int = 256 << 20
    max_inputs: int = 256
    max_text: int = 20_000
    max_pixels: int = 1 << 26
    max_results: int = 1000
    text_bound: int = 32_768
    image_bound: int = 64
    search_bound: int = 64
    max_wait: float = 5.0
    image_batch: int | None = None
    cached_texts: int = 4096
    unload_after: float | None = None
    fetch: bool = False
    original_files: bool = False
    show_paths: bool = False
    allow_index: bool = False
    log_queries: bool = False

    @property
    def needs_key(self) -> bool:
        """Whether requests need an API key or a session."""
        return self.keys is not None or self.key is not None

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can connect."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Return whether an address or name is that of this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
