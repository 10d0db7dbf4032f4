"""Features of a locked image tower, computed once and kept on disk.

Each picture of a mix is run once (or once for each augmented view), however many texts it has. The
features lie in shards that are written whole; a second run computes what is missing. A stamp says
which weights, preparation and pictures they are of; features with another stamp are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cn_clip import distributed, weights
from cn_clip.arrays import read_npy
from cn_clip.data.captions import digest
from cn_clip.data.loading.loader import (
    Preparation,
    init_worker,
    open_iterator,
    pixels_of,
    stack_pixels,
)
from cn_clip.data.loading.sampler import BatchPart
from cn_clip.data.sources.open import WeightedSource, id_digest
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.model.clip import CLIP
from cn_clip.outputs import entries, json_object_at, own_folder
from cn_clip.publish import atomic_file

_PER_SHARD = 4096  # pictures
_ABOUT = "about.json"
_SHARD = re.compile(r"features-\d{5,}\.npy")
_HALF_WRITTEN = re.compile(rf"{_SHARD.pattern}|about\.json")


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of a mix: of each source, which picture each row has (rows,), and of each
    picture where it stands first, as (source, row), (P, 2)."""

    of_rows: list[npt.NDArray[np.int64]]
    places: npt.NDArray[np.int64]
    fingerprint: str


def pictures_of(mix: Sequence[WeightedSource]) -> Pictures:
    """Find the pictures of a mix by their image ids, reading rows alone."""
    of_rows: list[npt.NDArray[np.int64]] = []
    places: list[npt.NDArray[np.int64]] = []
    digests = hashlib.sha256()
    for number, part in enumerate(mix):
        ids = np.empty(len(part.source), np.uint64)
        for index in range(len(ids)):
            try:
                image_id = part.source.row(index).image_id
                ids[index] = id_digest(part.source, index, image_id)
            except CNClipError:  # a row that cannot be read is a picture of its own, never used
                ids[index] = digest(f"\0{index}")
        _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        of_rows.append(inverse.astype(np.int64) + sum(len(each) for each in places))
        places.append(np.stack([np.full_like(first, number), first], axis=1))
        digests.update(ids.tobytes())
    return Pictures(of_rows, np.concatenate(places), digests.hexdigest()[:32])


def tower_fingerprint(model: CLIP) -> str:
    """Return what changes with the image tower's weights or shape."""
    found = hashlib.sha256()
    config = model.config.to_dict()
    shape = {key: config[key] for key in ("vision", "embed_dim", "image_mean", "image_std")}
    found.update(json.dumps(shape, sort_keys=True).encode())
    weights.add_to_digest(found, model.visual.state_dict())
    return found.hexdigest()[:32]


