"""Training batches: worker processes decode images and tokenise texts, in the planned order.

Unreadable pairs are skipped, counted and reported. Their batch is smaller; no other pair moves.
"""

from __future__ import annotations

import itertools
import math
import re
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cn_clip import distributed
from cn_clip.data.captions import digest
from cn_clip.data.loading.augment import augment, generator_for
from cn_clip.data.loading.sampler import BatchPart, batch_count, batches, plan_of
from cn_clip.data.loading.stream_plan import Span
from cn_clip.data.sources.base import Row, Source, located
from cn_clip.data.sources.open import Chain, WeightedSource, id_digest, is_forkable
from cn_clip.data.sources.row_keys import caption_key
from cn_clip.errors import CNClipError, DataError
from cn_clip.image.decode import read_image, read_pixels
from cn_clip.processes import end_with_parent, ignore_signals_in_worker
from cn_clip.tokenizer import CONTEXT_LENGTH, default_tokenizer
from cn_clip.translation import _

_Item = TypeVar("_Item")

# Texts are padded to one of these lengths, so that a compiled model sees few shapes.
_PADDED_LENGTHS = (8, 12, 16, 24, 32, 40, 52, 64, 96, 128, 256, 512)
_GRACE_SECONDS = 600.0
_MAX_PREFETCH = 16  # batches per worker; all are planned before the first is yielded
MAX_LISTED = 1000  # reasons of skipped pairs that are kept
_TIMED = 16  # batches of a worker whose times are kept

_workers: dict[int, int] = {}  # process ids of the latest workers, by number


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pairs become pixels and token ids.

    ``resolution`` is in pixels. With ``augmented``, images are augmented (see ``augment``) as a
    function of (``seed``, epoch, image id) alone; otherwise they are resized exactly as for
    embedding. ``background`` is the colour behind transparent pixels; None ignores transparency.
    """

    resolution: int = 224
    context_length: int = CONTEXT_LENGTH
    augmented: bool = False
    flip: bool = False
    fast_decode: bool = False
    background: str | None = None
    seed: int = 0


@dataclass(slots=True)
class Batch:
    """The local batch of one process.

    Attributes:
        pixels: uint8 (B, 3, S, S), not normalised; the model takes ``(pixels / 255 - mean) / std``.
        ids: int64 (B, L), L the length of the longest text, rounded up.
        rows: texts and ids of the B pairs.
        keys: int64 (B, 3), see ``keys_of``.
        skipped: a message for each unreadable pair.
        worker: number of the worker that prepared it, -1 for this process.
        seconds: time of the preparation.
    """

    pixels: Tensor
    ids: Tensor
    rows: list[Row]
    keys: Tensor
    skipped: list[str] = field(default_factory=list)
    worker: int = -1
    seconds: float = 0.0

    def pin_memory(self) -> Batch:
        self.pixels, self.ids = self.pixels.pin_memory(), self.ids.pin_memory()
        return self


class PlannedLoader:
    """What loaders have in common: the planned batches of a mix, and the counts of skipped pairs.

    Attributes:
        plan: the pairs of every epoch, in order.
        seen: number of pairs read so far, skipped ones included.
        skipped: number of unreadable pairs.
        reasons: messages of the first 1000 skipped pairs.
        worker_seconds: seconds that each worker took for its last batches, by number.
        next_worker: number and process id of the worker that has the next batch, if any.
    """

    def __init__(
        self,
        mix: Sequence[WeightedSource],
        global_batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_skipped_fraction: float = 0.1,
    ) -> None:
        """Plan the epochs of a mix.

        Args:
            mix: sources and their weights, from ``open_mix``.
            global_batch_size: pairs per batch, over all processes.
            seed: of the order.
            rank: of this process, among ``world_size`` processes.
            max_skipped_fraction: fraction of unreadable pairs above which loading fails.
        """
        self.plan = plan_of(mix, seed, global_batch_size)
        self.seen, self.skipped = 0, 0
        self.reasons: list[str] = []
        self.worker_seconds: dict[int, deque[float]] = {}
        self.next_worker: tuple[int, int] | None = None
        self.sources = [part.source for part in mix]
        self._size, self._rank, self._world_size = global_batch_size, rank, world_size
        self._max_skipped_fraction = max_skipped_fraction

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return batch_count(self.plan, self._size, self._world_size)

    def parts(self, epoch: int, start: int) -> Iterator[BatchPart]:
        """Yield the pairs of this process's batches of an epoch, from batch ``start`` on.

        What a batch needs of streamed sources is read ahead when it is yielded.
        """
        begun: set[Span] = set()
        for part in batches(
            self.plan, epoch, self._size, rank=self._rank, world_size=self._world_size, start=start
        ):
            for span in part.spans:
                source = self.sources[span.source]
                if span not in begun and isinstance(source, Chain):
                    source.read_ahead(span.first, span.stop)
            begun = set(part.spans)
            yield replace(part, spans=())

    def count(self, pairs: int, reasons: Sequence[str]) -> None:
        """Count the pairs of a batch; there is a reason for each that was skipped.

        Raises:
            DataError: more than ``max_skipped_fraction`` of the pairs so far were skipped.
        """
        self.seen += pairs
        self.skipped += len(reasons)
        self.reasons += reasons[: MAX_LISTED - len(self.reasons)]
        # The fraction is meaningful after a few hundred pairs, or all of a small source.
        enough = self.seen >= min(500, len(self.plan) // self._world_size)
        if enough and self.skipped > self._max_skipped_fraction * self.seen:
            raise DataError(
                _(
                    "{skipped:,} of {seen:,} pairs cannot be read, above the limit of "
                    "{max_skipped_fraction:.0%}; the first: {reason}. See: cn-clip data check",
                    skipped=self.skipped,
                    seen=self.seen,
                    max_skipped_fraction=self._max_skipped_fraction,
                    reason=self.reasons[0],
                )
            )


class Loader(PlannedLoader):
    """Yields batches whose images are decoded in worker processes."""

    def __init__(
        self,
        mix: Sequence[WeightedSource],
        preparation: Preparation,
        global_batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        prefetch_bytes: int = 1 << 30,
        max_skipped_fraction: float = 0.1,
        pin_memory: bool = False,
    ) -> None:
        """Plan the epochs of a mix; see ``PlannedLoader`` for the other arguments.

        Args:
            preparation: how pairs become pixels and token ids.
            workers: number of worker processes; 0 loads in this process. Any ``multiprocessing``
                start method works.
            prefetch_bytes: limit of prefetched data; at least one batch per worker is prefetched.
            pin_memory: put batches into pinned memory.
        """
        super().__init__(
            mix,
            global_batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            max_skipped_fraction=max_skipped_fraction,
        )
        self._preparation, self._workers, self._pin = preparation, workers, pin_memory
        self._context = worker_context(self.sources)
        batch_bytes = math.ceil(global_batch_size / world_size) * 3 * preparation.resolution**2
        fits = prefetch_bytes // (batch_bytes * max(1, workers))
        self._prefetch = min(max(1, fits), _MAX_PREFETCH)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from batch ``start`` on; earlier ones are not read.

        Raises:
            DataError: more than ``max_skipped_fraction`` of the pairs are unreadable, or a worker
                died.
        """
        loader = DataLoader(
            _BatchDataset(self.sources, self._preparation),
            sampler=_PartSampler(self.parts(epoch, start)),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            pin_memory=self._pin,
            worker_init_fn=init_worker,
            multiprocessing_context=self._context if self._workers else None,
        )
        with map_worker_errors(), open_iterator(loader) as iterator:
            workers = list(_workers.items())
            for turn in itertools.count():  # the workers take turns
                self.next_worker = workers[turn % len(workers)] if workers else None
                batch = next(iterator, None)
                if batch is None:
                    break
                seconds = self.worker_seconds.setdefault(batch.worker, deque(maxlen=_TIMED))
                seconds.append(batch.seconds)
                self.count(len(batch.rows) + len(batch.skipped), batch.skipped)
                yield batch


