"""A library made of embeddings that ``cn-clip embed images`` or clip-retrieval wrote.

The vectors are copied; no image is decoded or embedded. Such a folder does not open as a library
directly, because it lacks what one needs: the digest by which a moved file or a copy is recognised,
the size and time by which an unchanged file is, and a way to note that an image was removed. These
facts are read once from the files, where they exist.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cn_clip.embedder import Embedder
from cn_clip.embeddings.files import StoredEmbeddings, about_of, read_embeddings
from cn_clip.errors import CNClipError, LibraryError, UsageError
from cn_clip.image.decode import formats_of, read_file
from cn_clip.search.folder import LibraryFolder, add_model
from cn_clip.search.library_model import MIN_COSINE
from cn_clip.search.migration import remove_model
from cn_clip.search.reading import DIGEST_BYTES, digest_of, exif_facts
from cn_clip.search.roots import EMBEDDINGS
from cn_clip.search.vector_file import DTYPE
from cn_clip.text import path_text
from cn_clip.translation import _

_SAMPLE = 8  # images embedded again, if the embeddings do not name their model
_ROOTS = 16  # folders, before those above them are taken instead
_SHOWN = 3  # names in a message


@dataclass(slots=True)
class Import:
    """What was imported.

    Attributes:
        images: with a vector.
        files: of them with a file on this machine; the others have only their name.
        changed: files that are newer than the embeddings; ``cn-clip index`` embeds them.
        copies: files with the content of another.
    """

    images: int = 0
    files: int = 0
    changed: int = 0
    copies: int = 0


@dataclass(slots=True)
class _Item:
    """A row of the embeddings and its file, if there is one."""

    row: int
    name: str
    path: Path | None
    digest: bytes = b""
    size: int = 0
    mtime: int = 0
    width: int = 0
    height: int = 0
    taken: str | None = None
    position: tuple[float, float] | None = None
    copies: list[_Item] = field(default_factory=list)


def import_embeddings(
    library: LibraryFolder,
    path: Path,
    load: Callable[[str], Embedder],
    *,
    model: str | None = None,
    base: Path | None = None,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Import:
    """Fill an empty library with embeddings.

    Args:
        library: opened for writing, locked by ``LibraryFolder.writing``; without images.
        path: ``.npz``, ``.jsonl``, or a folder in clip-retrieval's layout.
        load: loads a model by name.
        model: that embedded the images; by default the one that the embeddings name.
        base: folder of relative paths; by default the current one.
        on_progress: called with the number of images so far and in total.

    Raises:
        UsageError: the library holds images; or the embeddings do not name their model.
        DataError: the embeddings are damaged.
        LibraryError: they are of another model.
        CNClipError: the disk is full; the library stays empty.
    """
    if library.active_model() is not None:
        raise UsageError(
            _(
                "{library} holds images; import into a new library, then: cn-clip library merge",
                library=path_text(library.path),
            )
        )
    stored, about = read_embeddings(path, "images"), about_of(path)
    name = model or about.get("model")
    if not isinstance(name, str):
        raise UsageError(
            _("{path} does not name the model that made it; give --model", path=path_text(path))
        )
    embedder = load(name)
    written = path.stat().st_mtime_ns
    items, done = [], Import()
    for row, given in enumerate(stored.ids):
        items.append(_item(row, given, base or Path.cwd()))
        on_progress(row + 1, len(stored.ids))
    vectors = _unit(stored, embedder, path)
    if about.get("fingerprint") != embedder.fingerprint:
        _check_model(embedder, vectors, items, path)
    images = _distinct(items)
    changed = {item.row for item in items if item.path is not None and item.mtime > written}
    for rest in library.models():  # of an interrupted import
        remove_model(library, rest)
    with library.database.transaction() as connection:
        number = add_model(connection, name, embedder, "building")
    new = next(each for each in library.models() if each.id == number)
    rows = np.array([item.row for item in images], np.int64)
    library.vector_file(new).write(0, vectors[rows].astype(DTYPE))
    with library.database.transaction() as connection:
        roots = _roots(items, path)
        for location, (kind, number_of_root) in roots.items():
            connection.execute(
                "INSERT INTO roots (id, kind, location, include, exclude, hidden) "
                "VALUES (?, ?, ?, '[]', '[]', 0)",
                (number_of_root, kind, location),
            )
        for image, item in enumerate(images, 1):
            latitude, longitude = item.position or (None, None)
            connection.execute(
                "INSERT INTO images (id, digest, bytes, width, height, taken, latitude, longitude) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (image, item.digest, item.size, item.width, item.height, item.taken, latitude,
                 longitude),
            )  # fmt: skip
            for each in (item, *item.copies):
                root, own_name = _place(each, roots)
                connection.execute(
                    "INSERT OR IGNORE INTO files (root, name, size, mtime, image) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (root, own_name, each.size, each.mtime, image),
                )
            if item.row in changed:
                connection.execute("INSERT INTO missing VALUES (?, ?)", (number, image))
        connection.execute(
            "UPDATE models SET rows = ?, state = 'active' WHERE id = ?", (len(images), number)
        )
    done.images, done.changed = len(images), len(changed)
    done.files = sum(item.path is not None for item in items)
    done.copies = len(items) - len(images)
    return done


def _item(row: int, given: str, base: Path) -> _Item:
    """Read the facts of an image from its file."""
    item = _Item(row, given, None)
    name = hashlib.blake2b(given.encode(), digest_size=DIGEST_BYTES, person=b"name").digest()
    item.digest = name  # without a file; no content has it
    with suppress(CNClipError, OSError, ValueError):
        path = base / given
        if not path.is_file():
            return item
        status, content = path.stat(), read_file(path)
        item.path = Path(os.path.abspath(path))
        item.digest, item.size, item.mtime = digest_of(content), len(content), status.st_mtime_ns
        item.width, item.height = _size(content)
        item.taken, item.position = exif_facts(content)
    return item


def _size(content: bytes) -> tuple[int, int]:
    """Return width and height, upright; zeros if the header is damaged."""
    # Untrusted bytes reach a third-party parser: Pillow raises nearly every kind of exception.
    try:
        with Image.open(io.BytesIO(content), formats=formats_of(content)) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except Exception:
        return 0, 0


def _unit(stored: StoredEmbeddings, embedder: Embedder, path: Path) -> npt.NDArray[np.float32]:
    """Return the embeddings as unit vectors (N, D)."""
    lengths = np.linalg.norm(stored.vectors, axis=1, keepdims=True)
    if stored.vectors.shape[1] != embedder.dim or not lengths.all():
        raise LibraryError(
            _(
                "{path} is not of the model {name}: its vectors have {dim} values, or are zero; "
                "give --model",
                path=path_text(path),
                name=embedder.name,
                dim=stored.vectors.shape[1],
            )
        )
    unit: npt.NDArray[np.float32] = stored.vectors / lengths
    return unit


def _check_model(
    embedder: Embedder, vectors: npt.NDArray[np.float32], items: Sequence[_Item], path: Path
) -> None:
    """Embed a few images again and compare.

    Raises:
        LibraryError: the vectors differ, or there is no image to compare.
    """
    lowest = None
    at_hand = [item for item in items if item.path is not None]
    for item in at_hand[:: max(1, len(at_hand) // _SAMPLE)][:_SAMPLE]:
        with suppress(CNClipError):
            vector = embedder.embed_images(os.fspath(item.path or ""))[0]
            cosine = float(vector @ vectors[item.row])
            lowest = cosine if lowest is None else min(lowest, cosine)
    if lowest is not None and lowest >= MIN_COSINE:
        return
    if lowest is None:
        raise LibraryError(
            _(
                "{path} was not made by {name} as it is here, and none of its images is at hand to "
                "compare, such as {example}; give --base FOLDER, or another --model",
                path=path_text(path),
                name=embedder.name,
                example=", ".join(item.name for item in items[:_SHOWN]),
            )
        )
    raise LibraryError(
        _(
            "{path} was made by another model than {name}: cosines down to {lowest:.3f}; give "
            "--model",
            path=path_text(path),
            name=embedder.name,
            lowest=lowest,
        )
    )


def _distinct(items: Sequence[_Item]) -> list[_Item]:
    """Return each content once; others are its copies."""
    first: dict[bytes, _Item] = {}
    for item in items:
        known = first.setdefault(item.digest, item)
        if known is not item:
            known.copies.append(item)
    return [*first.values()]


def _roots(items: Sequence[_Item], path: Path) -> dict[bytes, tuple[str, int]]:
    """Return the roots (location -> kind, id): the top folders of the files that exist, such that
    none is inside another, and one for the names without a file."""
    tops = _outermost({item.path.parent for item in items if item.path is not None})
    while len(tops) > _ROOTS:
        above = _outermost({folder.parent for folder in tops})
        if any(folder == Path(folder.anchor) for folder in above):
            break
        tops = above
    roots = {os.fsencode(folder): ("folder", number) for number, folder in enumerate(tops, 1)}
    if any(item.path is None for item in items):
        location = f"{EMBEDDINGS}{os.path.abspath(path)}"
        roots[os.fsencode(location)] = ("source", len(roots) + 1)
    return roots


def _outermost(folders: set[Path]) -> list[Path]:
    """Return the folders that are in none of the others."""
    return sorted(folder for folder in folders if not folders & {*folder.parents})


def _place(item: _Item, roots: dict[bytes, tuple[str, int]]) -> tuple[int, bytes]:
    """Return the root of an item, and its name there."""
    if item.path is None:
        return next(number for kind, number in roots.values() if kind == "source"), os.fsencode(
            item.name
        )
    path = os.fsencode(item.path)
    folder = next(
        location
        for location, (kind, _number) in roots.items()
        if kind == "folder" and path.startswith(location.rstrip(b"/") + b"/")
    )
    return roots[folder][1], path[len(folder.rstrip(b"/")) + 1 :]
