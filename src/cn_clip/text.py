"""Text as it enters: valid Unicode, whatever a file, a file name or an argument held.

Half an emoji (a lone surrogate, valid in JSON as ``"\\ud83d"``) and a file name that is not UTF-8
are strings in Python that no file can be written with. Every entrance of texts and ids calls one of
these functions, so that nothing behind it has to think of them.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

REPLACEMENT = "\ufffd"  # what stands for a character that was broken

_HALVES = re.compile(r"\\u[dD][89a-fA-F]")  # JSON's escape of one half of a surrogate pair
_BYTES = re.compile("[\udc80-\udcff]")  # how Python shows the bytes of a name that is not UTF-8


def valid_text(text: str) -> str:
    """Return a text that can be encoded: halves of one character are joined, a lone surrogate is
    replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def path_text(path: str | os.PathLike[str]) -> str:
    """Return a path as a text to name it by: as it is, unless it is not UTF-8.

    Other bytes, as in names unzipped from a GBK archive, are written as in a URL: ``%D6%D0.jpg``;
    ``urllib.parse.unquote_to_bytes`` leads back to the name.
    """
    text = os.fspath(path)
    return valid_text(_BYTES.sub(lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", text))


def read_json(text: str | bytes) -> Any:
    """Read JSON whose strings are then valid Unicode.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has a number of thousands of digits.
    """
    try:
        # Decoded here: the json module lets surrogates pass.
        whole = text if isinstance(text, str) else text.decode("utf-8-sig")
        values = json.loads(whole)
        # Only an escape can bring a lone surrogate; without one, nothing has to be looked through.
        return _valid(values) if _HALVES.search(whole) else values
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _valid(values: Any) -> Any:
    if isinstance(values, str):
        return valid_text(values)
    if isinstance(values, list):
        return [_valid(each) for each in values]
    if isinstance(values, dict):
        return {valid_text(key): _valid(value) for key, value in values.items()}
    return values
