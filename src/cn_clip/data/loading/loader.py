"""Batches for training: pictures decoded and texts tokenised in workers, in the planned order.

What cannot be read is left out, counted and named; a batch is then smaller, and no pair moves to
another place.
"""

from __future__ import annotations

import math
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cn_clip.data.captions import digest, plain
from cn_clip.data.loading.augment import augment, generator_for
from cn_clip.data.loading.sampler import BatchPart, Plan, batch_count, batches, plan_of
from cn_clip.data.sources.base import Row, Source, located
from cn_clip.data.sources.open import Weighted, id_digest
from cn_clip.errors import CNClipError, DataError
from cn_clip.image.decode import read_image, read_pixels
from cn_clip.processes import end_with_parent, leave_signals_to_parent
from cn_clip.tokenizer import CONTEXT_LENGTH, default_tokenizer

_Item = TypeVar("_Item")

# Texts are padded to one of few lengths, so that a compiled model sees few shapes.
_LENGTHS = (8, 12, 16, 24, 32, 40, 52, 64, 96, 128, 256, 512)
_SPARED_SECONDS = 600.0
LISTED = 1000  # names of skipped pairs that are kept


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a pair becomes numbers.

    ``resolution`` is in pixels. With ``augmented``, images are cropped at random and distorted
    (see ``augment``), which depends on (``seed``, epoch, image id) alone; else they are squashed,
    exactly as for embedding. Transparent pixels are laid on ``background``, if given.
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
    """One process's share of a batch.

    Attributes:
        pixels: uint8 (B, 3, S, S); ``(pixels / 255 - mean) / std`` is what the model takes.
        ids: int64 (B, L), L the length of the longest text, rounded up.
        rows: texts and ids of the B pairs.
        keys: int64 (B, 3), see ``keys_of``.
        epoch, batch: where in the plan this is.
        skipped: a sentence for each pair that could not be read.
    """

    pixels: Tensor
    ids: Tensor
    rows: list[Row]
    keys: Tensor
    epoch: int
    batch: int
    skipped: list[str] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        self.pixels, self.ids = self.pixels.pin_memory(), self.ids.pin_memory()
        return self


