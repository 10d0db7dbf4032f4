"""Checksums of the shards of a feature cache: a file beside each, with its size and its digest.

``features-00000.sum`` is one line, ``BYTES BLAKE2B``, about ``features-00000.npy``. The size is
compared whenever a cache is opened, the digest by ``cn-clip data features``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cn_clip.data.process_map import Progress, no_progress, parallel_map
from cn_clip.errors import DataError, UsageError
from cn_clip.files import as_path
from cn_clip.outputs import entries
from cn_clip.publish import atomic_file
from cn_clip.translation import _

SHARD = re.compile(r"features-\d{5,}\.npy")
SUM = re.compile(r"features-\d{5,}\.sum")
_LINE = re.compile(r"(\d+) ([0-9a-f]{64})\n")


@dataclass(frozen=True, slots=True)
class CheckedFeatures:
    """The shards of a cache, and a message for each that is damaged."""

    shards: int
    bytes: int
    damaged: list[str]


def sum_path(shard: Path) -> Path:
    """Return the path of a shard's checksum."""
    return shard.with_suffix(".sum")


def write_sum(shard: Path, written: Path) -> None:
    """Write the checksum of a shard whose content is in the file ``written``."""
    with atomic_file(sum_path(shard)) as path:
        path.write_text(f"{written.stat().st_size} {_digest(written)}\n", encoding="ascii")


def check_sizes(shards: Sequence[Path]) -> None:
    """Compare the sizes of shards with their checksums; no shard is read.

    Raises:
        DataError: a shard has another size.
    """
    for shard in shards:
        size = _read_sum(shard)[0]
        if shard.stat().st_size != size:
            raise DataError(
                _(
                    "{path} has {size:,} bytes, not {expected:,}; delete it, and it is computed "
                    "again",
                    path=shard,
                    size=shard.stat().st_size,
                    expected=size,
                )
            )


def check_features(
    folder: str, *, workers: int = 0, on_progress: Progress = no_progress
) -> CheckedFeatures:
    """Read all shards of a cache, and compare them with their checksums.

    Args:
        folder: of the cache.
        workers: processes that read; 0 reads in this process.
        on_progress: called with (done, total) shards.

    Raises:
        UsageError: the folder has no shard.
    """
    root = as_path(folder)
    names = {Path(name).stem for name in entries(root) if SHARD.fullmatch(name)}
    names |= {Path(name).stem for name in entries(root) if SUM.fullmatch(name)}
    if not names:
        raise UsageError(
            _("{folder} has no cached features; give the folder with about.json", folder=folder)
        )
    shards = [root / f"{name}.npy" for name in sorted(names)]
    damaged, size = [], 0
    with parallel_map(_damage_of, workers) as run:
        for done, (shard, message) in enumerate(zip(shards, run(shards), strict=True), 1):
            damaged += [message] if message else []
            size += shard.stat().st_size if shard.exists() else 0
            on_progress(done, len(shards))
    return CheckedFeatures(len(shards), size, damaged)


def _damage_of(shard: Path) -> str:
    """Return what is wrong with a shard; empty if nothing is."""
    try:
        check_sizes([shard])
        if _digest(shard) == _read_sum(shard)[1]:
            return ""
    except DataError as error:
        return str(error)
    except OSError as error:
        return _("{path} cannot be read: {reason}", path=shard, reason=error.strerror)
    return _("{path} is damaged; delete it, and it is computed again", path=shard)


def _read_sum(shard: Path) -> tuple[int, str]:
    """Return the size and the digest in a shard's checksum.

    Raises:
        DataError: it is missing or damaged.
    """
    path = sum_path(shard)
    try:
        line = _LINE.fullmatch(path.read_bytes()[:200].decode("ascii", "replace"))
    except OSError:
        line = None
    if line is None:
        raise DataError(
            _(
                "{path} is missing or damaged; delete {shard}, and both are computed again",
                path=path,
                shard=shard.name,
            )
        )
    return int(line[1]), line[2]


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, partial(hashlib.blake2b, digest_size=32)).hexdigest()
