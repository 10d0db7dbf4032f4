"""Detects CSV tables that are given as lists of one item per line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cn_clip.data.sources.table import COLUMN_NAMES, DELIMITERS, common_columns, header_fields
from cn_clip.errors import UsageError
from cn_clip.image.decode import SUFFIXES
from cn_clip.translation import _

_MAX_LINES = 100  # that are looked at
_ALIKE = 0.9  # of them have as many fields as the first line of a table


def refuse_table(head: bytes, name: str) -> None:
    """Raise a ``UsageError`` if a list is a table: its first line is a header of pairs, or its
    lines have a column of image files.

    Args:
        head: the first bytes of the list.
        name: its path, for the message.
    """
    lines = [line for line in re.split(r"[\r\n]+", _decoded(head)) if line.strip()]
    for delimiter in DELIMITERS:
        rows = [header_fields(line, delimiter) for line in lines[:_MAX_LINES]]
        if rows and _is_table(rows):
            raise UsageError(
                _(
                    "{name} is a table with the columns {columns}, not a list of one item per "
                    "line; give it as csv:{name}",
                    name=name,
                    columns=delimiter.join(rows[0]),
                )
            )


def _decoded(head: bytes) -> str:
    text = head.decode("utf-8-sig", "replace")
    # The last character may be cut.
    return text if "\ufffd" not in text[:-1] else head.decode("gb18030", "replace")


def _is_table(rows: Sequence[Sequence[str]]) -> bool:
    columns = rows[0]
    alike = [row for row in rows if len(row) == len(columns)]
    if len(columns) < 2 or len(alike) < _ALIKE * len(rows):
        return False
    roles = sum(bool(common_columns(role, columns)) for role in COLUMN_NAMES)
    if roles > 1 or (roles and len(rows) > 1):
        return True
    below = alike[1:] or alike
    return any(
        all(field.lower().endswith(SUFFIXES) for field in fields)
        for fields in zip(*below, strict=True)
    )
