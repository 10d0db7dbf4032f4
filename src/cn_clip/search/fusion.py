"""Image ranking and text hits in one order, and why each image is in it.

The scores are summed in logits. ``logit_scale`` times the cosine is the logit that the model was
trained with; a text match adds ``WEIGHT`` times its strength. So a text match wins where no image
looks like the query, and a weak one gives way to an image that does. Fusion by reciprocal rank
(Cormack, Clarke and Büttcher, SIGIR 2009) knows no strength: the best text hit ties with the best
image, however little of the query it has. ``benchmarks/text_in_images.py`` measures both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError
from cn_clip.search.fulltext import MAX_QUERY, fold, is_character, units, units_of_folded
from cn_clip.translation import N_, _

Field = Literal["text", "caption"]  # text in the image, or its caption
Reason = Literal["image", "text", "caption"]
_SHOWN_REASONS = (N_("image"), N_("text"), N_("caption"))  # translated where they are shown

CANDIDATES = 200  # texts, by bm25, that are worth a call of ``match_text``
WEIGHT = 40.0  # logits of a text match of strength 1
_PARTIAL = 0.2  # of the strength is for covering both the query and the line
_CHANCE = 0.5  # by which each further unit reduces that a match is by chance
_MAX_UNITS = 2000  # of a line that are compared with a query


@dataclass(frozen=True, slots=True)
class TextMatch:
    """A text of an image that has a query, or a part of it.

    Attributes:
        field: where the text is from.
        line: its line that matches best, for display.
        strength: 0 to 1, see ``match_text``.
    """

    field: Field
    line: str
    strength: float


@dataclass(frozen=True, slots=True)
class Fused:
    """An image in the order of a fused search.

    Attributes:
        id: of the image.
        score: in logits; only differences between the images of one search mean anything.
        cosine: of the image and the query; None if the image ranking has no such image.
        match: the text that matches, if one does.
        reasons: why the image is there, the stronger first.
    """

    id: int
    score: float
    cosine: float | None
    match: TextMatch | None
    reasons: tuple[Reason, ...]


def match_text(query: str, text: str, field: Field = "text") -> TextMatch | None:
    """Return how strongly a text of an image matches a query; None if nothing that counts is in it.

    What counts are runs of two or more units (Chinese characters, words, numbers) that query and
    line share in the same order, and single words and numbers of at least two letters or digits;
    for a query of one unit, that unit. The strength is the square of: the share of the query that
    they cover, or of the line if that is larger (写着“营业中”的牌子 covers the line 营业中), times
    ``1 - 0.5**size``, since little matches by chance; a fifth of the share is for covering both.
    The size of a character is 1, of a word or number half its letters.

    Args:
        query: what is searched.
        text: lines, such as those of ``TextReader.recognize``, or a caption. Matched line by line,
            and as a whole if it is one text broken into lines.
        field: where the text is from.
    """
    wanted = units(query)[:MAX_QUERY]
    lines = text.split("\n")
    seen = [units_of_folded(line)[:_MAX_UNITS] for line in fold(text).split("\n")]
    if len(lines) > 1:
        lines.append(" ".join(lines))
        seen.append([unit for line in seen for unit in line][:_MAX_UNITS])
    best: TextMatch | None = None
    for line, line_units in zip(lines, seen, strict=True):
        strength = _strength(wanted, line_units)
        if strength and (best is None or strength > best.strength):
            best = TextMatch(field, line.strip(), strength)
    return best


def fuse(
    ids: npt.NDArray[np.int64],
    cosines: npt.NDArray[Any],
    matches: Mapping[int, TextMatch],
    *,
    logit_scale: float,
    k: int | None = None,
) -> list[Fused]:
    """Return images by image and text score, best first.

    Args:
        ids: (N,) of the image ranking, best first, each once. The more there are beyond ``k``, the
            less a text match is lifted by mistake; the ids of all ``matches`` should be among them.
        cosines: (N,) of the same images; a missing id counts as the lowest of them.
        matches: id -> the stronger match of its texts, from ``match_text``.
        logit_scale: of the model, ``Embedder.logit_scale``.
        k: number of results; all by default.

    Raises:
        UsageError: ``ids`` and ``cosines`` differ in shape.
    """
    if ids.ndim != 1 or ids.shape != cosines.shape:
        raise UsageError(
            _(
                "{ids} ids and {cosines} cosines do not belong together; give one for each",
                ids=ids.shape,
                cosines=cosines.shape,
            )
        )
    by_id = dict(zip(ids.tolist(), cosines.tolist(), strict=True))
    lowest = min(by_id.values(), default=0.0)
    every = [*by_id, *(id for id in matches if id not in by_id)]
    scores = {id: logit_scale * by_id.get(id, lowest) for id in every}
    for id, match in matches.items():
        scores[id] += WEIGHT * match.strength
    order = sorted(every, key=lambda id: -scores[id])[:k]  # stable: ties keep the image ranking
    shown = set(ids[: len(order)].tolist())
    return [
        Fused(
            id, scores[id], by_id.get(id), matches.get(id), _reasons(matches.get(id), id in shown)
        )
        for id in order
    ]


def _reasons(match: TextMatch | None, by_image: bool) -> tuple[Reason, ...]:
    """Return why an image is in the results; ``by_image`` if its cosine alone puts it there."""
    text: tuple[Reason, ...] = (match.field,) if match else ()
    image: tuple[Reason, ...] = ("image",) if by_image or not match else ()
    return text + image


def _strength(wanted: list[str], seen: list[str]) -> float:
    """Return the strength of a match, 0 if query and line share nothing that counts."""
    shared = _shared(wanted, seen)
    if not shared:
        return 0.0
    of_query, of_line = shared / _size(wanted), shared / _size(seen)
    share = (1 - _PARTIAL) * max(of_query, of_line) + _PARTIAL * min(of_query, of_line)
    return float((share * (1 - _CHANCE**shared)) ** 2)


def _shared(wanted: list[str], seen: list[str]) -> int:
    """Return the size of the runs of a query that a line has, as far as they count."""
    if set(wanted).isdisjoint(seen):
        return 0
    if len(wanted) == 1:
        return _size(wanted)
    blocks = SequenceMatcher(None, wanted, seen, autojunk=False).get_matching_blocks()
    runs = [wanted[block.a : block.a + block.size] for block in blocks]
    return sum(_size(run) for run in runs if len("".join(run)) > 1)


def _size(found: list[str]) -> int:
    return sum(1 if is_character(unit) else max(1, len(unit) // 2) for unit in found)
