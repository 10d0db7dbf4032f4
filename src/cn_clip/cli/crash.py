"""Unexpected errors: one sentence for the user, and a file with the details for a bug report."""

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
from cn_clip.translation import _

DEBUG = "CN_CLIP_DEBUG"
_LIBRARIES = ("torch", "numpy", "PIL", "tokenizers", "cyclopts", "huggingface_hub", "lmdb")
_SECRET = re.compile(r"token|secret|passw|credential|api.?key|access.?key|auth", re.IGNORECASE)
# Forms of secrets: user and password in a URL, query parameters, tokens of a hub.
_SECRET_FORMS = (
    (re.compile(r"(?<=://)[^/@\s'\"]+@"), "***@"),
    (re.compile(r"([?&][\w.-]*(?:token|key|sig|secret|passw)[\w.-]*=)[^&\s'\"]+", re.I), r"\1***"),
    (re.compile(r"\bhf_\w{8,}"), "***"),
)  # fmt: skip
# Not secrets: short values, and switches such as TOKENIZERS_PARALLELISM=false, whose words may
# be anywhere in the details.
_MIN_SECRET = 4  # characters
_SWITCHES = ("true", "false", "none", "auto")


def report_crash(error: Exception, arguments: Sequence[str]) -> str:
    """Write the details of an error to a new file; return the sentence that names the file."""
    redact = _Redactor(arguments, os.environ)
    message = one_line(redact(str(error)), limit=110)
    summary = _("unexpected {error_type}", error_type=type(error).__name__) + (
        f": {message}" if message else ""
    )
    try:
        path = _write(redact(_details(error, arguments)))
    except OSError:
        return _(
            "{summary}; please report it. {variable}=1 shows the details",
            summary=summary,
            variable=DEBUG,
        )
    return _("{summary}; please report it with the details in {path}", summary=summary, path=path)


def _write(text: str) -> str:
    handle, path = tempfile.mkstemp(prefix="cn-clip-error-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
    return path


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


class _Redactor:
    """Replaces secrets of the arguments and of the environment in a text."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        values = {v for name, v in environment.items() if _SECRET.search(name)}
        values = {v for v in values if len(v) >= _MIN_SECRET and v.lower() not in _SWITCHES}
        values |= {*_secret_options(arguments)}
        # The longest first, since one may contain another.
        self._values = sorted(values - {""}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, "***")
        for form, replacement in _SECRET_FORMS:
            text = form.sub(replacement, text)
        return text


def _secret_options(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the values of options that are named like secrets."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("-") and _SECRET.search(name):
            yield value if equals else "".join(arguments[index + 1 : index + 2])
