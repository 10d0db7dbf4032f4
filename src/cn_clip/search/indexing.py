"""Images of folders and sources added to a library, new and changed ones only.

A file is unchanged if its size and time are. Otherwise its content is read and looked up by digest
before it is decoded: a moved file is not embedded again, and a copy shares its vector.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cn_clip.embedder import Embedder
from cn_clip.errors import DataError, ImageError
from cn_clip.processes import usable_cpus
from cn_clip.search.folder import LibraryFolder, StoredModel, add_model
from cn_clip.search.fulltext import tokens
from cn_clip.search.reading import ReadImage, digest_of, read_image_facts
from cn_clip.search.roots import Entry, Root, list_root
from cn_clip.search.thumbnails import write_thumbnail
from cn_clip.search.vector_file import DTYPE
from cn_clip.translation import _

COMMIT_IMAGES = 256
COMMIT_SECONDS = 2.0
_THREADS = 4


@dataclass(slots=True)
class Progress:
    """What an index run has done so far.

    Attributes:
        total: files to read, known after the folders are listed; None before.
        done: files read, of ``total``.
        embedded: images embedded.
        unchanged: files with the size and time of before.
        new, changed, moved_or_copied, returned, deleted: files.
        failed: (path, reason) of each unreadable file.
        known_failures: files that were unreadable before and have not changed.
        unreadable: messages about folders that cannot be read, whose images are kept.
        skipped: images in formats that cannot be decoded, by suffix.
        seconds: since the start.
    """

    total: int | None = None
    done: int = 0
    embedded: int = 0
    unchanged: int = 0
    new: int = 0
    changed: int = 0
    moved_or_copied: int = 0
    returned: int = 0
    deleted: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    known_failures: int = 0
    unreadable: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def files(self) -> int:
        """Number of files of the folders and sources, those that are gone included."""
        known = self.unchanged + self.returned + self.deleted + self.known_failures
        return (self.total or 0) + known

    @property
    def rate(self) -> float:
        """Files read per second."""
        return self.done / self.seconds if self.seconds else 0.0


class _Known(NamedTuple):
    """A file in the database."""

    id: int
    size: int
    mtime: int
    image: int | None
    present: bool
    failed: bool


class _Job(NamedTuple):
    """A file to read; ``known`` is its row, if it has one."""

    root: Root
    entry: Entry
    known: _Known | None


@dataclass(slots=True)
class _Outcome:
    """A file that was read: a new image, a known digest, or an error."""

    job: _Job
    number: int = 0  # in the order of the files
    digest: bytes = b""
    size: int = 0
    image: ReadImage | None = None
    error: str | None = None
    transient: bool = False  # it could not be read this time


def index(
    library: LibraryFolder,
    roots: Sequence[Root],
    load: Callable[[], Embedder],
    model_name: str,
    *,
    thumbnails: bool = True,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Bring a library up to date with folders and sources.

    Commits every 2 s or 256 images: after any interruption, committed images are not embedded
    again. Files that are gone are hidden, and shown again when they return.

    Args:
        library: opened for writing, locked by ``LibraryFolder.writing``.
        roots: from ``cn_clip.search.roots``.
        load: returns the library's model, or that of a new library; called if it is needed.
        model_name: as ``load`` takes it, for later searches.
        thumbnails: whether to make them.
        on_progress: called after each commit, and while folders are listed.

    Raises:
        LibraryError: the library is of another model.
        CNClipError: the disk is full; committed images stay.
    """
    run = _Run(library, load, model_name, thumbnails, on_progress)
    jobs: list[_Job] = []
    for root in roots:
        jobs += run.changes(root)
    run.progress.total = len(jobs)
    run.read_all(jobs)
    for root in roots:
        run.finish(root)
    run.commit()
    return run.progress


