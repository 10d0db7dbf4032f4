"""Output of commands: tables, JSON, and progress on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cn_clip.errors import UsageError
from cn_clip.format_version import FIELD, Format
from cn_clip.translation import _

BAR_WIDTH = 20
_PIPE_WIDTH = 160  # characters of a line of output to a pipe
_RATE_SECONDS = 10.0  # after which an item counts 1 / e of a new one
_ESTIMATE_SECONDS = 300.0  # of reports; a batch of images may take a minute on a busy CPU
_MAX_PRINTED = 20  # messages about rows
_JSON = Format("json", 1)  # of --json; raised when a key is renamed or removed

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]

# Whole numbers that mean something: what is outside would fail late, or never.
Amount = Annotated[int, Parameter(validator=Number(gte=0))]
ContextLength = Annotated[int, Parameter(validator=Number(gte=2, lte=65536))]
Workers = Annotated[int | None, Parameter(validator=Number(gte=0, lte=1024))]


def console() -> Console:
    """Return the console for stdout; output to a pipe is 160 characters wide."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return _PipedConsole(highlight=False, width=_PIPE_WIDTH)


class _PipedConsole(Console):
    """A console that breaks no sentences, and has no blanks at the ends of the rows of a table."""

    def print(self, *objects: Any, **options: Any) -> None:
        if all(isinstance(each, str) for each in objects):
            options.setdefault("soft_wrap", True)
        with self.capture() as captured:
            super().print(*objects, **options)
        lines = captured.get().split("\n")
        self.file.write("\n".join(line.rstrip(" ") for line in lines))
        self.file.flush()


def print_json(values: Mapping[str, Any], *, one_line: bool = False) -> None:
    """Print one JSON object, with its format version first; on one line for a command that prints
    several.

    Chinese is not escaped if the output supports it.
    """
    # With another encoding, the stream would escape as \xe9, which is not JSON.
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    document = {FIELD: str(_JSON)} | dict(values)
    indent = None if one_line else 2
    print(json.dumps(document, ensure_ascii=not unicode, indent=indent), flush=one_line)


def progress() -> Progress:
    """Return a progress bar on stderr, disabled if stderr is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        speed_estimate_period=_ESTIMATE_SECONDS,
        disable=not sys.stderr.isatty(),
    )


class Rate:
    """The items per second of the last seconds, smooth from the first report on."""

    def __init__(self) -> None:
        self._items = self._seconds = 0.0
        self._done, self._since = 0, time.perf_counter()

    def update(self, done: int) -> float:
        """Return the rate, when ``done`` items are done."""
        now = time.perf_counter()
        passed = now - self._since
        kept = math.exp(-passed / _RATE_SECONDS)
        self._items = self._items * kept + done - self._done
        self._seconds = self._seconds * kept + passed
        self._done, self._since = done, now
        return self._items / max(self._seconds, 1e-3)


@contextmanager
def progress_bar(task: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show one progress bar; yield the function that sets it to ``done`` of ``total``."""
    with progress() as bars:
        number = bars.add_task(task, total=None)
        yield lambda done, total: bars.update(number, completed=done, total=total)


def print_some(messages: Sequence[str], where: str) -> None:
    """Print the first messages on stderr, and ``where`` the others are."""
    for message in messages[:_MAX_PRINTED]:
        print(f"cn-clip: {message}", file=sys.stderr)
    if len(messages) > _MAX_PRINTED:
        print(
            _(
                "cn-clip: and {count:,} more; {where}",
                count=len(messages) - _MAX_PRINTED,
                where=where,
            ),
            file=sys.stderr,
        )


def list_failed(messages: Sequence[str]) -> None:
    """Print the messages of unreadable rows on stderr, and their number."""
    print_some(messages, _("--json lists all"))
    if messages:
        count = _(
            "{message_count:,} unreadable and excluded from the scores", message_count=len(messages)
        )
        print(f"cn-clip: {count}", file=sys.stderr)


def check_different_paths(out: str, report: str) -> None:
    """Raise a ``UsageError`` if two outputs of a command have the same path."""
    if os.path.realpath(out) == os.path.realpath(report):
        raise UsageError(_("--out and --report are both {out}; give two different paths", out=out))


def duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds: ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def bar(fraction: float) -> str:
    """Return a bar for a fraction from 0 to 1: up to ``BAR_WIDTH`` cells, in eighths of a cell."""
    eighths = round(fraction * BAR_WIDTH * 8)
    full, remainder = divmod(eighths, 8)
    return "█" * full + ("▏▎▍▌▋▊▉"[remainder - 1] if remainder else "")
