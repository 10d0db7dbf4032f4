"""Errors that nobody foresaw: one sentence for people, and the details in a file to report."""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence

from cn_clip import __version__
from cn_clip.errors import one_line

DEBUG = "CN_CLIP_DEBUG"
_LIBRARIES = ("torch", "numpy", "PIL", "tokenizers", "cyclopts", "huggingface_hub", "lmdb")
_SECRET = re.compile(r"token|secret|passw|credential|api.?key|access.?key|auth", re.IGNORECASE)
# Secrets by their form: a name and password in an address, its query, tokens of a hub.
_FORMS = (
    (re.compile(r"(?<=://)[^/@\s'\"]+@"), "***@"),
    (re.compile(r"([?&][\w.-]*(?:token|key|sig|secret|passw)[\w.-]*=)[^&\s'\"]+", re.I), r"\1***"),
    (re.compile(r"\bhf_\w{8,}"), "***"),
)  # fmt: skip
_SHORTEST = 4  # characters of a secret in the environment; a "1" there hides nothing


def report_crash(error: Exception, arguments: Sequence[str]) -> str:
    """Write the details of an error to a new file, and return the sentence that names it."""
    hide = _Hiding(arguments, os.environ)
    said = one_line(hide(str(error)), limit=110)
    what = f"unexpected {type(error).__name__}" + (f": {said}" if said else "")
    try:
        place = _written(hide(_details(error, arguments)))
    except OSError:
        return f"{what}; please report it. {DEBUG}=1 shows the details"
    return f"{what}; please report it with the details in {place}"


def _written(text: str) -> str:
    handle, place = tempfile.mkstemp(prefix="cn-clip-error-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
    return place


def _details(error: Exception, arguments: Sequence[str]) -> str:
    versions = {
        name: getattr(sys.modules[name], "__version__", "?")
        for name in _LIBRARIES
        if name in sys.modules
    }
    return "\n".join(
        [
            f"cn-clip {__version__}, Python {platform.python_version()}, {platform.platform()}",
            ", ".join(f"{name} {version}" for name, version in versions.items()),
            f"arguments: {list(arguments)!r}",
            "",
            "".join(traceback.format_exception(error)),
        ]
    )


class _Hiding:
    """Hides secrets of the arguments and of the environment in a text."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        values = {v for name, v in environment.items() if _SECRET.search(name)}
        values = {value for value in values if len(value) >= _SHORTEST} | {*_given(arguments)}
        # The longest first: one may be in another.
        self._values = sorted(values - {""}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, "***")
        for form, replacement in _FORMS:
            text = form.sub(replacement, text)
        return text


def _given(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the values of options whose names speak of secrets."""
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("-") and _SECRET.search(name):
            yield value if equals else "".join(arguments[at + 1 : at + 2])
