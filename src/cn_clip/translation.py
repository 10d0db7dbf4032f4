"""Messages in the user's language, from a gettext catalogue; in English without one.

``_("no such file: {path}", path=path)`` translates a message, then fills in its values. Messages
are literals, so that they can be extracted. The catalogue is read at the first message, from
``locale/LANGUAGE/LC_MESSAGES/cn_clip.mo``; a process has one language from then on
(a worker that of the process it works for: ``use_languages``; an answer of a server that of the
client: ``answer_in``).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gettext import NullTranslations

DOMAIN = "cn_clip"
LANGUAGE = "CN_CLIP_LANG"  # environment variable; overrides the locale
SYSTEM_REASONS = (  # as ``OSError.strerror`` has them
    "No such file or directory",
    "Permission denied",
    "Operation not permitted",
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "File exists",
    "Is a directory",
    "Not a directory",
    "Directory not empty",
    "File name too long",
    "File too large",
    "Too many open files",
    "Too many levels of symbolic links",
    "Input/output error",
    "Invalid argument",
    "Invalid cross-device link",
    "Device or resource busy",
    "Text file busy",
    "Stale file handle",
    "Broken pipe",
    "Cannot allocate memory",
    "Connection refused",
    "Connection reset by peer",
    "Connection timed out",
    "Network is unreachable",
    "No route to host",
    "Address already in use",
    "Cannot assign requested address",
    "Name or service not known",
    "Temporary failure in name resolution",
)
LOCALES = os.path.join(os.path.dirname(__file__), "locale")

_VARIABLES = (LANGUAGE, "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")  # the first that is set counts
_ENGLISH = ("C", "POSIX", "en")
_ACCEPTED = re.compile(r"([a-zA-Z]{1,8})(?:[-_][\w-]*)?\s*(?:;\s*q\s*=\s*([01](?:\.[0-9]*)?))?")
_LONGEST = 1000  # characters of ``Accept-Language`` that are read
_FORMAT_ERRORS = (LookupError, ValueError, TypeError, AttributeError)  # of str.format


def _(message: str, /, **values: object) -> str:
    """Return a message in the user's language, with its values filled in by ``str.format``.

    A message without values is not formatted: its braces are literal. With values, ``{{`` is a
    literal brace. A translation with wrong placeholders is ignored.
    """
    return translate(message, **values)


def _n(singular: str, plural: str, count: int, /, **values: object) -> str:
    """Return a message in the form for ``count``, which is also its value ``{count}``."""
    english = singular if count == 1 else plural
    catalogue = _catalogue()
    translated = catalogue.ngettext(singular, plural, count) if catalogue else english
    return _filled(translated, english, {"count": count, **values})


def N_(message: str, /) -> str:
    """Mark a message for extraction without translating it; ``translate`` it where it is shown."""
    return message


def translate(message: str, /, **values: object) -> str:
    """Translate a message that is not a literal: one marked by ``N_``, or a part of the help."""
    catalogue = _catalogue()
    # gettext returns the catalogue's header for an empty message.
    translated = catalogue.gettext(message) if catalogue and message else message
    return _filled(translated, message, values)


def _filled(translated: str, english: str, values: Mapping[str, object]) -> str:
    if not values:
        return translated
    if translated != english:
        reason = values.get("reason")
        if isinstance(reason, str) and reason:  # often one of the system, see SYSTEM_REASONS
            values = {**values, "reason": translate(reason)}
        try:
            return _spaced(translated, values)
        except _FORMAT_ERRORS:  # the English message has the right placeholders
            pass
    return english.format(**values)


def _spaced(message: str, values: Mapping[str, object]) -> str:
    """Return a message with its values, and a space between Chinese and Latin where they meet.

    A value may be either, so a message such as 未知的{kind} cannot have the space itself.
    """
    from string import Formatter  # not needed in English

    formatter, text = Formatter(), ""
    for literal, name, form, conversion in formatter.parse(message):
        parts = [literal]
        if name is not None:
            value = formatter.convert_field(values[name], conversion)
            parts.append(formatter.format_field(value, (form or "").format(**values)))
        for part in parts:
            text += " " + part if _needs_space(text[-1:], part[:1]) else part
    return text


def _needs_space(before: str, after: str) -> bool:
    return (_is_chinese(before) and _is_latin(after)) or (_is_latin(before) and _is_chinese(after))


def _is_chinese(character: str) -> bool:
    return "\u4e00" <= character <= "\u9fff"


def _is_latin(character: str) -> bool:
    return character.isascii() and (character.isalnum() or character in ("'", '"', "/", "~", "-"))


def _windows_language() -> str:
    """Return the language of Windows, which sets no variable for it; empty on other systems."""
    if sys.platform != "win32":
        return ""
    import ctypes
    import locale

    language = ctypes.windll.kernel32.GetUserDefaultUILanguage()
    return locale.windows_locale.get(language, "")


def languages() -> list[str]:
    """Return the user's languages such as ``zh_CN``, the preferred first, up to English."""
    value = next((value for name in _VARIABLES if (value := os.environ.get(name))), "")
    value = value or _windows_language()
    wanted: list[str] = []
    for locale in value.split(":"):  # such as zh_CN.UTF-8, de@euro and zh-CN
        language = locale.partition(".")[0].partition("@")[0].replace("-", "_")
        if language.partition("_")[0] in _ENGLISH:
            break
        wanted += [language] if language else []
    return wanted


def use_languages(wanted: Sequence[str]) -> None:
    """Show messages in these languages from now on, as ``languages`` returned them elsewhere."""
    os.environ[LANGUAGE] = ":".join(wanted) or "en"
    _own_catalogue.cache_clear()


_asked: ContextVar[str | None] = ContextVar("_asked", default=None)  # by the client of a server


@contextmanager
def answer_in(accepted: str) -> Iterator[None]:
    """Show messages in this context in the language that a client prefers.

    Args:
        accepted: ``Accept-Language`` of the client. Without a language that messages have, they
            are shown in that of this process.
    """
    token = _asked.set(_preferred(accepted[:_LONGEST]))
    try:
        yield
    finally:
        _asked.reset(token)


def asked_language() -> str | None:
    """Return the language of this context: ``zh`` or ``en``; None for that of this process."""
    return _asked.get()


@lru_cache(256)
def _preferred(accepted: str) -> str | None:
    """Return the language of highest quality in ``Accept-Language`` that messages have."""
    best, found = 0.0, None
    for match in map(_ACCEPTED.fullmatch, map(str.strip, accepted.split(","))):
        if match is None:
            continue
        language, quality = match[1].lower(), float(match[2] or 1)
        if quality > best and (language in _ENGLISH or os.path.isdir(f"{LOCALES}/{language}")):
            best, found = quality, language
    return found


def shown_language() -> str:
    """Return the language of messages as in HTML: ``zh-CN``, or ``en`` without a catalogue."""
    catalogue = _catalogue()
    if catalogue is None:
        return "en"
    return (catalogue.info().get("language") or languages()[0]).replace("_", "-")


def _catalogue() -> NullTranslations | None:
    language = _asked.get()
    return _own_catalogue() if language is None else _catalogue_of(language)


@cache
def _own_catalogue() -> NullTranslations | None:
    return _read_catalogue(languages()) if os.path.isdir(LOCALES) else None


@cache
def _catalogue_of(language: str) -> NullTranslations | None:
    return None if language in _ENGLISH else _read_catalogue([language])


def _read_catalogue(wanted: Sequence[str]) -> NullTranslations | None:
    """Return the catalogue of the first language that has one; None for English."""
    if not wanted:
        return None
    import gettext  # not needed in English
    import struct

    try:
        return gettext.translation(DOMAIN, LOCALES, wanted)
    except (OSError, ValueError, LookupError, struct.error):  # missing or damaged
        return None
