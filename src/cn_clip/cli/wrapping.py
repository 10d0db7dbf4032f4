"""Text that breaks between Chinese characters, which have no spaces; Rich breaks at spaces."""

from __future__ import annotations

from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.containers import Lines
from rich.measure import Measurement
from rich.text import Text

_NOT_FIRST = "，。；：！？、）》”’】…％"  # of a line
_NOT_LAST = "（《“‘【"


class WrappedText(Text):
    """Text whose lines may end between any two Chinese characters."""

    def wrap(self, console: Console, width: int, **_options: Any) -> Lines:
        """Return the lines, each at most ``width`` cells wide."""
        lines = Lines()
        for line in self.split(allow_blank=True):
            for part in line.divide(_breaks(line.plain, width)):
                part.rstrip()
                lines.append(part)
        return lines

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widest = max(map(cell_len, self.plain.splitlines()), default=0)
        return Measurement(min(widest, 8), widest)


def _breaks(text: str, width: int) -> list[int]:
    """Return where lines begin, the first apart, so that none is wider than ``width`` cells."""
    breaks: list[int] = []
    start = used = 0
    allowed = None  # the last place in this line where it may end
    for place, character in enumerate(text):
        if place > start and _may_break(text[place - 1], character):
            allowed = place
        used += cell_len(character)
        if used > width and place > start and character != " ":
            start = allowed or place  # in the middle of a word that is too long
            breaks.append(start)
            allowed = None
            used = cell_len(text[start : place + 1])
    return breaks


def _may_break(before: str, after: str) -> bool:
    if before in _NOT_LAST or after in _NOT_FIRST or after == " ":
        return False
    return before == " " or _is_wide(before) or _is_wide(after)


def _is_wide(character: str) -> bool:
    return cell_len(character) == 2 or character in "“”‘’…"
