"""A cache on disk of the image features of a frozen tower.

Each image of a mix is encoded once per augmented view, however many texts it has. Shards are
written atomically, with checksums (see ``feature_sums``); a second run computes the missing ones.
A stamp identifies the weights, the preparation and the images; features with another stamp are
refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cn_clip import distributed, weights
from cn_clip.arrays import read_npy
from cn_clip.data.loading.loader import (
    Preparation,
    init_worker,
    open_iterator,
    pixels_of,
    stack_pixels,
    worker_context,
)
from cn_clip.data.loading.sampler import BatchPart, shard_sizes
from cn_clip.data.sources.array_file import ArrayFile, smallest, write_arrays
from cn_clip.data.sources.base import Source
from cn_clip.data.sources.open import WeightedSource, parts_of, read_ahead
from cn_clip.data.sources.row_index import index_of
from cn_clip.data.sources.row_keys import image_key, unreadable_key
from cn_clip.data.sources.tar import Tar
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.format_version import FIELD, Format
from cn_clip.model.clip import CLIP
from cn_clip.outputs import entries, json_object_at, own_folder
from cn_clip.processes import usable_cpus
from cn_clip.publish import atomic_file
from cn_clip.train.batches.feature_sums import SHARD, SUM, check_sizes, sum_path, write_sum
from cn_clip.translation import _

_FORMAT = Format("feature cache", 1)
_RENAMED = {"pictures": "images"}  # in stamps without a format version
_PER_SHARD, _PER_LARGE_SHARD = 4096, 1 << 20  # images
_KEPT_ROWS = 100_000  # rows of a mix whose distinct images are kept in a file
_IMAGES_FILE = "images.index"
_STAMP_FILE = "about.json"
_OWN_FILE = re.compile(rf"{SHARD.pattern}|{SUM.pattern}|about\.json|images\.index")


_DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
}
Precision = Literal["fp32", "fp16"]
"""How features are stored."""


@dataclass(frozen=True, slots=True)
class UniqueImages:
    """The distinct images of a mix.

    Attributes:
        of_rows: for each source, the image index of each row, (rows,) of any type of integers.
        first_rows: the first (source, row) of each image, (P, 2).
        fingerprint: digest of the image ids.
    """

    of_rows: list[npt.NDArray[Any]]
    first_rows: npt.NDArray[np.int64]
    fingerprint: str


def unique_images(mix: Sequence[WeightedSource]) -> UniqueImages:
    """Find the distinct images of a mix by their ids, without opening images.

    Sources with an index are not read. The images of a streamed source are in the order of their
    first rows, so that their features are computed shard by shard; others in the order of keys.
    """
    of_rows: list[npt.NDArray[Any]] = []
    first_rows: list[npt.NDArray[np.int64]] = []
    digests = hashlib.sha256()
    for number, part in enumerate(mix):
        keys = _image_keys(part.source)
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        if shard_sizes(part.source) is not None:
            order = np.argsort(first)
            position = np.empty_like(order)
            position[order] = np.arange(len(order))
            first, inverse = first[order], position[inverse]
        of_rows.append(inverse.astype(np.int64) + sum(len(rows) for rows in first_rows))
        first_rows.append(np.stack([np.full_like(first, number), first], axis=1))
        digests.update(keys.tobytes())
    return UniqueImages(of_rows, np.concatenate(first_rows), digests.hexdigest()[:32])


def _shared_unique_images(
    mix: Sequence[WeightedSource], folder: Path, claim: Callable[[UniqueImages], None]
) -> UniqueImages:
    """Return the distinct images of a mix, after ``claim`` in the main process.

    Of many, the main process keeps them in a file of the folder, which all processes map into
    memory; it is read again while the sources stay the same.
    """
    if sum(len(part.source) for part in mix) < _KEPT_ROWS:
        images = unique_images(mix)
        distributed.on_main(lambda: claim(images))
        return images
    path, state = folder / _IMAGES_FILE, _state_of(mix)

    def find_and_keep() -> None:
        with suppress(DataError):
            if state is not None and ArrayFile(path).values["sources"] == state:
                claim(_kept_images(path))
                return
        images = unique_images(mix)
        claim(images)
        arrays = {f"rows {n}": smallest(rows) for n, rows in enumerate(images.of_rows)}
        values = {"sources": state, "fingerprint": images.fingerprint}
        with _disk_errors(folder), atomic_file(path) as temporary:
            write_arrays(temporary, arrays | {"first": images.first_rows}, values)

    distributed.on_main(find_and_keep)
    return _kept_images(path)


def _kept_images(path: Path) -> UniqueImages:
    file = ArrayFile(path)
    of_rows = [rows for name, rows in file.arrays.items() if name != "first"]
    return UniqueImages(of_rows, file["first"], file.values["fingerprint"])


def _state_of(mix: Sequence[WeightedSource]) -> str | None:
    """Return a digest of the files of a mix, by size and version; None if a source has no such."""
    digest = hashlib.sha256()
    for part in mix:
        for shard in parts_of(part.source):
            if not isinstance(shard, Tar):
                return None
            digest.update(repr((shard.name, *shard.state)).encode())
        digest.update(b"|" if shard_sizes(part.source) is None else b"~")
    return digest.hexdigest()


def _image_keys(source: Source) -> npt.NDArray[np.uint64]:
    """Return the key of each row's image, (rows,)."""
    keys = np.empty(len(source), np.uint64)
    first = 0
    for number, part in enumerate(parts_of(source)):
        stop = first + len(part)
        if (own := index_of(part, workers=usable_cpus())) is not None:
            keys[first:stop] = own.image_keys(number, first)
        else:
            for index in range(first, stop):
                try:
                    keys[index] = image_key(number, source.row(index).image_id)
                except CNClipError:  # an image of its own, never used
                    keys[index] = unreadable_key(index)
        first = stop
    return keys