class Loader:
    """Yields the batches of an epoch, and counts what was left out.

    Attributes:
        seen: how many pairs were asked for so far.
        skipped: how many of them could not be read.
        reasons: a sentence for each of the first thousand of those.
    """

    def __init__(
        self,
        mix: Sequence[Weighted],
        preparation: Preparation,
        global_batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        prefetch_bytes: int = 1 << 30,
        max_skipped_fraction: float = 0.1,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        """Plan the epochs of a mix.

        Args:
            mix: sources and their weights, from ``open_mix``.
            preparation: how pairs become numbers.
            global_batch_size: pairs in a batch, over all processes.
            seed: of the order.
            rank: which of ``world_size`` processes this is.
            workers: processes that read and decode; 0 does it in this one. They are started as
                ``multiprocessing`` is set to; any start method will do.
            prefetch_bytes: how much prepared data may wait; one batch a worker always may.
            max_skipped_fraction: the share of unreadable pairs above which the run ends.
            drop_last: leave out the last batch of an epoch if it is not full.
            pin_memory: put batches where a GPU fetches them faster.
        """
        self.plan: Plan = plan_of(mix, seed)
        self.seen, self.skipped = 0, 0
        self.reasons: list[str] = []
        self._mix, self._preparation = mix, preparation
        self._size, self._rank, self._world_size = global_batch_size, rank, world_size
        self._workers, self._max_skipped_fraction = workers, max_skipped_fraction
        self._drop_last, self._pin = drop_last, pin_memory
        each = math.ceil(global_batch_size / world_size) * 3 * preparation.resolution**2
        self._prefetch = max(1, prefetch_bytes // (each * max(1, workers)))

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return batch_count(self.plan, self._size, self._world_size, self._drop_last)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield an epoch's batches from number ``start`` on; what came before is not read.

        Raises:
            DataError: more pairs than the stated share cannot be read, or a worker died.
        """
        parts = batches(
            self.plan,
            epoch,
            self._size,
            rank=self._rank,
            world_size=self._world_size,
            start=start,
            drop_last=self._drop_last,
        )
        prepared = DataLoader(
            _Prepared([part.source for part in self._mix], self._preparation),
            sampler=_Parts(parts),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            pin_memory=self._pin,
            worker_init_fn=worker_starts,
        )
        with dead_workers_named(), worked(prepared) as found:  # they may die while they start, too
            for batch in found:
                self._count(batch)
                yield batch

    def _count(self, batch: Batch) -> None:
        self.seen += len(batch.rows) + len(batch.skipped)
        self.skipped += len(batch.skipped)
        self.reasons += batch.skipped[: LISTED - len(self.reasons)]
        check_skipped(self, len(self.plan) // self._world_size, self._max_skipped_fraction)


@contextmanager
def worked(loader: DataLoader[_Item]) -> Iterator[Iterator[_Item]]:
    """Yield what a loader yields, and end its workers afterwards, whatever happened.

    torch ends them when the iterator is forgotten. An error's traceback remembers it, and as long
    as it does, the death of a worker is an error wherever the program happens to be.
    """
    found = iter(loader)
    try:
        yield found
    finally:
        end = getattr(found, "_shutdown_workers", None)  # without workers there is none
        if end is not None:
            end()


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """Turn torch's error about a worker that died into a ``DataError``.

    It comes out of whatever runs when the worker dies, not only where batches are asked for.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            said = str(error).splitlines()[0]
        elif _lost_with_a_worker(error):
            said = f"DataLoader worker took a batch along: {type(error).__name__}"
        else:
            raise
        raise DataError(
            f"a worker that reads data died ({said}); if memory ran out, take fewer workers or a "
            "smaller prefetch"
        ) from error


def _lost_with_a_worker(error: BaseException) -> bool:
    """Tell whether a batch was announced, but its worker was gone when its memory was asked for."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).name == "resource_sharer.py" for frame in frames)


class Counted(Protocol):
    """What a loader counts."""

    seen: int
    skipped: int
    reasons: list[str]


def check_skipped(loader: Counted, planned: int, most: float) -> None:
    """Raise a ``DataError`` if more than the share ``most`` of the pairs cannot be read."""
    # A share is told from a few hundred pairs, or from all there are.
    enough = loader.seen >= min(500, planned)
    if enough and loader.skipped > most * loader.seen:
        raise DataError(
            f"{loader.skipped:,} of {loader.seen:,} pairs cannot be read, above the limit of "
            f"{most:.0%}; the first: {loader.reasons[0]}. See: cn-clip data check"
        )


def prepare(sources: Sequence[Source], part: BatchPart, preparation: Preparation) -> Batch:
    """Read, decode and tokenise one process's share of a batch."""
    rows: list[Row] = []
    keys: list[list[int]] = []
    pixels: list[npt.NDArray[np.uint8]] = []
    skipped: list[str] = []
    for number, index in zip(part.sources.tolist(), part.indexes.tolist(), strict=True):
        source = sources[number]
        try:
            row = source.row(index)
            if not row.text.strip():
                raise DataError("its text is empty")
            pixels.append(pixels_of(source.image(index), row.image_id, part.epoch, preparation))
        except CNClipError as error:
            skipped.append(located(source, index, error))
            continue
        rows.append(row)
        keys.append(keys_of(row, source, number, index))
    return Batch(
        stacked_pixels(pixels, preparation.resolution),
        token_ids([row.text for row in rows], preparation.context_length),
        rows,
        stacked_keys(keys),
        part.epoch,
        part.batch,
        skipped,
    )


def keys_of(row: Row, source: Source, number: int, index: int) -> list[int]:
    """Return 64 bits each for a pair's picture, its text id and what its text says.

    Two pairs of a mix that agree in any of the three are no negatives of each other. Ids stand for
    one thing within a file of a source, so its ``number`` and the file go in. Texts are compared
    without width, case, space and punctuation, unless nothing else is in them.
    """
    ids = row.image_id, row.text_id
    picture, text = (digest(f"{number}\0{id_digest(source, index, each)}") for each in ids)
    return [picture, text, digest(plain(row.text) or row.text)]


def stacked_keys(keys: Sequence[Sequence[int]]) -> Tensor:
    """Return the keys of pairs as one int64 (B, 3); there may be none."""
    return torch.from_numpy(np.array(keys, np.uint64).reshape(-1, 3).view(np.int64))


def token_ids(texts: Sequence[str], context_length: int) -> Tensor:
    """Return ids int64 (B, L) of texts, L the length of the longest, rounded up."""
    tokenizer = default_tokenizer()
    encoded = tokenizer.encode(texts, context_length)
    longest = max(map(len, encoded), default=2)
    length = next((each for each in _LENGTHS if each >= longest), longest)
    return torch.from_numpy(tokenizer.pad(encoded, min(length, context_length)))


def pixels_of(
    content: bytes, image_id: str, epoch: int, preparation: Preparation
) -> npt.NDArray[np.uint8]:
    """Decode and prepare the bytes of one picture: uint8 (S, S, 3).

    Raises:
        ImageError: it cannot be decoded.
    """
    size = preparation.resolution
    fast, background = preparation.fast_decode, preparation.background
    if not preparation.augmented:
        return read_pixels(content, size, fast_decode=fast, background=background)
    image = read_image(content, fast_decode=size if fast else None, background=background)
    rng = generator_for(preparation.seed, epoch, image_id)
    return augment(image, size, rng, flip=preparation.flip)


def stacked_pixels(pixels: Sequence[npt.NDArray[np.uint8]], size: int) -> Tensor:
    """Return pictures (S, S, 3) as one uint8 (B, 3, S, S); there may be none."""
    stacked = np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(stacked, -1, 1)))


class _Prepared(Dataset[Batch]):
    """Batches by what they hold: the dataset of a ``DataLoader`` whose indexes are shares."""

    def __init__(self, sources: Sequence[Source], preparation: Preparation) -> None:
        self._sources, self._preparation = sources, preparation

    def __getitem__(self, part: BatchPart) -> Batch:
        return prepare(self._sources, part, self._preparation)


class _Parts(torch.utils.data.Sampler[BatchPart]):
    def __init__(self, parts: Iterator[BatchPart]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[BatchPart]:
        return self._parts


def worker_starts(_: int) -> None:
    """Keep a worker to one thread, as there are as many workers as there is to do; and let it
    leave Ctrl-C and SIGTERM, which a whole group of processes is sent, to the one that started it:
    that one ends it, after it has saved what it has to. It ends with that one, too.
    """
    torch.set_num_threads(1)
    leave_signals_to_parent(_spared)
    end_with_parent()


def _spared(number: int, frame: FrameType | None) -> None:
    """Leave the process that started this one the time to finish its step; a second SIGTERM, or
    too long a wait, ends the worker."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, _SPARED_SECONDS)
