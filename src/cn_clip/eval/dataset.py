"""Pairs to measure on: every picture once, every text once, and which belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cn_clip.data.captions import plain
from cn_clip.data.sources.base import Source, located
from cn_clip.data.sources.open import WeightedSource, id_digest
from cn_clip.errors import CNClipError, DataError


@dataclass(slots=True)
class EvalSet:
    """The pictures and texts of pairs to measure on, each once.

    ``images`` are (source, row) of each picture; ``pairs`` (P, 2) tell which picture and which
    text belong together; ``skipped`` says what could not be read. ``image_ids`` and ``text_ids``
    are those of the data, where each was first met.
    """

    sources: list[Source]
    images: list[tuple[int, int]]
    texts: list[str]
    pairs: npt.NDArray[np.int64]
    skipped: list[str] = field(default_factory=list)
    image_ids: list[str] = field(default_factory=list)
    text_ids: list[str] = field(default_factory=list)

    def image_bytes(self, number: int) -> bytes:
        """Read the bytes of a picture."""
        source, index = self.images[number]
        return self.sources[source].image(index)


def eval_set_of(mix: Sequence[WeightedSource], *, merge: bool = True) -> EvalSet:
    """Read the rows of pairs to measure on; no picture is opened.

    What ``?unpaired=yes`` adds is there to be found by mistake, and asks for nothing.

    Args:
        mix: the sources; weights count for nothing.
        merge: texts that say the same are one text, whatever their ids. Without, a text id is a
            text, as the official evaluation has it: the same sentence under two ids competes with
            itself.

    Raises:
        DataError: there is no pair that can be used, or without ``merge`` a text id stands for
            two texts.
    """
    images: dict[tuple[int, int], int] = {}
    texts: dict[str | tuple[int, int], int] = {}
    found = EvalSet([part.source for part in mix], [], [], np.empty((0, 2), np.int64))
    pairs = []
    for number, source in enumerate(found.sources):
        for index in range(len(source)):
            try:
                row = source.row(index)
                if not row.text.strip() and row.text_id:
                    raise DataError("its text is empty")
            except CNClipError as error:
                found.skipped.append(located(source, index, error))
                continue
            picture = number, id_digest(source, index, row.image_id)
            if row.image_id and picture not in images:
                images[picture] = len(found.images)
                found.images.append((number, index))
                found.image_ids.append(row.image_id)
            if not row.text_id:
                continue
            same = plain(row.text) or row.text
            said = same if merge else (number, id_digest(source, index, row.text_id))
            if said not in texts:
                texts[said] = len(found.texts)
                found.texts.append(row.text)
                found.text_ids.append(row.text_id)
            elif not merge and found.texts[texts[said]] != row.text:
                raise DataError(
                    f"{source.where(index)}: the text id {row.text_id!r} stands for "
                    f"{found.texts[texts[said]]!r:.40} too; give each text an id of its own"
                )
            if row.image_id:
                pairs.append((images[picture], texts[said]))
    if not pairs:
        raise DataError("the data hold no pair that can be measured on; see: cn-clip data check")
    found.pairs = np.unique(np.array(pairs, np.int64), axis=0)
    return found
