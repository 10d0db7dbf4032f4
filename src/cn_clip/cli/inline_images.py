"""Images in the terminal, by the protocol of iTerm2."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Sequence
from contextlib import suppress

from PIL import Image

_ROWS = 8  # of the terminal, that an image takes


def print_images(images: Sequence[tuple[str, bytes | None]]) -> None:
    """Print images, each with a line of text below; nothing if stdout is no terminal.

    Terminals that do not know the protocol ignore it; others are iTerm2, WezTerm, Konsole, mintty
    and VS Code (https://iterm2.com/documentation-images.html).

    Args:
        images: texts, and WebP thumbnails.
    """
    if not sys.stdout.isatty():
        return
    for text, content in images:
        if content is not None:
            sys.stdout.write(escape_sequence(content))
        sys.stdout.write(f"\n{text}\n")


def escape_sequence(content: bytes) -> str:
    """Return what shows an image; nothing for a damaged one."""
    stream = io.BytesIO()
    with suppress(OSError, SyntaxError, ValueError):
        with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
            image.save(stream, "PNG")  # not every terminal decodes WebP
        encoded = base64.b64encode(stream.getvalue()).decode("ascii")
        return f"\x1b]1337;File=inline=1;height={_ROWS};size={stream.tell()}:{encoded}\a"
    return ""