def worker_context(sources: Sequence[Source]) -> str | None:
    """Return the start method of workers that read sources; None for Python's default."""
    return None if all(is_forkable(source) for source in sources) else "forkserver"


@contextmanager
def open_iterator(loader: DataLoader[_Item]) -> Iterator[Iterator[_Item]]:
    """Yield an iterator over a loader, and shut down its workers on exit.

    torch shuts them down when the iterator is garbage-collected. The traceback of an error keeps it
    alive, and until then a dying worker raises an error in unrelated code.
    """
    iterator = iter(loader)
    processes = getattr(iterator, "_workers", ())  # missing without workers
    _workers.clear()
    _workers.update({number: process.pid for number, process in enumerate(processes)})
    try:
        yield iterator
    finally:
        shutdown = getattr(iterator, "_shutdown_workers", None)  # missing without workers
        if shutdown is not None:
            shutdown()


@contextmanager
def map_worker_errors() -> Iterator[None]:
    """Turn torch's error about a dead worker into a ``DataError``.

    torch raises it in whatever code runs when the worker dies, not only in the loader.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            reason = _with_worker_numbers(str(error).splitlines()[0])
        elif _is_lost_batch(error):
            reason = _(
                "the batch of a DataLoader worker is lost: {error_type}",
                error_type=type(error).__name__,
            )
        else:
            raise
        raise DataError(
            _(
                "a worker that reads data for process {rank} died ({reason}); if memory ran out, "
                "lower data.workers or data.prefetch_mb",
                rank=distributed.rank(),
                reason=reason,
            )
        ) from error


def _with_worker_numbers(reason: str) -> str:
    """Put the numbers of the workers into torch's message, which has their process ids."""
    pids = set(re.findall(r"\d+", reason))
    dead = [str(number) for number, pid in _workers.items() if str(pid) in pids]
    if not dead:
        return reason.strip()
    return _("worker {numbers}: {reason}", numbers=", ".join(dead), reason=reason.strip())


