"""The state of a server: its model, its library, and whether it is ready."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from cn_clip.backends.pipeline import ImagePreparation
from cn_clip.embedder import Embedder, load
from cn_clip.errors import CNClipError, UsageError
from cn_clip.publish import write_text
from cn_clip.search.background import prepare_search
from cn_clip.search.folder import StoredModel
from cn_clip.search.library import Library
from cn_clip.search.library_model import load_for
from cn_clip.search.places import ABOUT, is_shard_folder, library_path
from cn_clip.serve.engine import Engine, QueuedEmbedder, best_image_batch
from cn_clip.serve.fetch import fetch_image
from cn_clip.serve.gate import Gate
from cn_clip.serve.inputs import Content, Url
from cn_clip.serve.keys import Keys
from cn_clip.serve.metrics import Metrics
from cn_clip.serve.problems import RequestError, problem_of, unavailable
from cn_clip.serve.settings import Settings
from cn_clip.shards.library import ShardLibrary
from cn_clip.text import path_text
from cn_clip.translation import _

T = TypeVar("T")

DEFAULT_MODEL = "mini"
_SEARCH_THREADS = 4
_IMAGE_THREADS = 2
_TICK_SECONDS = 1.0
_IMAGE_BATCH = "image_batch"  # file in the folder of a run

log = logging.getLogger("cn_clip.serve")


class ServedLibrary(Library):
    """A library whose queries join the queues of the server's model."""

    service: Service

    def embedder(self, model: StoredModel | None = None) -> Embedder:
        """Return the model of the library; a search calls this in a thread."""
        stored = model or self.folder.snapshot().model
        service = self.service
        assert service.loop is not None
        engine = asyncio.run_coroutine_threadsafe(service.engine_for(stored), service.loop).result()
        return cast(Embedder, QueuedEmbedder(engine, service.loop))


class ServedShards(ShardLibrary):
    """Embedding shards whose queries join the queues of the server's model."""

    service: Service

    def embedder(self) -> Embedder:
        """Return the model of the shards; a search calls this in a thread."""
        service = self.service
        assert service.loop is not None
        engine = asyncio.run_coroutine_threadsafe(service.engine(), service.loop).result()
        return cast(Embedder, QueuedEmbedder(engine, service.loop))


