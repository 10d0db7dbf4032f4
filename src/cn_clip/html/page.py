"""Self-contained HTML pages, from Jinja templates that lie beside the code of each report."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable
from functools import cache
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape
from PIL import Image

from cn_clip.errors import UsageError
from cn_clip.html.charts import histogram, overlaid_histograms
from cn_clip.image.decode import read_image
from cn_clip.outputs import claim, own_file, reads_as
from cn_clip.publish import write_text
from cn_clip.text import path_text
from cn_clip.translation import _, shown_language, translate

if TYPE_CHECKING:
    from jinja2 import Environment

_SUFFIXES = (".html", ".htm")
_THUMBNAIL_SIDE = 128  # pixels of the longer side


def write_page(path: Path, template: str, title: str, command: str, **values: Any) -> None:
    """Write an HTML page atomically; it records the command that wrote it.

    Args:
        path: of the page.
        template: path of a Jinja template in this package, which extends ``html/page.html``.
        title: of the page.
        command: that writes it, such as ``eval diagnose``.
        values: of the template.
    """
    values |= {"start": Markup(_start(command)), "title": title}
    html = _environment().get_template(template).render(values)
    write_text(path, path_text(html))  # file names may be invalid Unicode


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # 50 ms, for pages alone

    environment = Environment(
        loader=PackageLoader("cn_clip", ""),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "data_uri": data_uri,
        "fmt": format,
        "points": points,
        "translated": translate,
    }
    environment.globals |= {
        "_": message,
        "histogram": histogram,
        "overlaid_histograms": overlaid_histograms,
    }
    return environment


def message(text: str, /, **values: object) -> Markup:
    """Translate a message of a template, which may have tags; its values are escaped."""
    shown = {
        name: value if isinstance(value, Number) else escape(value)
        for name, value in values.items()
    }
    return Markup(translate(text, **shown))


def points(fraction: float, sign: str = "") -> str:
    """Return a fraction in percentage points: ``12.3``, with the sign ``+`` always signed."""
    return f"{100 * fraction:{sign}.1f}"


def claim_page(
    path: str | Path, command: str, *, option: str = "--report", inputs: Iterable[str | Path] = ()
) -> Path:
    """Check that a command may write its report to ``path``, without touching it. Return the path.

    Raises:
        UsageError: the path names another format; see also ``outputs.claim``.
    """
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise UsageError(
            _(
                "{option} {path} is not the name of a web page; give a name that ends in .html",
                option=option,
                path=path_text(path),
            )
        )
    own = own_file(command, reads_as(_start_of(command), b""))
    return claim(path, own, option=option, inputs=inputs)


def _start(command: str) -> str:
    return (
        f'<!doctype html>\n<html lang="{shown_language()}"><head>'
        f'<meta name="generator" content="cn-clip {command}">'
    )


def _start_of(command: str) -> re.Pattern[bytes]:
    """Return the pattern of the start of a command's pages, in any language."""
    return re.compile(
        rb'<!doctype html>\n<html lang="[\w-]+"><head><meta name="generator" content="cn-clip '
        + re.escape(command.encode())
        + rb'">'
    )


def thumbnail(content: bytes) -> bytes:
    """Return an image as a small JPEG, with transparent pixels white."""
    image = read_image(content, background="white")
    if image.mode != "RGB":
        image = image.convert("RGB")  # convert("RGB") copies
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def data_uri(content: bytes) -> str:
    """Return a JPEG or WebP file as a data: URI."""
    kind = "webp" if content.startswith(b"RIFF") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