def _is_lost_batch(error: BaseException) -> bool:
    """Return whether a worker died between announcing a batch and sharing its memory."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).name == "resource_sharer.py" for frame in frames)


def prepare(sources: Sequence[Source], part: BatchPart, preparation: Preparation) -> Batch:
    """Read, decode and tokenise a local batch."""
    rows: list[Row] = []
    keys: list[list[int]] = []
    pixels: list[npt.NDArray[np.uint8]] = []
    skipped: list[str] = []
    for number, index in zip(part.sources.tolist(), part.indexes.tolist(), strict=True):
        source = sources[number]
        try:
            row = source.row(index)
            if not row.text.strip():
                raise DataError(_("its text is empty"))
            pixels.append(pixels_of(source.image(index), row.image_id, part.epoch, preparation))
        except CNClipError as error:
            skipped.append(located(source, index, error))
            continue
        rows.append(row)
        keys.append(keys_of(row, source, number, index))
    return Batch(
        stack_pixels(pixels, preparation.resolution),
        token_ids([row.text for row in rows], preparation.context_length),
        rows,
        stack_keys(keys),
        skipped,
    )


def keys_of(row: Row, source: Source, number: int, index: int) -> list[int]:
    """Return three 64-bit keys of a pair: image id, text id, text.

    Two pairs of a mix that share any key are not negatives of each other. Ids are unique within
    one file of a source, so its ``number`` and the file are part of the key. Texts are compared
    without width, case, spaces and punctuation, unless nothing else is left.
    """
    ids = row.image_id, row.text_id
    image_id_key, text_id_key = (digest(f"{number}\0{id_digest(source, index, id)}") for id in ids)
    return [image_id_key, text_id_key, caption_key(row.text)]


def stack_keys(keys: Sequence[Sequence[int]]) -> Tensor:
    """Stack the keys of B pairs, which may be 0: int64 (B, 3)."""
    return torch.from_numpy(np.array(keys, np.uint64).reshape(-1, 3).view(np.int64))


def token_ids(texts: Sequence[str], context_length: int) -> Tensor:
    """Tokenise B texts: int64 (B, L), L the length of the longest, rounded up."""
    tokenizer = default_tokenizer()
    encoded = tokenizer.encode(texts, context_length)
    longest = max(map(len, encoded), default=2)
    length = next((padded for padded in _PADDED_LENGTHS if padded >= longest), longest)
    return torch.from_numpy(tokenizer.pad(encoded, min(length, context_length)))


def pixels_of(
    content: bytes, image_id: str, epoch: int, preparation: Preparation
) -> npt.NDArray[np.uint8]:
    """Decode and prepare the bytes of one image: uint8 (S, S, 3).

    Raises:
        ImageError: the image cannot be decoded.
    """
    size = preparation.resolution
    fast, background = preparation.fast_decode, preparation.background
    if not preparation.augmented:
        return read_pixels(content, size, fast_decode=fast, background=background)
    image = read_image(content, fast_decode=size if fast else None, background=background)
    rng = generator_for(preparation.seed, epoch, image_id)
    return augment(image, size, rng, flip=preparation.flip)


def stack_pixels(pixels: Sequence[npt.NDArray[np.uint8]], size: int) -> Tensor:
    """Stack B images (S, S, 3), which may be 0: uint8 (B, 3, S, S)."""
    stacked = np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(stacked, -1, 1)))


class _BatchDataset(Dataset[Batch]):
    """A dataset indexed by ``BatchPart``."""

    def __init__(self, sources: Sequence[Source], preparation: Preparation) -> None:
        self._sources, self._preparation = sources, preparation

    def __getitem__(self, part: BatchPart) -> Batch:
        start, worker = time.monotonic(), get_worker_info()
        batch = prepare(self._sources, part, self._preparation)
        batch.worker = -1 if worker is None else worker.id
        batch.seconds = time.monotonic() - start
        return batch


class _PartSampler(torch.utils.data.Sampler[BatchPart]):
    def __init__(self, parts: Iterator[BatchPart]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[BatchPart]:
        return self._parts


def init_worker(_: int) -> None:
    """Set up a worker: one thread, and no answer to Ctrl-C or the first SIGTERM.

    Both are often sent to the whole process group. The parent saves first, and then shuts down its
    workers. A worker also ends when its parent ends.
    """
    torch.set_num_threads(1)
    ignore_signals_in_worker(_on_sigterm)
    end_with_parent()


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    """Keep working while the parent finishes its step; a second SIGTERM or a timeout ends this."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, _GRACE_SECONDS)