class _Run:
    """One run of ``index``: outcomes wait here until they are committed together."""

    def __init__(
        self,
        library: LibraryFolder,
        load: Callable[[], Embedder],
        model_name: str,
        thumbnails: bool,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.library, self._load = library, load
        self.thumbnails, self.on_progress = thumbnails, on_progress
        self.progress = Progress()
        self.start = self.last_commit = time.perf_counter()
        self.model = self._active_model(model_name)
        self.batch: list[_Outcome] = []  # decoded, not yet embedded
        self.embedded: list[tuple[_Outcome, np.ndarray]] = []
        self.others: list[_Outcome] = []  # copies and errors
        self.claimed: set[bytes] = set()  # digests being decoded, or not yet committed
        self.damaged: dict[bytes, str] = {}  # digest -> why it cannot be decoded
        # Images in the library without a vector: a migration or a repair could not read them.
        self.missing: dict[bytes, int] = dict(
            library.query(
                "SELECT images.digest, images.id FROM missing JOIN images "
                "ON images.id = missing.image WHERE missing.model = ?",
                (self.model.id,),
            )
        )

    @cached_property
    def embedder(self) -> Embedder:
        return self._load()

    def _active_model(self, name: str) -> StoredModel:
        active = self.library.active_model()
        if active is None:
            with self.library.database.transaction() as connection:
                add_model(connection, name, self.embedder, "active")
            active = self.library.active_model()
            assert active is not None
        return active

    # Listing.

    def changes(self, root: Root) -> list[_Job]:
        """List a root, record what is gone or back, and return the files to read."""
        root_id = self._root_id(root)
        root.id = root_id
        listing = list_root(root, self._stamp(root_id), self._listed)
        self.progress.unreadable += listing.messages
        self.progress.skipped = dict(Counter(self.progress.skipped) + listing.skipped)
        if listing.entries is None:  # unchanged, or not there
            counted = self.library.query(
                "SELECT COUNT(*) FROM files WHERE root = ? AND present AND image IS NOT NULL",
                (root_id,),
            )
            self.progress.unchanged += counted[0][0]
            return []
        root.new_stamp = listing.stamp
        known = {
            name: _Known(*values)
            for name, *values in self.library.query(
                "SELECT name, id, size, mtime, image, present, error IS NOT NULL FROM files "
                "WHERE root = ?",
                (root_id,),
            )
        }
        if not listing.entries and any(row.present for row in known.values()):
            self.progress.unreadable.append(
                _(
                    "{root} holds no image now, as when a disk is not mounted; its {count:,} "
                    "images are kept. If they were deleted: cn-clip library remove",
                    root=root.name,
                    count=sum(row.present for row in known.values()),
                )
            )
            return []
        jobs: list[_Job] = []
        returned: list[tuple[int]] = []
        without_vector = set(self.missing.values())
        for entry in listing.entries:
            row = known.pop(entry.name, None)
            changed = row is None or (row.size, row.mtime) != (entry.size, entry.mtime)
            if row is not None and row.image in without_vector:
                changed = True
            if changed or root.kind == "source":  # whose images have no size and time
                jobs.append(_Job(root, entry, row))
                continue
            assert row is not None
            if not row.present:
                returned.append((row.id,))
            if row.failed:
                self.progress.known_failures += 1
            elif row.present:
                self.progress.unchanged += 1
            else:
                self.progress.returned += 1
        gone = [
            (row.id,) for name, row in known.items() if row.present and not listing.may_hide(name)
        ]
        with self.library.database.transaction() as connection:
            connection.executemany("UPDATE files SET present = 1 WHERE id = ?", returned)
            connection.executemany("UPDATE files SET present = 0 WHERE id = ?", gone)
        self.progress.deleted += len(gone)
        return jobs

    def _listed(self, count: int) -> None:
        self.progress.seconds = time.perf_counter() - self.start
        self.on_progress(self.progress)

    def _root_id(self, root: Root) -> int:
        values = (
            root.kind,
            root.location,
            json.dumps(list(root.include)),
            json.dumps(list(root.exclude)),
            root.hidden,
        )
        with self.library.database.transaction() as connection:
            connection.execute(
                "INSERT INTO roots (kind, location, include, exclude, hidden) "
                "VALUES (?, ?, ?, ?, ?) ON CONFLICT (location) DO UPDATE SET "
                "include = excluded.include, exclude = excluded.exclude, hidden = excluded.hidden",
                values,
            )
            row = connection.execute(
                "SELECT id FROM roots WHERE location = ?", (root.location,)
            ).fetchone()
        return int(row[0])

    def _stamp(self, root_id: int) -> str | None:
        stamp: str | None = self.library.query("SELECT stamp FROM roots WHERE id = ?", (root_id,))[
            0
        ][0]
        return stamp

    # Reading.

    def read_all(self, jobs: Sequence[_Job]) -> None:
        """Read the files in threads while the model runs; commit now and then."""
        if not jobs:
            return
        depth = 2 * self.embedder.batch_size
        pool = ThreadPoolExecutor(min(_THREADS, usable_cpus()), thread_name_prefix="cn_clip-index")
        waiting: deque[Future[_Outcome]] = deque()
        try:
            remaining = iter(jobs)
            for job in remaining:
                waiting.append(pool.submit(self._read, job))
                if len(waiting) >= depth:
                    self._take(waiting.popleft().result())
            while waiting:
                self._take(waiting.popleft().result())
            self.commit()
        finally:  # after an error or Ctrl-C, stop reading
            for future in waiting:
                future.cancel()
            pool.shutdown(cancel_futures=True)

    def _read(self, job: _Job) -> _Outcome:
        """In a thread: read a file, and decode it unless its content is known."""
        outcome = _Outcome(job)
        try:
            content = job.root.read(job.entry)
        except (ImageError, DataError, OSError) as error:
            outcome.error, outcome.transient = str(error), True
            return outcome
        outcome.digest, outcome.size = digest_of(content), len(content)
        known = self._image_of(outcome.digest) is not None and outcome.digest not in self.missing
        if known or outcome.digest in self.claimed:
            return outcome
        self.claimed.add(outcome.digest)  # a race only decodes a copy twice
        try:
            outcome.image = read_image_facts(
                content,
                self.embedder.config,
                fast_decode=self.embedder.fast_decode,
                max_pixels=self.embedder.max_pixels,
                thumbnail=self.thumbnails,
            )
        except ImageError as error:
            outcome.error = str(error)
        return outcome

    def _image_of(self, digest: bytes) -> int | None:
        rows = self.library.query("SELECT id FROM images WHERE digest = ?", (digest,))
        return int(rows[0][0]) if rows else None

    def _take(self, outcome: _Outcome) -> None:
        self.progress.done += 1
        outcome.number = self.progress.done
        if outcome.image is not None:
            self.batch.append(outcome)
        else:
            if outcome.error is not None and outcome.digest:
                self.damaged[outcome.digest] = outcome.error
            self.others.append(outcome)
        if len(self.batch) >= self.embedder.batch_size:
            self._embed()
        waiting = len(self.embedded) + len(self.others)
        late = time.perf_counter() - self.last_commit >= COMMIT_SECONDS
        if waiting >= COMMIT_IMAGES or (late and (waiting or self.batch)):
            self.commit()

    def _embed(self) -> None:
        if not self.batch:
            return
        images = [outcome.image.pixels for outcome in self.batch if outcome.image is not None]
        vectors = self.embedder.embed_prepared_images(images)
        self.embedded += zip(self.batch, vectors, strict=True)
        self.progress.embedded += len(self.batch)
        self.batch = []

    # Committing.

    def commit(self) -> None:
        """Write everything that was read so far: the vectors first, then the facts."""
        self._embed()
        if self.embedded or self.others:
            new = self._distinct()
            rows = self.model_rows()
            if new:
                vectors = np.stack([vector for _outcome, vector in new])
                self.library.vector_file(self.model).write(rows, vectors.astype(DTYPE))
            refilled = self._refill()
            with self.library.database.transaction() as connection:
                connection.executemany(
                    "DELETE FROM missing WHERE model = ? AND image = ?",
                    [(self.model.id, image) for image in refilled],
                )
                for image, (outcome, _vector) in enumerate(new, rows + 1):
                    _insert_image(connection, image, outcome)
                connection.execute(
                    "UPDATE models SET rows = ? WHERE id = ?", (rows + len(new), self.model.id)
                )
                # In the order of the files: of copies, any may have been decoded, and the first one
                # is shown.
                outcomes = [*(outcome for outcome, _vector in self.embedded), *self.others]
                outcomes.sort(key=lambda outcome: outcome.number)
                waiting = [each for each in outcomes if not self._record(connection, each)]
            for outcome, _vector in self.embedded:
                # After the commit, so that none belongs to no image; it can be made again.
                if outcome.image is not None and outcome.image.thumbnail is not None:
                    write_thumbnail(self.library.path, outcome.digest, outcome.image.thumbnail)
            self.claimed.difference_update(outcome.digest for outcome, _vector in self.embedded)
            self.embedded, self.others = [], waiting
        self.last_commit = time.perf_counter()
        self.progress.seconds = self.last_commit - self.start
        self.on_progress(self.progress)

    def _refill(self) -> list[int]:
        """Write the vectors of images that had none; return their ids."""
        refilled = {
            self.missing.pop(outcome.digest): vector
            for outcome, vector in self.embedded
            if outcome.digest in self.missing
        }
        images = sorted(refilled)
        if images:
            vectors = np.stack([refilled[image] for image in images])
            self.library.vector_file(self.model).overwrite(np.array(images) - 1, vectors)
        return images

    def model_rows(self) -> int:
        """Return the number of rows that count."""
        rows: int = self.library.query("SELECT rows FROM models WHERE id = ?", (self.model.id,))[0][
            0
        ]
        return rows

    def _distinct(self) -> list[tuple[_Outcome, np.ndarray]]:
        """Return each embedded content once, without those that are in the database."""
        first: dict[bytes, tuple[_Outcome, np.ndarray]] = {}
        for outcome, vector in self.embedded:
            if self._image_of(outcome.digest) is None:
                first.setdefault(outcome.digest, (outcome, vector))
        return list(first.values())

    def _record(self, connection: sqlite3.Connection, outcome: _Outcome) -> bool:
        """Insert or update the row of a file; return False if its image is still being read."""
        job, entry = outcome.job, outcome.job.entry
        error = outcome.error
        image = None
        if error is None:
            row = connection.execute(
                "SELECT id FROM images WHERE digest = ?", (outcome.digest,)
            ).fetchone()
            image = int(row[0]) if row else None
            error = None if row else self.damaged.get(outcome.digest)
            if image is None and error is None:
                return False
        if error is not None:
            self.progress.failed.append((job.root.path_of(entry), error))
            if outcome.transient:  # read again next time
                return True
        elif job.known is None:
            self.progress.new += 1
            self.progress.moved_or_copied += outcome.image is None
        elif job.known.image == image:
            self.progress.unchanged += 1
        else:
            self.progress.changed += 1
        cursor = connection.execute(
            "INSERT INTO files (root, name, position, size, mtime, image, error, caption) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (root, name) DO UPDATE SET "
            "position = excluded.position, size = excluded.size, mtime = excluded.mtime, "
            "image = excluded.image, error = excluded.error, caption = excluded.caption, "
            "present = 1 RETURNING id",
            (
                job.root.id,
                entry.name,
                entry.position,
                entry.size,
                entry.mtime,
                image,
                error,
                entry.caption,
            ),
        )
        (file_id,) = cursor.fetchone()
        if entry.caption is not None or job.known is not None:
            connection.execute("DELETE FROM caption_words WHERE rowid = ?", (file_id,))
        if entry.caption:
            connection.execute(
                "INSERT INTO caption_words (rowid, words) VALUES (?, ?)",
                (file_id, tokens(entry.caption)),
            )
        return True

    def finish(self, root: Root) -> None:
        """Note that a source was read to its end."""
        if root.new_stamp is not None:
            with self.library.database.transaction() as connection:
                connection.execute(
                    "UPDATE roots SET stamp = ? WHERE id = ?", (root.new_stamp, root.id)
                )


def _insert_image(connection: sqlite3.Connection, image: int, outcome: _Outcome) -> None:
    read = outcome.image
    assert read is not None
    latitude, longitude = read.position or (None, None)
    connection.execute(
        "INSERT INTO images (id, digest, bytes, width, height, taken, latitude, longitude, look) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            image,
            outcome.digest,
            outcome.size,
            read.width,
            read.height,
            read.taken,
            latitude,
            longitude,
            read.look,
        ),
    )
