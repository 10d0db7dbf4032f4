"""An evaluation set: each image and text once, and their pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cn_clip.data.captions import plain
from cn_clip.data.sources.base import Source, located
from cn_clip.data.sources.open import WeightedSource, id_digest
from cn_clip.errors import CNClipError, DataError
from cn_clip.translation import _


@dataclass(slots=True)
class EvalSet:
    """The images and texts of an evaluation set, each once, and their pairs.

    ``images`` are (source, row) of each image; ``pairs`` (P, 2) are indexes of an image and a text;
    ``skipped`` has a message for each unreadable row or image. ``image_ids`` and ``text_ids`` are
    the ids of the data, at the first occurrence.
    """

    sources: list[Source]
    images: list[tuple[int, int]]
    texts: list[str]
    pairs: npt.NDArray[np.int64]
    skipped: list[str] = field(default_factory=list)
    image_ids: list[str] = field(default_factory=list)
    text_ids: list[str] = field(default_factory=list)

    def image_bytes(self, index: int) -> bytes:
        """Read the bytes of an image."""
        source, row = self.images[index]
        return self.sources[source].image(row)


def eval_set_of(mix: Sequence[WeightedSource], *, merge: bool = True) -> EvalSet:
    """Read the rows of an evaluation set; no image is opened.

    Unpaired items, from ``?unpaired=yes``, are gallery distractors, never queries.

    Args:
        mix: the sources; weights are ignored.
        merge: count equal texts as one text, whatever their ids. False counts one text per text id,
            as the official evaluation does: equal texts with two ids compete with each other.

    Raises:
        DataError: there is no readable pair, or without ``merge`` a text id has two texts.
    """
    images: dict[tuple[int, int], int] = {}
    texts: dict[str | tuple[int, int], int] = {}
    dataset = EvalSet([part.source for part in mix], [], [], np.empty((0, 2), np.int64))
    pairs = []
    for number, source in enumerate(dataset.sources):
        for index in range(len(source)):
            try:
                row = source.row(index)
                if not row.text.strip() and row.text_id:
                    raise DataError(_("its text is empty"))
            except CNClipError as error:
                dataset.skipped.append(located(source, index, error))
                continue
            image = number, id_digest(source, index, row.image_id)
            if row.image_id and image not in images:
                images[image] = len(dataset.images)
                dataset.images.append((number, index))
                dataset.image_ids.append(row.image_id)
            if not row.text_id:
                continue
            normalized = plain(row.text) or row.text
            text = normalized if merge else (number, id_digest(source, index, row.text_id))
            if text not in texts:
                texts[text] = len(dataset.texts)
                dataset.texts.append(row.text)
                dataset.text_ids.append(row.text_id)
            elif not merge and dataset.texts[texts[text]] != row.text:
                raise DataError(
                    _(
                        "{where}: the text id {text_id!r} is also that of {other!r:.40}; give "
                        "each text its own id",
                        where=source.where(index),
                        text_id=row.text_id,
                        other=dataset.texts[texts[text]],
                    )
                )
            if row.image_id:
                pairs.append((images[image], texts[text]))
    if not pairs:
        raise DataError(_("no readable pair in the data; see: cn-clip data check"))
    dataset.pairs = np.unique(np.array(pairs, np.int64), axis=0)
    return dataset