class Service:
    """What the routes share. Used from one event loop, once started.

    Attributes:
        settings, metrics: of the server.
        keys: None lets everyone in.
        library: None without one.
        shards: None unless the library is a folder of embedding shards.
        searches, renderings: threads for blocking work.
        started: Unix time.
        index_process: the last index run that was started here.
    """

    def __init__(self, settings: Settings) -> None:
        """Open the library and load the model.

        Raises:
            CNClipError: that is impossible.
        """
        self.settings = settings
        self.metrics = Metrics()
        self.keys = Keys(settings.keys, settings.key) if settings.needs_key else None
        self.library: ServedLibrary | None = None
        self.shards: ServedShards | None = None
        if settings.library is not None:
            self._open(settings.library)
        timeout = settings.timeout
        self.searches = Gate(
            "search", threads=_SEARCH_THREADS, bound=settings.search_bound, timeout=timeout
        )
        self.renderings = Gate(
            "image", threads=_IMAGE_THREADS, bound=4 * settings.search_bound, timeout=timeout
        )
        self.fetches = Gate("fetch", threads=8, bound=settings.search_bound, timeout=timeout)
        self.index_process: subprocess.Popen[bytes] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.started = int(time.time())
        self.draining = False
        self._model_lock = asyncio.Lock()
        self._last_use = time.monotonic()
        self._image_batch = settings.image_batch
        stored = self._stored_model()
        self._model_id = stored.id if stored else None
        self._embedder: Embedder | None = self._load(stored)
        self._engine: Engine | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # that nobody waits for

    def _open(self, name: str) -> None:
        """Open the library, or the folder of embedding shards."""
        settings, path = self.settings, library_path(name)
        options: dict[str, Any] = {
            "model": settings.model,
            "backend": settings.backend,
            "device": settings.device,
            "precision": settings.precision,
        }
        if is_shard_folder(path):
            self.shards = ServedShards(path, shards=settings.shards, **options)
            self.shards.service = self
            return
        if settings.shards is not None:
            raise UsageError(
                _("--shards is for embedding shards, and {library} is a library", library=name)
            )
        self.library = ServedLibrary(name, **options)
        self.library.service = self

    async def start(self) -> None:
        """Start the queues in the current event loop."""
        self.loop = asyncio.get_running_loop()
        assert self._embedder is not None
        self._engine = self._start_engine(self._embedder)
        self._embedder = None
        self._ticker = self.loop.create_task(self._tick())
        if self.library is not None:
            self._preparing = self.loop.create_task(self._prepare(self.library))

    async def _prepare(self, library: ServedLibrary) -> None:
        """Bring the caches of the library up to date, so that the first search need not."""
        with suppress(CNClipError):  # an empty or read-only library
            embedder = await asyncio.to_thread(library.embedder)
            await asyncio.to_thread(prepare_search, library.folder, embedder)

    async def close(self) -> None:
        """Finish what is inside, and release everything."""
        self.draining = True
        if self._ticker is not None:
            self._ticker.cancel()
        if self._engine is not None:
            await self._engine.close()
        if self.index_process is not None:
            self.index_process.terminate()  # committed images stay
        for gate in (self.searches, self.renderings, self.fetches):
            gate.close()
        if self.library is not None:
            self.library.close()

    async def engine(self) -> Engine:
        """Return the model; it is loaded again if it was idle.

        Raises:
            CNClipError: it cannot be loaded.
        """
        self._last_use = time.monotonic()
        if self._engine is not None:
            return self._engine
        stored = await self.searches.run(self._stored_model)
        return await self._switch_to(stored)

    async def engine_for(self, stored: StoredModel) -> Engine:
        """Return the model of the library, which an index run may have changed.

        Raises:
            CNClipError: it cannot be loaded.
        """
        self._last_use = time.monotonic()
        if self._engine is not None and self._model_id == stored.id:
            return self._engine
        return await self._switch_to(stored)

    async def _switch_to(self, stored: StoredModel | None) -> Engine:
        """Load a model, and return it. Loading goes on if the client that asked for it leaves."""
        return await asyncio.shield(self._start_task(self._switch(stored)))

    def _start_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start what goes on whether or not somebody waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def ended(task: asyncio.Task[T]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                task.exception()  # known to whoever still waits; else not worth a traceback

        task.add_done_callback(ended)
        return task

    async def _switch(self, stored: StoredModel | None) -> Engine:
        async with self._model_lock:
            wanted = stored.id if stored else None
            if self._engine is not None and self._model_id == wanted:
                return self._engine
            embedder = await asyncio.to_thread(self._load, stored)
            old, self._engine = self._engine, self._start_engine(embedder)
            self._model_id = wanted
            self._close_later(old)
            return self._engine

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._engine is not None

    def not_ready(self) -> str | None:
        """Return why requests cannot be answered now; None if they can."""
        if self.draining:
            return _("the server is ending")
        if self._engine is not None and not self._engine.healthy:
            return _("a batch does not end")
        if self.library is not None and not self.library_exists():
            return _("the library {library} is gone", library=path_text(self.library.folder.path))
        if self.shards is not None and not is_shard_folder(self.shards.folder.path):
            return _("the library {library} is gone", library=path_text(self.shards.folder.path))
        return None

    def library_exists(self) -> bool:
        """Return whether the folder of the library is still there."""
        return self.library is not None and os.path.exists(self.library.folder.path / ABOUT)

    def opened_library(self) -> ServedLibrary:
        """Return the library.

        Raises:
            RequestError: there is none (404), or it is gone (503).
        """
        if self.library is None:
            raise RequestError(
                _("this server has no library; start it with --library"),
                status=404,
                code="no_library",
            )
        if not self.library_exists():
            raise unavailable(
                _("the library {library} is gone", library=path_text(self.library.folder.path)),
                code="library_gone",
            )
        return self.library

    async def contents(self, images: list[Content]) -> list[bytes | RequestError]:
        """Return the bytes of images; URLs are fetched if that is enabled.

        Raises:
            RequestError: an image is a URL, and these are not fetched.
        """
        if any(isinstance(image, Url) for image in images) and not self.settings.fetch:
            raise RequestError(
                _("this server fetches no URLs; send the image itself as base64"),
                code="fetch_disabled",
            )
        return list(await asyncio.gather(*map(self._content, images)))

    async def _content(self, image: Content) -> bytes | RequestError:
        if not isinstance(image, Url):
            return image
        try:
            return await self.fetches.run(fetch_image, image.url)
        except RequestError as error:
            if error.status in (429, 503):
                raise
            return error
        except CNClipError as error:
            return problem_of(error)

    def _stored_model(self) -> StoredModel | None:
        if self.library is None:
            return None
        return self.library.folder.active_model()

    def _load(self, stored: StoredModel | None) -> Embedder:
        settings = self.settings
        if stored is not None and self.library is not None:
            embedder = load_for(
                self.library.folder,
                stored,
                name=settings.model,
                backend=settings.backend,
                device=settings.device,
                precision=settings.precision,
            )
        elif self.shards is not None:
            embedder = self.shards.load_model()
        else:
            embedder = load(
                settings.model or DEFAULT_MODEL,
                backend=settings.backend,
                device=settings.device,
                precision=settings.precision,
                fast_decode=settings.fast_decode,
            )
        embedder.prepare_image = ImagePreparation(
            embedder.config, embedder.fast_decode, settings.max_pixels
        )
        embedder.embed_texts("预热")  # the first run of a model is slow
        assert embedder.fingerprint  # reads all weights; not later, in the event loop
        if self._image_batch is None:
            self._image_batch = self._measured_image_batch(embedder)
        return embedder

    def _measured_image_batch(self, embedder: Embedder) -> int:
        """Return the batch size of images that pays; a worker that replaces another, whose clients
        wait, takes what that one measured."""
        if self.settings.run_folder is None:
            return best_image_batch(embedder)
        path = Path(self.settings.run_folder) / _IMAGE_BATCH
        with suppress(OSError, ValueError):
            return int(path.read_text(encoding="ascii"))
        size = best_image_batch(embedder)
        with suppress(OSError, CNClipError):
            write_text(path, str(size))
        return size

    def _start_engine(self, embedder: Embedder) -> Engine:
        settings = self.settings
        engine = Engine(
            embedder,
            text_bound=settings.text_bound,
            image_bound=settings.image_bound,
            image_batch=self._image_batch or 1,
            max_wait=settings.max_wait,
            timeout=settings.timeout,
            cached_texts=settings.cached_texts,
            on_batch=self.metrics.batch,
        )
        engine.start()
        self.metrics.loaded.set(1)
        return engine

    def _close_later(self, engine: Engine | None) -> None:
        """Close an engine once the requests inside are done."""
        if engine is not None:
            self._start_task(engine.close())

    async def _tick(self) -> None:
        """Update gauges, and unload an idle model."""
        counted = (0, 0)
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            engine = self._engine
            if engine is None:
                continue
            self.metrics.inside.labels("texts").set(engine.texts.inside)
            self.metrics.inside.labels("images").set(engine.images.inside)
            hits, misses = engine.cache_hits, engine.cache_misses
            if (hits, misses) < counted:  # another engine
                counted = (0, 0)
            self.metrics.cache.labels("hit").inc(max(0, hits - counted[0]))
            self.metrics.cache.labels("miss").inc(max(0, misses - counted[1]))
            counted = (hits, misses)
            idle = time.monotonic() - self._last_use
            limit = self.settings.unload_after
            if limit is not None and idle > limit and not engine.busy:
                self._engine = None
                self.metrics.loaded.set(0)
                self._close_later(engine)
