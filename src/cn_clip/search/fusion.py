"""Image ranking and text hits in one order, and why each image is in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cn_clip.search.fulltext import units

Field = Literal["image", "caption"]

_MAX_UNITS = 2000  # of a text that are compared with the query


@dataclass(frozen=True, slots=True)
class TextMatch:
    id: int
    field: Field
    text: str
    matched: int
    of_query: float
    of_line: float


def match_text(id: int, query: str, text: str, field: Field = "image") -> TextMatch | None:
    wanted = units(query)
    best = None
    for line in [*text.splitlines(), text]:
        seen = units(line)[:_MAX_UNITS]
        if not seen or not wanted:
            continue
        blocks = SequenceMatcher(None, wanted, seen, autojunk=False).get_matching_blocks()
        sizes = [
            b.size
            for b in blocks
            if b.size > 1 or (b.size and (len(wanted) == 1 or len(wanted[b.a]) > 1))
        ]
        matched = sum(sizes)
        if matched and (best is None or matched > best.matched):
            best = TextMatch(
                id, field, line, matched, matched / len(wanted), min(1.0, matched / len(seen))
            )
    return best
