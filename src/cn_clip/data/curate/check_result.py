"""The result of a check: counts, and a limited list of problems of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cn_clip.tokenizer import CONTEXT_LENGTH
from cn_clip.translation import N_

# kind -> (whether it makes a source unfit for training, description)
PROBLEM_KINDS = {
    "row": (True, N_("unreadable rows")),
    "image": (True, N_("images missing or damaged")),
    "empty": (True, N_("empty captions")),
    "text id": (True, N_("text ids used for two texts")),
    "unmatched": (False, N_("images, texts or files without a pair")),
    "character": (False, N_("captions with a broken character (U+FFFD)")),
    "long": (False, N_("captions longer than the context length")),
    "pair": (False, N_("repeated pairs")),
    "same caption": (False, N_("captions used for several images")),
    "same image": (False, N_("near-duplicate images under another id")),
    "small": (False, N_("images smaller than 64 pixels")),
}
MAX_LISTED = 1000  # problems listed of each kind; all are counted


@dataclass(frozen=True, slots=True)
class Problem:
    kind: str
    index: int | None
    """Index of the pair in the source."""
    text: str
    """Location and description."""


@dataclass(slots=True)
class CheckResult:
    """Counts and problems of a checked source.

    Attributes:
        counts: number of problems of each kind.
        problems: up to 1000 of each kind, in row order.
        lengths: caption length in tokens -> number of captions.
        languages: Chinese, English, mixed or other -> number of captions.
        sides: shorter image side in pixels -> number of images.
        samples: (caption, JPEG thumbnail) of pairs drawn at random.
    """

    source: str
    pairs: int = 0
    images: int = 0
    captions: int = 0
    context_length: int = CONTEXT_LENGTH
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    samples: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def fit(self) -> bool:
        """Whether the source can be trained on."""
        return not any(self.counts[kind] for kind, (unfit, _) in PROBLEM_KINDS.items() if unfit)

    def add(self, kind: str, index: int | None, text: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_LISTED:
            self.problems.append(Problem(kind, index, text))

    def add_all(
        self, kind: str, indexes: npt.NDArray[np.int64], describe: Callable[[int], str]
    ) -> None:
        """Add one problem for each row; ``describe`` is called for the listed rows only."""
        for index in indexes[: max(0, MAX_LISTED - self.counts[kind])].tolist():
            self.problems.append(Problem(kind, index, describe(index)))
        self.counts[kind] += len(indexes)
