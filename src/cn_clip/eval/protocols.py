"""Published figures, and the conditions they were measured under; the table is protocols.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from cn_clip.data.sources.open import open_mix
from cn_clip.embedder import Embedder
from cn_clip.errors import DataError, UnknownNameError
from cn_clip.eval.dataset import EvalSet, eval_set_of
from cn_clip.eval.metrics.recall import Recall
from cn_clip.eval.official_files import Direction
from cn_clip.eval.retrieval import Measured, Tick, measure

Setup = Literal["zero-shot", "fine-tuned"]
MEASURES = ("R@1", "R@5", "R@10")


@dataclass(frozen=True, slots=True)
class Protocol:
    """One column of the published tables.

    Attributes:
        images: pictures in the split; None where no source tells.
        texts: texts in the split, likewise.
        published: setup, direction, model -> R@1, R@5, R@10 in percent.
        best_of_five: of a classification set, the figure of the best size of model.
        rerun: model -> percent that a user measured with the official scripts.
        source: where figures and counts are from.
    """

    name: str
    title: str
    task: Literal["retrieval", "classification"]
    split: str
    context_length: int
    source: str
    metric: str = "recall"
    directions: tuple[Direction, ...] = ()
    images: int | None = None
    texts: int | None = None
    published: dict[Setup, dict[Direction, dict[str, list[float]]]] = field(default_factory=dict)
    best_of_five: float | None = None
    rerun: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure beside the published one, both in percent; None where none was published."""

    direction: Direction
    measure: str
    ours: float
    published: float | None

    @property
    def difference(self) -> float | None:
        return None if self.published is None else self.ours - self.published


@cache
def protocols() -> dict[str, Protocol]:
    """Return all protocols by name."""
    text = files("cn_clip.eval").joinpath("protocols.toml").read_text("utf-8")
    return {name: Protocol(name, **values) for name, values in tomllib.loads(text).items()}


def protocol(name: str) -> Protocol:
    """Return a protocol.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in protocols():
        raise UnknownNameError("protocol", name, protocols())
    return protocols()[name]


def open_split(wanted: Protocol, data: str) -> EvalSet:
    """Open a retrieval protocol's data: a source of pairs, or a folder with ``SPLIT_imgs.tsv``.

    Texts are counted by id, and pictures without a text are in the gallery, as the official
    evaluation has both.

    Raises:
        DataError: the counts are not the protocol's, or a row cannot be read.
    """
    official = Path(data) / f"{wanted.split}_imgs.tsv"
    mix = open_mix([f"tsv:{official}?unpaired=yes" if official.is_file() else data])
    found = eval_set_of(mix, merge=False)
    if found.skipped:
        rows = sum(len(part.source) for part in mix)
        raise DataError(
            f"{len(found.skipped):,} of {rows:,} rows of {data} cannot be read, so nothing can be "
            f"compared; the first: {found.skipped[0]}"
        )
    held = len(found.images), len(found.texts)
    for expected, count in zip((wanted.images, wanted.texts), held, strict=True):
        if expected is not None and expected != count:
            raise DataError(
                f"{wanted.title}, has {_counts(wanted)}, but {data} holds {held[0]:,} pictures and "
                f"{held[1]:,} texts; give the whole {wanted.split} split"
            )
    return found


def run_protocol(
    embedder: Embedder, found: EvalSet, *, tick: Tick = lambda done, total: None
) -> Measured:
    """Measure recall on a protocol's data.

    Raises:
        DataError: a picture cannot be read: the figures would compare with nothing.
    """
    measured = measure(embedder, found, tick=tick)
    if measured.failed:
        raise DataError(
            f"{len(measured.failed):,} of {len(found.images):,} pictures cannot be read, so "
            f"nothing can be compared; the first: {measured.failed[0]}"
        )
    return measured


def compare(wanted: Protocol, measured: Measured, *, setup: Setup = "zero-shot") -> list[Compared]:
    """Return each figure of the protocol beside the published one of this model."""
    recalls: dict[Direction, Recall] = {
        "text_to_image": measured.recall.text_to_image,
        "image_to_text": measured.recall.image_to_text,
    }
    rows = []
    for direction in wanted.directions:
        recall = recalls[direction]
        ours = [100 * share for share in (recall.r1, recall.r5, recall.r10)]
        table = wanted.published.get(setup, {}).get(direction, {})
        theirs: Sequence[float | None] = table.get(measured.model, [None] * len(ours))
        rows += [
            Compared(direction, name, own, their)
            for name, own, their in zip(MEASURES, ours, theirs, strict=True)
        ]
    return rows


def _counts(wanted: Protocol) -> str:
    parts = [
        f"{count:,} {what}"
        for count, what in ((wanted.images, "pictures"), (wanted.texts, "texts"))
        if count is not None
    ]
    return " and ".join(parts)
