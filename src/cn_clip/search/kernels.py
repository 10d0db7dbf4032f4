"""Products of many vectors with a few queries: by numkong, or by numpy, if it is not installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_FEW_QUERIES = 3  # faster one by one than as a matrix
_MAX_NORM = 1.01  # of a float16 unit vector
_FLOAT32_ROUNDING = 2.0**-24


@dataclass(frozen=True, slots=True)
class Scan:
    """Approximate scores of blocks of rows.

    ``score`` returns a new array (B, Q) for the rows of a slice. An exact score differs from it by
    at most ``error`` (Q,), for int8 codes with a probability near 1.
    """

    score: Callable[[slice], Array]
    error: Array


def float_scan(read: Callable[[slice], Array], queries: Array) -> Scan:
    """Return a scan of float16 vectors.

    Args:
        read: returns the vectors of a slice of rows.
        queries: float32 (Q, D).
    """
    # The largest error of a float32 sum (Higham, Accuracy and Stability, section 3.1).
    rounding = queries.shape[1] * _FLOAT32_ROUNDING * np.linalg.norm(queries, axis=1)
    if not has_numkong():
        transposed = queries.T
        return Scan(lambda block: float32_of(read(block)) @ transposed, _MAX_NORM * rounding)
    rounded = queries.astype(np.float16)
    error = np.linalg.norm(queries - rounded, axis=1)  # times the norm of a row: Cauchy-Schwarz
    multiply = products_with(rounded)
    return Scan(
        lambda block: multiply(read(block)).astype(np.float32, copy=False),
        _MAX_NORM * (error + rounding),
    )


def products_with(queries: Array) -> Callable[[Array], Array]:
    """Return a function from rows (B, D) to their products (B, Q) with queries of the same type,
    float16 or int8, by numkong."""
    import numkong

    if len(queries) > _FEW_QUERIES:
        packed = numkong.dots_pack(queries)
        return lambda rows: np.asarray(numkong.dots_packed(rows, packed))
    return lambda rows: np.ascontiguousarray(np.asarray(numkong.cdist(queries, rows, "dot")).T)


def float32_of(vectors: Array) -> npt.NDArray[np.float32]:
    """Return vectors as a new float32 array; numpy alone takes twice as long for float16.

    The bits of a float16 number, moved to their places in a float32 number, are 2^-112 times it;
    only infinity and NaN become finite.
    """
    if vectors.dtype != np.float16:
        return vectors.astype(np.float32)
    bits = vectors.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(~0x70000000)  # copies of the sign
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values


@cache
def has_numkong() -> bool:
    """Return whether numkong is installed and loads."""
    try:
        import numkong  # noqa: F401
    except ImportError:
        return False
    return True
