"""The ``format`` field of our own files: ``cn-clip NAME VERSION``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cn_clip.errors import CNClipError
from cn_clip.translation import _

FIELD = "format"


@dataclass(frozen=True, slots=True)
class Format:
    """A file format and its current version; ``str`` gives the value of the field."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"cn-clip {self.name} {self.version}"

    def check(self, value: Any, where: object, error: type[CNClipError], remedy: str) -> None:
        """Check the field of a file that is read; None passes: old files have no such field.

        Args:
            value: of the field.
            where: the file, for messages.
            error: raised for another format, or a newer version.
            remedy: ends the message for another format; that for a newer version is an update.
        """
        if value is None or value == str(self):
            return
        self.check_not_newer(value, where, error)
        raise error(
            _(
                "{where}: its format is {value!r:.60}, not {self!r}; {remedy}",
                where=where,
                value=value,
                self=str(self),
                remedy=remedy,
            )
        )

    def check_not_newer(self, value: Any, where: object, error: type[CNClipError]) -> None:
        """Raise ``error`` for the field of a file of a newer version."""
        match = re.fullmatch(rf"cn-clip {re.escape(self.name)} (\d{{1,9}})", str(value))
        if match and int(match[1]) > self.version:
            raise error(
                _(
                    "{where}: its format is {value!r}, of a newer cn_clip; update cn_clip",
                    where=where,
                    value=value,
                )
            )