class ImageFeatures:
    """Reads the features of a mix's pictures, by pair."""

    def __init__(self, folder: Path, pictures: Pictures, views: int) -> None:
        self._folder, self._pictures, self._views = folder, pictures, views
        self._open: dict[int, npt.NDArray[np.float32]] = {}

    def features(self, part: BatchPart) -> Tensor:
        """Return float32 (B, D) of the pairs of a share; NaN for pictures that are unreadable."""
        pictures = np.empty(len(part.indexes), np.int64)
        for number, of_rows in enumerate(self._pictures.of_rows):
            mine = part.sources == number
            pictures[mine] = of_rows[part.indexes[mine]]
        shards, within = np.divmod(pictures, _PER_SHARD)
        view = part.epoch % self._views
        rows = np.empty((len(pictures), self._shard(0).shape[2]), np.float32)
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            rows[mine] = self._shard(shard)[within[mine], view]
        return torch.from_numpy(rows)

    def _shard(self, number: int) -> npt.NDArray[np.float32]:
        if number not in self._open:
            path = _shard_path(self._folder, number)
            rows = min(_PER_SHARD, len(self._pictures.places) - number * _PER_SHARD)
            try:
                found = read_npy(path, mapped=True)
            except DataError as error:
                raise DataError(f"{error}; delete it, and it is computed anew") from None
            fits = found.ndim == 3 and found.shape[:2] == (rows, self._views)
            width = found.shape[2] if number == 0 or not fits else self._shard(0).shape[2]
            if not fits or found.dtype != np.float32 or found.shape[2] != width or not width:
                raise DataError(
                    f"{path} holds {found.dtype} of shape {found.shape}; expected float32 of shape "
                    f"({rows}, {self._views}, D); delete it, and it is computed anew"
                )
            self._open[number] = found
        return self._open[number]


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
    tick: Callable[[int, int], None] = lambda done, of: None,
) -> ImageFeatures:
    """Compute what is missing of the features of every picture, and open them.

    With several processes, each computes some of the shards; they must see the same folder.

    Args:
        mix: sources and their weights.
        run: uint8 pixels (B, 3, S, S) to features (B, D), on whatever device.
        stamp: what the features are of besides pictures and preparation: the tower's fingerprint,
            its precision.
        preparation: how pictures become pixels; augmented differently in each view.
        folder: where the features are kept.
        views: augmented versions of each picture; epoch ``e`` takes version ``e % views``.
        batch: pictures run at once.
        workers: processes that read and decode.
        tick: told how many pictures are done, of how many.

    Raises:
        UsageError: the folder holds features of another tower, preparation or set of pictures.
        DataError: the features cannot be written.
    """
    pictures = pictures_of(mix)
    about = stamp | {
        "preparation": {k: v for k, v in asdict(preparation).items() if k != "context_length"},
        "pictures": pictures.fingerprint,
        "views": views,
    }
    distributed.on_main(lambda: _check_stamp(folder, about))
    count = len(pictures.places)
    shards = range(-(-count // _PER_SHARD))
    missing = distributed.on_main(
        lambda: [number for number in shards if not _shard_path(folder, number).exists()]
    )
    mine = missing[distributed.rank() :: distributed.world_size()]
    done = count - sum(min(_PER_SHARD, count - n * _PER_SHARD) for n in mine)
    tick(done, count)
    sources = [part.source for part in mix]
    for number in mine:
        places = pictures.places[number * _PER_SHARD : (number + 1) * _PER_SHARD]
        jobs = [
            (view, places[at : at + batch])
            for at in range(0, len(places), batch)
            for view in range(views)
        ]
        loaded = DataLoader(
            _Views(sources, preparation, jobs),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=init_worker,
        )
        rows: list[list[npt.NDArray[np.float32]]] = [[] for _ in range(views)]
        with open_iterator(loaded) as found:
            for (view, _), (pixels, kept, size) in zip(jobs, found, strict=True):
                features = run(pixels).float().cpu().numpy()
                whole = np.full((size, features.shape[1]), np.nan, np.float32)
                whole[kept] = features
                rows[view].append(whole)
                if view == views - 1:
                    done += size
                    tick(done, count)
        shard = np.stack([np.concatenate(each) for each in rows], axis=1)  # (P, views, D)
        try:
            with atomic_file(_shard_path(folder, number)) as path, path.open("wb") as stream:
                np.save(stream, shard)
        except OSError as error:
            raise DataError(
                f"features could not be written to {folder}: {error}; what was written stays, and "
                "a run with --resume auto goes on from it"
            ) from error
    distributed.barrier()
    return ImageFeatures(folder, pictures, views)


class _Views(Dataset[tuple[Tensor, list[int], int]]):
    """Pixels of runs of pictures, which of them could be read, and how many there are."""

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
        view, places = self._jobs[number]
        pixels, kept = [], []
        for at, (source, index) in enumerate(places.tolist()):
            try:
                row = self._sources[source].row(index)
                content = self._sources[source].image(index)
                pixels.append(pixels_of(content, row.image_id, view, self._preparation))
            except CNClipError:  # said when the pair is asked for
                continue
            kept.append(at)
        return stack_pixels(pixels, self._preparation.resolution), kept, len(places)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"features-{number:05d}.npy"


def _own_features(folder: Path) -> Collection[str]:
    """Return the names of the files of cached features in a folder; none if they have no stamp."""
    if not {"preparation", "pictures", "views"} <= json_object_at(folder / _ABOUT).keys():
        return ()
    shards = (name for name in entries(folder) if _SHARD.fullmatch(name))
    return {_ABOUT, *shards}


FEATURES = own_folder("train", _own_features, _HALF_WRITTEN)
"""The objection to a folder that holds anything but cached features."""


def _check_stamp(folder: Path, about: dict[str, Any]) -> None:
    path = folder / _ABOUT
    text = json.dumps(about, indent=2, sort_keys=True)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        reason = FEATURES(folder)
        if reason is not None:
            raise UsageError(f"{folder} {reason}; give another place") from None
        with atomic_file(path) as new:
            new.write_text(text + "\n", encoding="utf-8")
        return
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error}); delete the folder {folder}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no object; delete the folder {folder}")
    other = sorted(k for k in found | about if found.get(k) != json.loads(text).get(k))
    if other:
        raise UsageError(
            f"the features in {folder} are of another {', '.join(other)}; delete the folder, or "
            "give another one with --output.features"
        )
