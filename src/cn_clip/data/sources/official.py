"""The official package's TSV of base64 pictures with JSON Lines of texts."""

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
from cn_clip.files import MAX_FILE
from cn_clip.text import path_text

_ID_BYTES = 256  # an id longer than this is none


class Tsv:
    """``X_imgs.tsv`` (id, tab, base64) and ``X_texts.jsonl`` (``{"text_id", "text",
    "image_ids"}``); each of a text's images makes a pair.

    With ``unpaired``, pictures and texts without the other are rows too, of an empty text or an
    empty image id: enough to compare with, never to train on.
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
            raise DataError(f"{name}: no texts at {texts}; name them with ?texts=FILE.jsonl")
        self._images = Lines(images, limit=MAX_FILE)
        self._texts = Lines(texts, encoding=encoding)
        places: dict[str, int] = {}
        self._repeated: dict[str, str] = {}
        for line in range(len(self._images)):
            image_id = _image_id(self._images, line)
            if image_id in places:
                self._repeated[image_id] = self._images.where(line)
            places.setdefault(image_id, line)
        self._places = places
        pairs, wanted = [], Counter[str]()
        for line in range(len(self._texts)):
            ids = self._ids(line)
            wanted.update(ids)
            pairs += [(line, at) for at in range(len(ids))] or [(line, -1)]
        if not pairs:
            raise DataError(f"{name}: {texts} holds no text")
        self._unused = [each for each in places if each not in wanted]
        if unpaired:
            pairs += [(-1, places[each]) for each in self._unused]
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
            remedy = "; a test set to compare with may lack them: add ?unpaired=yes"
            raise DataError(
                f'{self.where(index)}: expected {{"text_id": 1, "text": "...", "image_ids": [1]}}'
                + (f", found no image ids{remedy}" if alone else "")
            )
        image_id = "" if at < 0 else str(values["image_ids"][at])
        return Row(values["text"], image_id, str(values.get("text_id", line)))

    def image(self, index: int) -> bytes:
        image_id = self.row(index).image_id
        if not image_id:
            raise DataError(f"{self.where(index)}: its text belongs to no picture")
        if image_id not in self._places:
            raise DataError(
                f"{self.where(index)}: no picture has the id {image_id!r} in {self._images.path}"
            )
        line = self._places[image_id]
        if image_id in self._repeated:
            raise DataError(
                f"{self.where(index)}: the picture id {image_id!r} stands twice, in "
                f"{self._images.where(line)} and {self._repeated[image_id].rpartition(', ')[2]}; "
                "keep one of them"
            )
        encoded = self._images.raw(line).partition(b"\t")[2]
        return decoded_base64(encoded, self._images.where(line))

    def where(self, index: int) -> str:
        line, at = self._pairs[index].tolist()
        return self._images.where(at) if line < 0 else self._texts.where(line)

    def unmatched(self) -> list[str]:
        return [
            f"the picture {i!r} of {path_text(self._images.path)} has no text" for i in self._unused
        ]

    def _values(self, line: int) -> dict[str, Any]:
        return json_object(self._texts[line], self._texts.where(line))

    def _ids(self, line: int) -> list[str]:
        try:
            ids = self._values(line).get("image_ids")
        except DataError:
            return []  # a row all the same, which says so when it is read
        return [str(each) for each in ids] if isinstance(ids, list) else []


def _image_id(images: Lines, line: int) -> str:
    head, tab, _ = images.raw(line, _ID_BYTES).partition(b"\t")
    if not tab:
        raise DataError(
            f"{images.where(line)}: expected an id, a tab and base64, found {head[:40]!r}"
        )
    return head.removeprefix(b"\xef\xbb\xbf").decode(errors="replace")


def decoded_base64(encoded: bytes, where: str) -> bytes:
    """Read base64 of either alphabet, with or without ``data:image/jpeg;base64,`` before it."""
    if encoded[:5].lower() == b"data:":
        encoded = encoded.partition(b",")[2]
    try:
        return base64.b64decode(encoded.strip().translate(bytes.maketrans(b"-_", b"+/")))
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: its picture is not base64: {error}") from None


def write_tsv(folder: Path, samples: Iterable[Sample], *, split: str) -> None:
    """Write ``SPLIT_imgs.tsv`` and ``SPLIT_texts.jsonl`` into a folder."""
    with (
        (folder / f"{split}_imgs.tsv").open("wb") as images,
        (folder / f"{split}_texts.jsonl").open("w", encoding="utf-8") as texts,
    ):
        for sample in samples:
            images.write(sample.image_id.encode() + b"\t" + base64.b64encode(sample.image) + b"\n")
            for text_id, text in sample.texts:
                image_ids = [plain_id(sample.image_id)]
                line = {"text_id": plain_id(text_id), "text": text, "image_ids": image_ids}
                texts.write(json.dumps(line, ensure_ascii=False) + "\n")


def plain_id(given: str) -> int | str:
    """Official ids are numbers; ``007`` is a string, so that it comes out as it went in."""
    digits = given.isascii() and given.isdigit() and len(given) < 256  # int() has a limit
    canonical = digits and str(int(given)) == given
    return int(given) if canonical else given
