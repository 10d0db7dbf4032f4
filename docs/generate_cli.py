"""Write docs/cli.md: the help text of `cn-clip` and of every command, 80 columns wide.

Run it after any change to a command: ``make docs``, or ``python docs/generate_cli.py``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cyclopts import App
from rich.console import Console

os.environ["CN_CLIP_LANG"] = "en"  # whatever the locale; read at the first message

from cn_clip.cli import app, load_commands

PAGE = Path(__file__).parent / "cli.md"
WIDTH = 80
HEAD = """\
# Command line

The `--help` of every command. This page is generated; to update it: `python docs/generate_cli.py`.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP.
Results go to stdout; errors, warnings and progress bars go to stderr. `--json` prints one JSON
object; its `format`, such as `cn-clip json 1`, changes when a key is renamed or removed.
"""


def help_text(words: Sequence[str]) -> str:
    """Return what ``cn-clip WORDS --help`` prints, without colours or spaces at line ends."""
    load_commands()
    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH, color_system=None, legacy_windows=False)
    app.help_print(list(words), console=console)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def commands(app: App, before: Sequence[str] = ()) -> Iterator[list[str]]:
    """Yield the words of every command, subcommands included."""
    yield [*before]
    for name in app:
        if not name.startswith("-"):
            yield from commands(app[name], [*before, name])


def render() -> str:
    """Return the whole page."""
    blocks = [
        f"## {' '.join(['cn-clip', *words])}\n\n```text\n{help_text(words)}\n```\n"
        for words in commands(app)
    ]
    return "\n".join([HEAD, *blocks])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
