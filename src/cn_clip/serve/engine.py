"""One loaded model behind its two queues, and the embeddings of recent queries."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cn_clip.backends.pipeline import PreparedImage
from cn_clip.embedder import Embedder
from cn_clip.errors import CNClipError, ImageError
from cn_clip.processes import usable_cpus
from cn_clip.serve.batching import Batcher
from cn_clip.serve.problems import RequestError, too_late
from cn_clip.translation import _

Vector = npt.NDArray[np.float32]

_TOKENS_PER_BATCH = 4096
_TEXTS_PER_BATCH = 256
_IMAGE_BATCHES = (1, 4, 16)  # sizes that are measured
_WORTHWHILE = 1.1  # throughput of a larger batch against a smaller one
_MEASURE_SECONDS = 1.0


class EmbeddedText(NamedTuple):
    """An embedding (D,), and the number of tokens of its text."""

    vector: Vector
    tokens: int


class Engine:
    """A model that serves concurrent requests. Used from one event loop.

    Attributes:
        embedder: the model.
        texts, images: the queues of its towers.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        text_bound: int,
        image_bound: int,
        image_batch: int,
        max_wait: float,
        timeout: float,
        cached_texts: int,
        on_batch: Callable[[str, int, float], None] = lambda tower, items, seconds: None,
    ) -> None:
        """Create the queues of a model.

        Args:
            embedder: the model.
            text_bound: tokens of all texts inside, beyond which requests are refused.
            image_bound: images inside.
            image_batch: images per batch, see ``best_image_batch``.
            max_wait: estimated seconds in the queue of images, beyond which requests are refused.
            timeout: seconds until a request fails.
            cached_texts: number of embeddings of texts that are kept.
            on_batch: called after each batch with the tower, its number of items and its seconds.
        """
        self.embedder, self.timeout = embedder, timeout
        self.texts = Batcher[str, EmbeddedText](
            self._run_texts,
            name="texts",
            budget=_TOKENS_PER_BATCH,
            max_items=_TEXTS_PER_BATCH,
            bound=text_bound,
            max_wait=timeout,  # larger batches are faster: the estimate from small ones is too long
            on_batch=lambda items, seconds: on_batch("texts", items, seconds),
        )
        self.images = Batcher[PreparedImage, Vector](
            self._run_images,
            name="images",
            budget=image_batch,
            max_items=image_batch,
            bound=image_bound,
            max_wait=max_wait,
            on_batch=lambda items, seconds: on_batch("images", items, seconds),
        )
        self._cached_texts = cached_texts
        self._cache: OrderedDict[str, EmbeddedText] = OrderedDict()
        self._decoding = ThreadPoolExecutor(
            min(4, usable_cpus()), thread_name_prefix="cn_clip-decode"
        )
        self.cache_hits = self.cache_misses = 0

    def start(self) -> None:
        """Start the queues in the current event loop."""
        self.texts.start()
        self.images.start()

    async def close(self) -> None:
        """Finish what is inside, and release the threads."""
        await self.texts.close()
        await self.images.close()
        self._decoding.shutdown(wait=False)

    @property
    def healthy(self) -> bool:
        """Whether both queues work."""
        return self.texts.healthy and self.images.healthy

    @property
    def busy(self) -> bool:
        """Whether a request is inside."""
        return bool(self.texts.inside or self.images.inside)

    def cost_of(self, text: str) -> int:
        """Return an estimate of a text's tokens, without tokenizing it."""
        return min(len(text) + 2, self.embedder.context_length)

    async def embed_texts(self, texts: Sequence[str]) -> list[EmbeddedText]:
        """Return the embedding of each text.

        Raises:
            RequestError: there is no room (429), or no time (503).
        """
        found = {text: entry for text in texts if (entry := self._cached(text))}
        self.cache_hits += len(texts) - (new := sum(text not in found for text in texts))
        self.cache_misses += new
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if missing:
            costs = [self.cost_of(text) for text in missing]
            with self.texts.admitted(sum(costs)):
                try:
                    async with asyncio.timeout(self.timeout):
                        results = await self.texts.run(missing, costs)
                except TimeoutError:
                    raise too_late(self.timeout) from None
            for text, result in zip(missing, results, strict=True):
                if isinstance(result, Exception):
                    raise _failed(result)
                found[text] = result
                self._keep(text, result)
        return [found[text] for text in texts]

    async def embed_images(self, contents: Sequence[bytes]) -> list[Vector | CNClipError]:
        """Return the embedding (D,) of each encoded image, or its error.

        Raises:
            RequestError: there is no room (429), or no time (503).
        """
        loop = asyncio.get_running_loop()
        with self.images.admitted(len(contents)):
            try:
                async with asyncio.timeout(self.timeout):
                    prepared = await asyncio.gather(
                        *(
                            loop.run_in_executor(
                                self._decoding, copy_context().run, self._prepare, content
                            )
                            for content in contents
                        )
                    )
                    pixels = [item for item in prepared if not isinstance(item, ImageError)]
                    results = iter(await self.images.run(pixels, [1] * len(pixels)))
            except TimeoutError:
                raise too_late(self.timeout) from None
        out: list[Vector | CNClipError] = []
        for item in prepared:
            result = item if isinstance(item, ImageError) else next(results)
            if isinstance(result, Exception) and not isinstance(result, CNClipError):
                result = _failed(result)
            out.append(result)
        return out

    def _prepare(self, content: bytes) -> PreparedImage | ImageError:
        try:
            return self.embedder.prepare_image(content)
        except ImageError as error:
            return error

    def _run_texts(self, texts: list[str]) -> list[EmbeddedText]:
        ids = self.embedder.prepare_texts(texts)
        vectors = self.embedder.embed_prepared_texts(ids)
        # Copies, since a view in the cache would keep its whole batch.
        return [EmbeddedText(v.copy(), len(i)) for v, i in zip(vectors, ids, strict=True)]

    def _run_images(self, images: list[PreparedImage]) -> list[Vector]:
        return list(self.embedder.embed_prepared_images(images))

    def _cached(self, text: str) -> EmbeddedText | None:
        entry = self._cache.get(text)
        if entry is not None:
            self._cache.move_to_end(text)
        return entry

    def _keep(self, text: str, entry: EmbeddedText) -> None:
        self._cache[text] = entry
        while len(self._cache) > self._cached_texts:
            self._cache.popitem(last=False)


