"""The text in the images of a library, recognised and indexed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from cn_clip.errors import ImageError, LibraryError
from cn_clip.processes import usable_cpus
from cn_clip.search.folder import LibraryFolder
from cn_clip.search.fulltext import tokens
from cn_clip.search.images import image_bytes
from cn_clip.search.ocr import TextReader

_COMMIT_SECONDS = 2.0


@dataclass(slots=True)
class TextProgress:
    """Recognition of text so far.

    Attributes:
        total: images to read.
        done: images read, of ``total``.
        with_text: images in which text was recognised.
        failed: messages about images that could not be read now; they are tried again next time.
        seconds: since the start.
    """

    total: int = 0
    done: int = 0
    with_text: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def index_text(
    library: LibraryFolder,
    reader: TextReader,
    *,
    on_progress: Callable[[TextProgress], None] = lambda progress: None,
) -> TextProgress:
    """Recognise the text of all images that were not looked at yet.

    Commits every 2 s; an interrupted run goes on where it ended.

    Args:
        library: opened for writing, locked by ``LibraryFolder.writing``.
        reader: with one thread per image.
        on_progress: called after each commit.

    Raises:
        CNClipError: the disk is full; finished images stay.
    """
    images = [
        image
        for (image,) in library.query(
            "SELECT id FROM images WHERE text IS NULL AND files > 0 ORDER BY id"
        )
    ]
    progress = TextProgress(total=len(images))
    start = last = time.perf_counter()
    read: list[tuple[int, str]] = []

    def commit() -> None:
        nonlocal last
        with library.database.transaction() as connection:
            for image, text in read:
                connection.execute("UPDATE images SET text = ? WHERE id = ?", (text, image))
                if text:
                    connection.execute(
                        "INSERT INTO image_words (rowid, words) VALUES (?, ?)",
                        (image, tokens(text)),
                    )
        read.clear()
        last = time.perf_counter()
        progress.seconds = last - start
        on_progress(progress)

    def recognise(image: int) -> tuple[int, str | LibraryError]:
        try:
            content = image_bytes(library, image)
        except LibraryError as error:
            return image, error
        try:
            return image, "\n".join(line.text for line in reader.recognize(content))
        except ImageError:  # it can be embedded, but not read: it has no text for us
            return image, ""

    threads = usable_cpus()
    remaining = iter(images)
    with ThreadPoolExecutor(threads, thread_name_prefix="cn_clip-text") as pool:
        while chunk := list(islice(remaining, 4 * threads)):
            for image, result in pool.map(recognise, chunk):
                progress.done += 1
                if isinstance(result, LibraryError):
                    progress.failed.append(str(result))
                    continue
                progress.with_text += bool(result)
                read.append((image, result))
            if time.perf_counter() - last >= _COMMIT_SECONDS:
                commit()
        commit()
    return progress
