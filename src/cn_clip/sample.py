"""The sample in the package: captioned images and further texts, for checks and calibration."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

_FOLDER = Path(str(files("cn_clip").joinpath("assets", "sample")))
_GOLDEN_IMAGES = ("photo-cat-0", "photo-rocket-0", "photo-coffee-1", "drawing-orso")
_GOLDEN_TEXTS = 6


@dataclass(frozen=True, slots=True)
class Sample:
    """Images, one caption for each, and further texts."""

    images: list[Path]
    captions: list[str]
    queries: list[str]

    @property
    def texts(self) -> list[str]:
        """All texts."""
        return [*self.captions, *self.queries]


def embedded_sample() -> Sample:
    """Return the sample in the package."""
    with (_FOLDER / "captions.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    queries = (_FOLDER / "queries.txt").read_text(encoding="utf-8").splitlines()
    return Sample(
        images=[_FOLDER / row["image"] for row in rows],
        captions=[row["caption"] for row in rows],
        queries=queries,
    )


def golden_sample() -> Sample:
    """Return the few images and texts of the golden vectors: photos, a drawing, all lengths."""
    sample = embedded_sample()
    images = [path for path in sample.images if path.name.startswith(_GOLDEN_IMAGES)]
    by_length = sorted(sample.queries, key=len)
    step = (len(by_length) - 1) / (_GOLDEN_TEXTS - 1)
    texts = [by_length[round(i * step)] for i in range(_GOLDEN_TEXTS)]
    return Sample(images=images, captions=[], queries=texts)
