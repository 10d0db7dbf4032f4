"""What all manifests of an output say, in one array; a file of it saves reading them again.

The file is ``.work/manifests.summary``: a line of JSON, and a row per shard. A row counts only
while its manifest has the same size and the same state (time of its last change, or ETag) as when
it was read, and the file only if its checksum is right. It may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.bulk.manifest import FOLDER, NAME, Manifest, manifest_name, parse_manifest
from cn_clip.bulk.store.base import WORK, Entry, Store, read_many
from cn_clip.errors import CNClipError, DataError
from cn_clip.format_version import FIELD, Format

Rows = npt.NDArray[Any]
OnRead = Callable[[int, int | None], None]

FOLDERS = ("img_emb", "text_emb", "metadata", "quarantine")
ABSENT = -1
# A row: state and size of the manifest's file; what it says; the digest of whose it is, see
# ``identity_of``; the size of its file in each of FOLDERS, or ABSENT. A state of 0 is no row.
ROW = np.dtype([
    ("state", "<u8"), ("size", "<u4"), ("rows_in", "<u4"), ("rows_out", "<u4"),
    ("quarantined", "<u4"), ("attempt", "<u4"), ("seconds", "<f4"), ("identity", "<u8"),
    ("files", "<i8", (len(FOLDERS),)),
])  # fmt: skip
_FORMAT = Format("bulk-summary", 1)
_NAME = f"{WORK}/manifests.summary"
_HEAD = 256  # bytes of the line of JSON
_BLOCK = 1 << 20  # bytes read or written at a time
_TOGETHER = 4096  # files read at a time
_WORTH = 1000  # manifests that are read again rather than written to the file
_SPREAD = 0x9E3779B97F4A7C15  # odd: no two counts give the same product


@dataclass(frozen=True, slots=True)
class Manifests:
    """What the manifests of an output say.

    Attributes:
        rows: ROW (N,) by shard; the state of a shard without a manifest that can be read is 0.
        modified: (N,) seconds, by the clock of the store alone; NaN without a manifest.
        damaged: manifests that cannot be read.
    """

    rows: Rows
    modified: npt.NDArray[np.float64]
    damaged: int

    @property
    def exist(self) -> npt.NDArray[np.bool_]:
        """For each shard whether it has a manifest."""
        return ~np.isnan(self.modified)


def read_manifests(
    store: Store, shards: int, on_read: OnRead = lambda done, total: None
) -> Manifests:
    """Read all manifests; 100 bytes of memory per shard.

    Raises:
        UsageError: one is of a newer version.
        DataError: the store cannot be reached.
    """
    rows = _load(store, shards)
    modified = np.full(shards, np.nan)
    count = changed = damaged = 0
    listing = store.entries(FOLDER)
    while some := list(islice(listing, _TOGETHER)):
        numbers, entries = _numbered(some, shards)
        modified[numbers] = [entry.modified for entry in entries]
        states = np.array([entry.state for entry in entries], np.uint64)
        sizes = np.array([entry.size for entry in entries], np.int64)
        same = (rows["state"][numbers] == states) & (rows["size"][numbers] == sizes)
        unread = np.flatnonzero(~same).tolist()
        rows[numbers[unread]] = 0
        names = [manifest_name(int(numbers[at])) for at in unread]
        read: dict[int, tuple[Any, ...]] = {}
        for at, content in zip(unread, read_many(store, names), strict=True):
            number = int(numbers[at])
            if content is None:  # discarded meanwhile
                modified[number] = np.nan
                continue
            try:
                manifest = parse_manifest(content, f"{store.name}/{manifest_name(number)}")
            except DataError:
                damaged += 1
            else:
                read[number] = _row(entries[at], manifest, number)
        if read:
            rows[list(read)] = np.array(list(read.values()), ROW)
        changed += len(unread)
        count += len(numbers)
        on_read(count, shards)
    rows[np.isnan(modified)] = 0
    if changed >= _WORTH:
        with suppress(OSError, CNClipError):  # it only saves time, and this may be no place of ours
            _save(store, rows)
    return Manifests(rows, modified, damaged)


def identity_of(
    plan: str,
    model: str,
    files: Sequence[str],
    keys: npt.NDArray[np.uint64],
    counts: npt.NDArray[np.uint32],
) -> npt.NDArray[np.uint64]:
    """Return the digests (N,) of whose shards are.

    Args:
        plan: digest of the plan.
        model: fingerprint.
        files: names, with ``N`` for the number.
        keys: (N,) of the inputs.
        counts: (N,) inputs.
    """
    spread = counts.astype(np.uint64) * np.uint64(_SPREAD)
    return keys ^ spread ^ np.uint64(_owner(plan, model, *files))


def named(file: str, number: int) -> str:
    """Return the name of a file of a shard with ``N`` for the number."""
    return file.replace(f"{number:05}", "N", 1)


@lru_cache(maxsize=256)
def _owner(*words: str) -> int:
    content = json.dumps(words).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _numbered(some: Iterable[Entry], shards: int) -> tuple[npt.NDArray[np.int64], list[Entry]]:
    numbers, entries = [], []
    for entry in some:
        match = NAME.fullmatch(entry.name)
        if match and int(match[1]) < shards:
            numbers.append(int(match[1]))
            entries.append(entry)
    return np.array(numbers, np.int64), entries


def _row(entry: Entry, manifest: Manifest, number: int) -> tuple[Any, ...]:
    """Return the values of a row."""
    files = {name.partition("/")[0]: file.bytes for name, file in manifest.files.items()}
    identity = 0
    if manifest.shard == number:
        names = sorted(named(name, number) for name in manifest.files)
        identity = int(manifest.key, 16) ^ (manifest.rows_in * _SPREAD % (1 << 64))
        identity ^= _owner(manifest.plan, manifest.model, *names)
    return (
        entry.state, entry.size, manifest.rows_in, manifest.rows_out, manifest.quarantined,
        manifest.attempt, manifest.seconds, identity,
        tuple(files.get(folder, ABSENT) for folder in FOLDERS),
    )  # fmt: skip


def _load(store: Store, shards: int) -> Rows:
    """Return the rows of the file, which may have fewer shards; zeros if it cannot be used."""
    rows = np.zeros(shards, ROW)
    try:
        head = json.loads(store.read(_NAME, 0, _HEAD) or b"{}")
        count = int(head["shards"])
        is_ours = head[FIELD] == str(_FORMAT) and 0 <= count <= shards
    except (ValueError, TypeError, KeyError, OSError):
        return rows
    if not is_ours:
        return rows
    content, digest, at = _bytes_of(rows[:count]), hashlib.blake2b(digest_size=16), 0
    while at < len(content):
        stop = min(at + _BLOCK, len(content))
        block = store.read(_NAME, _HEAD + at, _HEAD + stop)
        if block is None or len(block) != stop - at:
            break
        content[at:stop] = block
        digest.update(block)
        at = stop
    if digest.hexdigest() != head.get("digest"):
        rows[:] = 0
    return rows


def _save(store: Store, rows: Rows) -> None:
    content, digest = _bytes_of(rows), hashlib.blake2b(digest_size=16)
    digest.update(content)
    head = {FIELD: str(_FORMAT), "shards": len(rows), "digest": digest.hexdigest()}
    with store.working("summary") as folder:
        file = folder / "summary"
        with file.open("wb") as stream:
            stream.write(json.dumps(head).encode().ljust(_HEAD - 1) + b"\n")
            stream.write(content)
        store.publish(_NAME, file)


def _bytes_of(rows: Rows) -> memoryview:
    return rows.view(np.uint8).data
