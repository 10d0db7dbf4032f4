"""How verbs print: tables for people, JSON for machines, progress on stderr."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cn_clip.errors import UsageError

BAR_WIDTH = 20

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]


def console() -> Console:
    """Return the console for stdout; a pipe gets lines as long as they are."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def print_json(value: Any) -> None:
    """Print one JSON document, with Chinese readable where the output can hold it."""
    # Elsewhere the console's own escapes, such as \xe9, are no JSON.
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    print(json.dumps(value, ensure_ascii=not unicode, indent=2))


def progress() -> Progress:
    """Return a progress bar on stderr; silent when stderr is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def check_different_paths(out: str, report: str) -> None:
    """Refuse one place for two outputs of a command."""
    if os.path.realpath(out) == os.path.realpath(report):
        raise UsageError(f"--out and --report are both {out}; give each a place of its own")


def bar(share: float) -> str:
    """Draw a share between 0 and 1 as a bar of up to ``BAR_WIDTH`` cells, in eighths of a cell."""
    eighths = round(share * BAR_WIDTH * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")
