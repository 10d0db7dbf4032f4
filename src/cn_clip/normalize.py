"""Normalised text: one width of characters, one script. Pure functions of a text.

Official scores are without normalisation, so nothing is normalised unless a caller says so.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module

from cn_clip.errors import UnknownNameError, UsageError
from cn_clip.install import install_command
from cn_clip.translation import _


def nfkc(text: str) -> str:
    """Return the text in Unicode normal form NFKC: ｃａｆé，１ becomes café,1."""
    return unicodedata.normalize("NFKC", text)


def simplified(text: str) -> str:
    """Return the text in simplified characters, by OpenCC.

    Raises:
        UsageError: OpenCC is not installed.
    """
    return opencc_converter("t2s")(text)


NORMALIZERS: dict[str, Callable[[str], str]] = {"nfkc": nfkc, "simplified": simplified}


def normalized(text: str, names: Sequence[str]) -> str:
    """Return a text after the named normalizers, applied in order.

    Raises:
        UsageError: a name is unknown, or OpenCC is needed but not installed.
    """
    for name in names:
        if name not in NORMALIZERS:
            raise UnknownNameError(_("normalizer"), name, NORMALIZERS)
        text = NORMALIZERS[name](text)
    return text


def have_opencc() -> bool:
    """Return whether OpenCC is installed."""
    try:
        import_module("opencc")
    except ImportError:
        return False
    return True


@cache
def opencc_converter(config: str) -> Callable[[str], str]:
    """Return the conversion of one of OpenCC's configurations, such as ``t2s``.

    Raises:
        UsageError: OpenCC is not installed.
    """
    try:
        opencc = import_module("opencc")
    except ImportError:
        raise UsageError(
            _(
                "simplified and traditional characters need OpenCC: {command}",
                command=install_command("eval"),
            )
        ) from None
    convert: Callable[[str], str] = opencc.OpenCC(config).convert
    return convert