def tower_fingerprint(model: CLIP) -> str:
    """Return a digest of the image tower's weights and shape."""
    sha = hashlib.sha256()
    config = model.config.to_dict()
    shape = {key: config[key] for key in ("vision", "embed_dim", "image_mean", "image_std")}
    sha.update(json.dumps(shape, sort_keys=True).encode())
    weights.add_to_digest(sha, model.visual.state_dict())
    return sha.hexdigest()[:32]


class ImageFeatures:
    """Reads the cached features of the pairs of a mix."""

    def __init__(
        self,
        folder: Path,
        images: UniqueImages,
        views: int,
        *,
        per_shard: int,
        precision: Precision = "fp32",
    ) -> None:
        self._folder, self._images, self._views = folder, images, views
        self._per_shard, self._dtype = per_shard, _DTYPES[precision]
        self._shards: dict[int, npt.NDArray[Any]] = {}

    def features(self, part: BatchPart) -> Tensor:
        """Return float32 (B, D) of a local batch; rows of unreadable images are NaN."""
        images = np.empty(len(part.indexes), np.int64)
        for number, of_rows in enumerate(self._images.of_rows):
            in_source = part.sources == number
            images[in_source] = of_rows[part.indexes[in_source]]
        shards, within = np.divmod(images, self._per_shard)
        view = part.epoch % self._views
        rows = np.empty((len(images), self._shard(0).shape[2]), np.float32)
        for shard in np.unique(shards).tolist():
            in_shard = shards == shard
            rows[in_shard] = self._shard(shard)[within[in_shard], view]
        return torch.from_numpy(rows)

    def _shard(self, number: int) -> npt.NDArray[Any]:
        if number not in self._shards:
            path = _shard_path(self._folder, number)
            first = number * self._per_shard
            rows = min(self._per_shard, len(self._images.first_rows) - first)
            try:
                shard = read_npy(path, mapped=True)
            except DataError as error:
                raise DataError(
                    _("{error}; delete it, and it is computed again", error=error)
                ) from None
            fits = shard.ndim == 3 and shard.shape[:2] == (rows, self._views)
            width = shard.shape[2] if number == 0 or not fits else self._shard(0).shape[2]
            if not fits or shard.dtype != self._dtype or shard.shape[2] != width or not width:
                raise DataError(
                    _(
                        "{path} has {dtype} of shape {shape}; expected {expected} of shape "
                        "({rows}, {views}, D); delete it, and it is computed again",
                        path=path,
                        dtype=shard.dtype,
                        expected=self._dtype,
                        shape=shard.shape,
                        rows=rows,
                        views=self._views,
                    )
                )
            self._shards[number] = shard
        return self._shards[number]


