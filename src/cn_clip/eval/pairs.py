"""Pairs to measure on: every picture once, every text once, and which belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cn_clip.data.captions import plain
from cn_clip.data.pair import Source, located
from cn_clip.data.sources import Weighted, id_digest
from cn_clip.errors import CNClipError, DataError


@dataclass(slots=True)
class EvalSet:
    """The pictures and texts of pairs to measure on, each once.

    ``images`` are (source, row) of each picture; ``pairs`` (P, 2) tell which picture and which
    text belong together; ``skipped`` says what could not be read.
    """

    sources: list[Source]
    images: list[tuple[int, int]]
    texts: list[str]
    pairs: npt.NDArray[np.int64]
    skipped: list[str] = field(default_factory=list)

    def image_bytes(self, number: int) -> bytes:
        """Read the bytes of a picture."""
        source, index = self.images[number]
        return self.sources[source].image(index)


def eval_set_of(mix: Sequence[Weighted]) -> EvalSet:
    """Read the rows of pairs to measure on; no picture is opened.

    Raises:
        DataError: there is none that can be used.
    """
    images: dict[tuple[int, int], int] = {}
    texts: dict[str, int] = {}
    found = EvalSet([part.source for part in mix], [], [], np.empty((0, 2), np.int64))
    pairs = []
    for number, source in enumerate(found.sources):
        for index in range(len(source)):
            try:
                row = source.row(index)
                if not row.text.strip():
                    raise DataError("its text is empty")
            except CNClipError as error:
                found.skipped.append(located(source, index, error))
                continue
            picture = number, id_digest(source, index, row.image_id)
            if picture not in images:
                images[picture] = len(found.images)
                found.images.append((number, index))
            said = plain(row.text) or row.text  # the same sentence under two ids is one text
            if said not in texts:
                texts[said] = len(found.texts)
                found.texts.append(row.text)
            pairs.append((images[picture], texts[said]))
    if not pairs:
        raise DataError("the data hold no pair that can be measured on; see: cn-clip data check")
    found.pairs = np.unique(np.array(pairs, np.int64), axis=0)
    return found
