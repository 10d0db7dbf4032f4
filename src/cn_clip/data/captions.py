"""Captions compared: what makes two the same, and in which language one is."""

from __future__ import annotations

import hashlib
import unicodedata


def plain(text: str) -> str:
    """Return a caption without what makes no other caption: width, case, space, punctuation."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return "".join(c for c in folded if unicodedata.category(c)[0] not in "ZPC")


def language_of(text: str) -> str:
    """Tell by its letters whether a text is Chinese, English (any Latin), mixed or other."""
    chinese = sum("\u3400" <= c <= "\u9fff" or c >= "\U00020000" for c in text)
    latin = sum(c.isascii() and c.isalpha() for c in text)
    if not chinese and not latin:
        return "other"
    share = chinese / (chinese + latin / 4)  # a Chinese character says what four letters say
    return "Chinese" if share > 0.8 else "English" if share < 0.2 else "mixed"


def digest(text: str) -> int:
    """Return 64 bits that stand for a text or an id, so that millions fit into memory."""
    raw = text.encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
