"""The images and the texts of a source of pairs, as items to embed."""

from __future__ import annotations

from collections.abc import Iterator

from cn_clip.data.sources.base import Source
from cn_clip.data.sources.open import id_digest, image_file, names_source, open_source
from cn_clip.embeddings.item import Item, file_item, stamp_of
from cn_clip.errors import DataError, UsageError
from cn_clip.processes import usable_cpus
from cn_clip.translation import _

_TABLES = (".csv", ".parquet", ".tar")
_TABLES_OF_TEXTS = (*_TABLES, ".tsv")


def holds_images(given: str) -> bool:
    """Return whether the images to embed are those of a source of pairs.

    A ``.tsv`` and a ``.jsonl`` without their kind are lists of images, with ids.
    """
    return names_source(given, *_TABLES)


def holds_texts(given: str) -> bool:
    """Return whether the texts to embed are those of a source of pairs."""
    return names_source(given, *_TABLES_OF_TEXTS)


def images_of(uri: str) -> Iterator[Item]:
    """Open a source, and return each of its images once, with its image id.

    Raises:
        UsageError: the URI is invalid.
        DataError: the source does not exist or is damaged, or a row is invalid.
    """
    return _images(_open(uri, "image"))


def _images(source: Source) -> Iterator[Item]:
    seen: set[int] = set()
    for index in range(len(source)):
        row = source.row(index)
        key = id_digest(source, index, row.image_id)
        if row.image_id and key not in seen:
            seen.add(key)
            yield _image(source, index, row.image_id)


def texts_of(uri: str) -> Iterator[Item]:
    """Open a source, and return each of its texts once, with its text id.

    Raises:
        UsageError: the URI is invalid.
        DataError: the source does not exist or is damaged, or a row is invalid.
    """
    return _texts(_open(uri, "text"))


def _texts(source: Source) -> Iterator[Item]:
    seen: dict[int, int] = {}
    for index in range(len(source)):
        row = source.row(index)
        if not row.text_id:  # an image without a text
            continue
        first = seen.setdefault(id_digest(source, index, row.text_id), index)
        # A text comes once per image. Another text under a used id is refused where ids are kept.
        if first == index or source.row(first).text != row.text:
            yield Item(row.text_id, row.text, stamp_of(row.text.encode()), source.where(index))


def _open(uri: str, role: str) -> Source:
    source = open_source(uri, workers=usable_cpus(), required=(role,))
    if not len(source):
        raise UsageError(_("{name} holds no pair", name=source.name))
    return source


def _image(source: Source, index: int, image_id: str) -> Item:
    where = source.where(index)
    file = image_file(source, index)
    if file is not None:
        return file_item(file, image_id, where)
    try:
        content = source.image(index)
    except DataError:
        content = b""  # counted as unreadable when it is decoded
    return Item(image_id, content, stamp_of(content), where)