def cache_image_features(
    mix: Sequence[WeightedSource],
    run: Callable[[Tensor], Tensor],
    stamp: dict[str, Any],
    preparation: Preparation,
    folder: Path,
    *,
    views: int = 1,
    batch: int = 64,
    workers: int = 2,
    precision: Precision = "fp32",
    tick: Callable[[int, int], None] = lambda done, of: None,
) -> ImageFeatures:
    """Compute the missing features of a mix's images, and open the cache.

    With several processes, each computes some of the shards; all must see the same folder.

    Args:
        mix: sources and their weights.
        run: uint8 pixels (B, 3, S, S) to features (B, D), on any device.
        stamp: identifies the features besides images and preparation: fingerprint and precision of
            the tower.
        preparation: how images become pixels; augmented differently in each view.
        folder: folder of the cache.
        views: augmented versions of each image; epoch ``e`` uses version ``e % views``.
        batch: images encoded at once.
        workers: processes that read and decode.
        precision: of the stored features.
        tick: called with the number of images done and the total.

    Raises:
        UsageError: the folder has features of another tower, preparation or set of images.
        DataError: the features cannot be written.
    """
    about: dict[str, Any] = {FIELD: str(_FORMAT)} | stamp
    about["preparation"] = {k: v for k, v in asdict(preparation).items() if k != "context_length"}
    about |= {"views": views} | ({} if precision == "fp32" else {"stored as": precision})
    images = _shared_unique_images(
        mix,
        folder,
        lambda images: _check_stamp(folder, about | {"images": images.fingerprint}),
    )
    count = len(images.first_rows)
    dtype: np.dtype[Any] = _DTYPES[precision]
    per_shard = distributed.on_main(lambda: _images_per_shard(folder, count))
    shards = range(-(-count // per_shard))
    missing = distributed.on_main(
        lambda: [number for number in shards if not _has_shard(folder, number)]
    )
    own = missing[distributed.rank() :: distributed.world_size()]
    done = count - sum(min(per_shard, count - n * per_shard) for n in own)
    tick(done, count)
    sources = [part.source for part in mix]
    for number in own:
        rows_of_shard = images.first_rows[number * per_shard : (number + 1) * per_shard]
        jobs = [
            (view, rows_of_shard[at : at + batch])
            for at in range(0, len(rows_of_shard), batch)
            for view in range(views)
        ]
        loaded = DataLoader(
            _Views(sources, preparation, jobs),
            batch_size=None,
            sampler=_read_ahead(sources, jobs),
            num_workers=workers,
            worker_init_fn=init_worker,
            multiprocessing_context=worker_context(sources) if workers else None,
        )
        rows: list[npt.NDArray[Any]] = []  # of one batch, by view
        shard = _shard_path(folder, number)
        with ExitStack() as stack:
            with _disk_errors(folder):
                path = stack.enter_context(atomic_file(shard))
                stream = stack.enter_context(path.open("wb"))
            with open_iterator(loaded) as loaded_jobs:
                for (view, _unused), (pixels, kept, size) in zip(jobs, loaded_jobs, strict=True):
                    features = run(pixels).float().cpu().numpy()
                    padded: npt.NDArray[Any] = np.full((size, features.shape[1]), np.nan, dtype)
                    padded[kept] = features
                    rows.append(padded)
                    if view < views - 1:
                        continue
                    block = np.stack(rows, axis=1)  # (B, views, D)
                    rows.clear()
                    with _disk_errors(folder):
                        _append(stream, block, (len(rows_of_shard), *block.shape[1:]))
                    done += size
                    tick(done, count)
            with _disk_errors(folder):
                stream.flush()
                write_sum(shard, path)  # before the shard: there is none without
                stack.close()
    distributed.barrier()
    distributed.on_main(lambda: check_sizes([_shard_path(folder, number) for number in shards]))
    return ImageFeatures(folder, images, views, per_shard=per_shard, precision=precision)


def _has_shard(folder: Path, number: int) -> bool:
    """Return whether a shard is there; one without a checksum, as of earlier versions, gets one."""
    shard = _shard_path(folder, number)
    if shard.exists() and not sum_path(shard).exists():
        with _disk_errors(folder):
            write_sum(shard, shard)
    return shard.exists()


def _images_per_shard(folder: Path, count: int) -> int:
    """Return how many images a shard has: many if there are many. Caches of earlier versions have
    small shards only."""
    if count <= _PER_LARGE_SHARD:
        return _PER_SHARD
    with suppress(DataError):
        if len(read_npy(_shard_path(folder, 0), mapped=True)) == _PER_SHARD:
            return _PER_SHARD
    return _PER_LARGE_SHARD


def _append(stream: BinaryIO, block: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    """Append rows to an array of the given shape in a ``.npy`` file."""
    if not stream.tell():
        header = {"descr": block.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
    stream.write(block.tobytes())


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            _(
                "features could not be written to {folder}: {error}; finished shards are "
                "kept; continue from them with --resume auto",
                folder=folder,
                error=error,
            )
        ) from error


def _read_ahead(
    sources: Sequence[Source], jobs: Sequence[tuple[int, npt.NDArray[np.int64]]]
) -> Iterator[int]:
    """Yield the numbers of jobs; streamed pairs of a job are read ahead when it is yielded."""
    for number, (view, rows) in enumerate(jobs):
        if view == 0 and len(rows):
            for source in np.unique(rows[:, 0]).tolist():
                read_ahead(sources[source], rows[rows[:, 0] == source, 1])
        yield number


class _Views(Dataset[tuple[Tensor, list[int], int]]):
    """For each job: pixels of the readable images, their positions, and the number of images."""

    def __init__(
        self,
        sources: Sequence[Any],
        preparation: Preparation,
        jobs: Sequence[tuple[int, npt.NDArray[np.int64]]],
    ) -> None:
        self._sources, self._preparation, self._jobs = sources, preparation, jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, number: int) -> tuple[Tensor, list[int], int]:
        view, first_rows = self._jobs[number]
        pixels, kept = [], []
        for at, (source, index) in enumerate(first_rows.tolist()):
            try:
                row = self._sources[source].row(index)
                content = self._sources[source].image(index)
                pixels.append(pixels_of(content, row.image_id, view, self._preparation))
            except CNClipError:  # reported when the pair is loaded
                continue
            kept.append(at)
        return stack_pixels(pixels, self._preparation.resolution), kept, len(first_rows)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"features-{number:05d}.npy"


def _own_features(folder: Path) -> Collection[str]:
    """Return the names of the cache's files in a folder; none if there is no stamp."""
    stamp = _renamed(json_object_at(folder / _STAMP_FILE))
    if not {"preparation", "images", "views"} <= stamp.keys():
        return ()
    shards = (name for name in entries(folder) if SHARD.fullmatch(name) or SUM.fullmatch(name))
    return {_STAMP_FILE, _IMAGES_FILE, *shards}


FEATURES = own_folder("train", _own_features, _OWN_FILE)
"""Returns why a folder is not a feature cache, None if it is one."""


def _renamed(stamp: dict[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(name, name): value for name, value in stamp.items()}


def _check_stamp(folder: Path, about: dict[str, Any]) -> None:
    path = folder / _STAMP_FILE
    text = json.dumps(about, indent=2, sort_keys=True)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        reason = FEATURES(folder)
        if reason is not None:
            raise UsageError(
                _("{folder} {reason}; give another place", folder=folder, reason=reason)
            ) from None
        with atomic_file(path) as new:
            new.write_text(text + "\n", encoding="utf-8")
        return
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            _(
                "{path} cannot be read ({error}); delete the folder {folder}",
                path=path,
                error=error,
                folder=folder,
            )
        ) from None
    if not isinstance(stored, dict):
        raise UsageError(
            _("{path} is not a JSON object; delete the folder {folder}", path=path, folder=folder)
        )
    version = stored.pop(FIELD, None)
    _FORMAT.check(version, path, UsageError, _("delete the folder {folder}", folder=folder))
    stored, about = _renamed(stored), json.loads(text)
    del about[FIELD]
    other = sorted(k for k in stored | about if stored.get(k) != about.get(k))
    if other:
        raise UsageError(
            _(
                "the features in {folder} are of another {other}; delete the folder, or give "
                "another one with --output.features",
                folder=folder,
                other=", ".join(other),
            )
        )
