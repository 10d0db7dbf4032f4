"""What is exported to a vector database: rows with an id, a vector and facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

COMMAND = "library export"
TOGETHER = 1000  # rows sent together
TEXT_BYTES = 60_000  # of a text, below the limit of Milvus of 65,535

OnProgress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows: ids (N,), unit vectors float32 (N, D), and columns of the same length."""

    ids: Sequence[int]
    vectors: npt.NDArray[np.float32]
    columns: Mapping[str, Sequence[Any]]

    def text(self, name: str, row: int) -> str:
        """Return a text of a row, cut to what databases take; empty if there is none."""
        value = self.columns[name][row] or ""
        # NUL is no character of a text in PostgreSQL.
        return value.replace("\0", "").encode()[:TEXT_BYTES].decode(errors="ignore")


@dataclass(frozen=True, slots=True)
class ExportRows:
    """All rows.

    Attributes:
        model, fingerprint: of the vectors.
        dim: of a vector.
        count: of rows.
        texts, numbers: names of the columns; numbers are whole.
        batches: yields the rows.
    """

    model: str
    fingerprint: str
    dim: int
    count: int
    texts: tuple[str, ...]
    numbers: tuple[str, ...]
    batches: Callable[[], Iterator[Batch]]

    @property
    def about(self) -> str:
        """How a collection or table says that it was made by this command."""
        return f"{mark()}: {self.model} {self.fingerprint}"


@dataclass(frozen=True, slots=True)
class Existing:
    """What to do with a collection or table that exists: refuse it, replace it, or update it.

    An update writes every row under its id, so that it can be repeated.
    """

    overwrite: bool = False
    update: bool = False


def mark() -> str:
    """Return how the description of a collection or table that is ours begins."""
    return f"cn-clip {COMMAND}"
