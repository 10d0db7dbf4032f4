"""Valid Unicode for all text from files, file names and arguments.

Python strings with a lone surrogate (half an emoji, valid in JSON as ``"\\ud83d"``, or a file name
that is not UTF-8) cannot be written to a file. Readers of texts and ids call these functions, so
that other code need not handle them.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from cn_clip.translation import _

REPLACEMENT = "\ufffd"  # replaces an invalid character

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")  # a JSON escape of a surrogate
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # a byte in a name that is not UTF-8 (PEP 383)


def valid_text(text: str) -> str:
    """Return a text as valid Unicode: surrogate pairs are joined, lone surrogates become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def path_text(path: str | os.PathLike[str]) -> str:
    """Return a path as valid text; a UTF-8 path stays unchanged.

    Other bytes, as in names unzipped from a GBK archive, are percent-encoded: ``%D6%D0.jpg``.
    ``urllib.parse.unquote_to_bytes`` restores them.
    """
    text = os.fspath(path)
    return valid_text(_ESCAPED_BYTE.sub(lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", text))


def decode_utf8(raw: bytes) -> str:
    """Decode UTF-8 without its byte order mark; Python's utf-8-sig takes several times as long.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return raw.removeprefix(b"\xef\xbb\xbf").decode()


def read_json(text: str | bytes) -> Any:
    """Parse JSON; all strings become valid Unicode.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has an integer of thousands of
            digits.
    """
    try:
        # Decoded here: the json module accepts surrogates.
        decoded = text if isinstance(text, str) else decode_utf8(text)
        values = json.loads(decoded)
        # Only escapes produce lone surrogates.
        return _valid(values) if _SURROGATE_ESCAPE.search(decoded) else values
    except RecursionError:
        raise ValueError(_("it is nested too deeply")) from None


def _valid(values: Any) -> Any:
    if isinstance(values, str):
        return valid_text(values)
    if isinstance(values, list):
        return [_valid(value) for value in values]
    if isinstance(values, dict):
        return {valid_text(key): _valid(value) for key, value in values.items()}
    return values
