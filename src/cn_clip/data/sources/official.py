"""The official TSV of base64 images with its JSON Lines of texts."""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cn_clip.data.sources.base import Row
from cn_clip.data.sources.lines import Lines, json_object
from cn_clip.data.sources.tar import Sample
from cn_clip.errors import DataError
from cn_clip.image.limits import MAX_BASE64
from cn_clip.text import path_text
from cn_clip.translation import _

_ID_BYTES = 256  # maximum length of an id


class Tsv:
    """``X_imgs.tsv`` (id, tab, base64) and ``X_texts.jsonl`` (``{"text_id", "text",
    "image_ids"}``); a text makes one pair with each of its images.

    With ``unpaired``, images without a text (``text=""``) and texts without an image
    (``image_id=""``) are rows too: for comparison, not for training.
    """

    def __init__(
        self,
        name: str,
        images: Path,
        texts: Path | None = None,
        encoding: str | None = None,
        *,
        unpaired: bool = False,
    ) -> None:
        self.name = name
        self._unpaired = unpaired
        texts = texts or images.with_name(f"{images.name.removesuffix('_imgs.tsv')}_texts.jsonl")
        if not texts.is_file():
            raise DataError(
                _(
                    "{name}: no texts at {texts}; set them with ?texts=FILE.jsonl",
                    name=name,
                    texts=texts,
                )
            )
        self._images = Lines(images, limit=MAX_BASE64)
        self._texts = Lines(texts, encoding=encoding)
        image_lines: dict[str, int] = {}
        self._repeated: dict[str, str] = {}
        for line in range(len(self._images)):
            image_id = _image_id(self._images, line)
            if image_id in image_lines:
                self._repeated[image_id] = self._images.where(line)
            image_lines.setdefault(image_id, line)
        self._image_lines = image_lines
        pairs, used = [], Counter[str]()
        for line in range(len(self._texts)):
            ids = self._ids(line)
            used.update(ids)
            pairs += [(line, at) for at in range(len(ids))] or [(line, -1)]
        if not pairs:
            raise DataError(_("{name}: {texts} holds no text", name=name, texts=texts))
        self._unused = [image_id for image_id in image_lines if image_id not in used]
        if unpaired:
            pairs += [(-1, image_lines[image_id]) for image_id in self._unused]
            self._unused = []
        self._pairs = np.array(pairs, dtype=np.int32).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._pairs)

    def row(self, index: int) -> Row:
        line, at = self._pairs[index].tolist()
        if line < 0:
            return Row("", _image_id(self._images, at), "")
        values = self._values(line)
        alone = values.get("image_ids") == []
        if not isinstance(values.get("text"), str) or (at < 0 and not (alone and self._unpaired)):
            remedy = _("; for a test set to compare with, add ?unpaired=yes")
            raise DataError(
                _(
                    '{where}: expected {{"text_id": 1, "text": "...", "image_ids": [1]}}',
                    where=self.where(index),
                )
                + (_(", found no image ids{remedy}", remedy=remedy) if alone else "")
            )
        image_id = "" if at < 0 else str(values["image_ids"][at])
        return Row(values["text"], image_id, str(values.get("text_id", line)))

    def image(self, index: int) -> bytes:
        image_id = self.row(index).image_id
        if not image_id:
            raise DataError(_("{where}: its text has no image", where=self.where(index)))
        if image_id not in self._image_lines:
            raise DataError(
                _(
                    "{where}: no image has the id {image_id!r} in {path}",
                    where=self.where(index),
                    image_id=image_id,
                    path=self._images.path,
                )
            )
        line = self._image_lines[image_id]
        if image_id in self._repeated:
            raise DataError(
                _(
                    "{where}: the image id {image_id!r} is repeated, in {first} and {second}; "
                    "keep one of them",
                    where=self.where(index),
                    image_id=image_id,
                    first=self._images.where(line),
                    second=self._repeated[image_id].rpartition(", ")[2],
                )
            )
        encoded = self._images.raw(line).partition(b"\t")[2]
        return decode_base64(encoded, self._images.where(line))

    def where(self, index: int) -> str:
        line, at = self._pairs[index].tolist()
        return self._images.where(at) if line < 0 else self._texts.where(line)

    def unmatched(self) -> list[str]:
        return [
            _("the image {id!r} of {path} has no text", id=id, path=path_text(self._images.path))
            for id in self._unused
        ]

    def _values(self, line: int) -> dict[str, Any]:
        return json_object(self._texts[line], self._texts.where(line))

    def _ids(self, line: int) -> list[str]:
        try:
            ids = self._values(line).get("image_ids")
        except DataError:
            return []  # row() reports it
        return [str(id) for id in ids] if isinstance(ids, list) else []


def _image_id(images: Lines, line: int) -> str:
    head, tab, _unused = images.raw(line, _ID_BYTES).partition(b"\t")
    if not tab:
        raise DataError(
            _(
                "{where}: expected an id, a tab and base64, found {head!r}",
                where=images.where(line),
                head=head[:40],
            )
        )
    return head.removeprefix(b"\xef\xbb\xbf").decode(errors="replace")


def decode_base64(encoded: bytes, where: str) -> bytes:
    """Decode standard or URL-safe base64, with or without ``data:image/jpeg;base64,``."""
    if encoded[:5].lower() == b"data:":
        encoded = encoded.partition(b",")[2]
    try:
        return base64.b64decode(encoded.strip().translate(bytes.maketrans(b"-_", b"+/")))
    except (binascii.Error, ValueError) as error:
        raise DataError(
            _("{where}: its image is not base64: {error}", where=where, error=error)
        ) from None


def write_tsv(folder: Path, samples: Iterable[Sample], *, split: str) -> None:
    """Write ``SPLIT_imgs.tsv`` and ``SPLIT_texts.jsonl`` into a folder."""
    with (
        (folder / f"{split}_imgs.tsv").open("wb") as images,
        (folder / f"{split}_texts.jsonl").open("w", encoding="utf-8") as texts,
    ):
        for sample in samples:
            images.write(sample.image_id.encode() + b"\t" + base64.b64encode(sample.image) + b"\n")
            for text_id, text in sample.texts:
                image_ids = [parse_id(sample.image_id)]
                line = {"text_id": parse_id(text_id), "text": text, "image_ids": image_ids}
                texts.write(json.dumps(line, ensure_ascii=False) + "\n")


def parse_id(id: str) -> int | str:
    """Return a decimal id as a number, like the official files; ``007`` stays a string."""
    digits = id.isascii() and id.isdigit() and len(id) < 256  # int() has a limit
    canonical = digits and str(int(id)) == id
    return int(id) if canonical else id
