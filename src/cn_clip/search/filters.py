"""Filters of a search: conditions on the facts of images, applied before the best are chosen."""

from __future__ import annotations

import os
import re
import sqlite3
from calendar import monthrange
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError
from cn_clip.files import as_path
from cn_clip.search.fulltext import match_expression
from cn_clip.translation import _

_MAX_INTEGER = 2**63 - 1  # of SQLite; sides and sizes of images are far below
_DATE = re.compile(r"(\d{4})(?:-(\d{1,2}))?(?:-(\d{1,2}))?")


@dataclass(frozen=True, slots=True)
class Filters:
    """Conditions that all results meet; None is no condition.

    Attributes:
        folder: the file is in this folder, or below.
        after: taken on this day or later: ``2024``, ``2024-05`` or ``2024-05-01``. The date is
            that of EXIF, else the time of the last change of the file.
        before: taken on this day or earlier; ``2024`` includes all of the year.
        min_side: shorter side of at least this many pixels.
        min_bytes, max_bytes: size of the file.
        caption: words in the caption.
        text: words in the text recognised in the image.
    """

    folder: str | os.PathLike[str] | None = None
    after: str | None = None
    before: str | None = None
    min_side: int | None = None
    min_bytes: int | None = None
    max_bytes: int | None = None
    caption: str | None = None
    text: str | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, name) is not None for name in self.__slots__)


def allowed_images(connection: sqlite3.Connection, filters: Filters) -> npt.NDArray[np.int64]:
    """Return the ids of the images that have a file and meet all conditions, sorted.

    Raises:
        UsageError: a date is invalid.
    """
    clauses, values = ["files.present", "files.image IS NOT NULL"], list[Any]()
    for name, build in _CONDITIONS.items():
        if (value := getattr(filters, name)) is not None:
            clause, clause_values = build(connection, value)
            clauses.append(clause)
            values += clause_values
    query = (
        "SELECT DISTINCT files.image FROM files JOIN images ON images.id = files.image "
        f"WHERE {' AND '.join(clauses)}"
    )
    found = (row[0] for row in connection.execute(query, values))
    return np.sort(np.fromiter(found, np.int64))


def _in_folder(connection: sqlite3.Connection, folder: Any) -> tuple[str, list[Any]]:
    """Names below a folder are a range of bytes, which the index on (root, name) serves."""
    path = os.path.realpath(as_path(folder))
    clauses, values = [], list[Any]()
    for root, location in connection.execute("SELECT id, location FROM roots WHERE kind='folder'"):
        base = os.fsdecode(location)
        if base == path or base.startswith(path.rstrip(os.sep) + os.sep):
            clauses.append("files.root = ?")
            values.append(root)
        elif path.startswith(base.rstrip(os.sep) + os.sep):
            prefix = os.fsencode(os.path.relpath(path, base)) + b"/"
            clauses.append("(files.root = ? AND files.name >= ? AND files.name < ?)")
            values += [root, prefix, prefix[:-1] + b"0"]  # "0" follows "/"
    if not clauses:
        raise UsageError(
            _("no indexed folder contains {folder}; index it first", folder=os.fspath(folder))
        )
    return f"({' OR '.join(clauses)})", values


# EXIF has local time; so has the file's time here.
_TAKEN = "COALESCE(images.taken, strftime('%Y-%m-%dT%H:%M:%S', files.mtime / 1000000000, 'unixepoch', 'localtime'))"  # noqa: E501


def _after(_unused: sqlite3.Connection, given: Any) -> tuple[str, list[Any]]:
    return f"{_TAKEN} >= ?", [_days(given)[0].isoformat()]


def _before(_unused: sqlite3.Connection, given: Any) -> tuple[str, list[Any]]:
    return f"{_TAKEN} < ?", [f"{_days(given)[1].isoformat()}T24"]  # after each time of that day


def _days(given: str) -> tuple[date, date]:
    """Return the first and the last day of a year, month or day."""
    match = _DATE.fullmatch(given)
    try:
        if match is None:
            raise ValueError
        year, month, day = (None if part is None else int(part) for part in match.groups())
        assert year is not None
        first = date(year, 1 if month is None else month, 1 if day is None else day)
        if day is not None:
            return first, first
        last_month = 12 if month is None else month
        return first, date(year, last_month, monthrange(year, last_month)[1])
    except ValueError:
        raise UsageError(
            _("{given!r} is not a date; give 2024, 2024-05 or 2024-05-01", given=given)
        ) from None


def _compared(expression: str, operator: str) -> _Condition:
    return lambda _unused, value: (
        f"{expression} {operator} ?",
        [max(-_MAX_INTEGER, min(value, _MAX_INTEGER))],
    )


def _matching(table: str, key: str, given: str) -> tuple[str, list[Any]]:
    expression = match_expression(given)
    if not expression:
        raise UsageError(_("{given!r} has no word to search for; give a word", given=given))
    return f"{key} IN (SELECT rowid FROM {table} WHERE {table} MATCH ?)", [expression]


_Condition = Callable[[sqlite3.Connection, Any], tuple[str, list[Any]]]
_CONDITIONS: dict[str, _Condition] = {
    "folder": _in_folder,
    "after": _after,
    "before": _before,
    "min_side": _compared("MIN(images.width, images.height)", ">="),
    "min_bytes": _compared("images.bytes", ">="),
    "max_bytes": _compared("images.bytes", "<="),
    "caption": lambda _, value: _matching("caption_words", "files.id", value),
    "text": lambda _, value: _matching("image_words", "images.id", value),
}