class QueuedEmbedder:
    """An ``Embedder`` for other threads, whose inputs join the queues of an engine."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._loop = engine, loop

    def embed_texts(self, texts: str | Sequence[str]) -> Vector:
        """As ``Embedder.embed_texts``."""
        listed = [texts] if isinstance(texts, str) else list(texts)
        found = asyncio.run_coroutine_threadsafe(
            self._engine.embed_texts(listed), self._loop
        ).result()
        return np.stack([entry.vector for entry in found])

    def embed_images(self, images: bytes | Sequence[bytes]) -> Vector:
        """As ``Embedder.embed_images``, for encoded images."""
        listed = [images] if isinstance(images, bytes) else list(images)
        found = asyncio.run_coroutine_threadsafe(
            self._engine.embed_images(listed), self._loop
        ).result()
        for item in found:
            if isinstance(item, CNClipError):
                raise item
        return np.stack([item for item in found if not isinstance(item, CNClipError)])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine.embedder, name)


def best_image_batch(embedder: Embedder) -> int:
    """Return the batch size of images that pays, measured in about a second.

    On CPUs a batch of one is often as fast as any; then larger ones only delay the first image.
    """
    side = embedder.config.vision.resolution
    image = np.zeros((3, side, side), np.uint8)
    best, best_rate = 1, 0.0
    embedder.embed_prepared_images([image])  # the first run is slower
    for size in _IMAGE_BATCHES:
        start = time.perf_counter()
        runs = 0
        while not runs or time.perf_counter() - start < _MEASURE_SECONDS / len(_IMAGE_BATCHES):
            embedder.embed_prepared_images([image] * size)
            runs += 1
        rate = runs * size / (time.perf_counter() - start)
        if rate < best_rate * _WORTHWHILE:
            break
        best, best_rate = size, rate
        if 4 * size / rate > _MEASURE_SECONDS:  # a slow model: a larger batch takes too long
            break
    return best


def _failed(error: Exception) -> RequestError:
    """Return the failure of a runtime as the refusal of its request."""
    if isinstance(error, RequestError):
        return error
    return RequestError(
        _("the model failed: {reason}", reason=str(error) or type(error).__name__),
        status=503,
        code="model_failed",
    )
