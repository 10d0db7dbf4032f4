"""Caption comparison and language detection."""

from __future__ import annotations

import hashlib
import unicodedata

from cn_clip.translation import N_


def plain(text: str) -> str:
    """Return a caption for comparison: NFKC, lower case, no spaces or punctuation."""
    return unicodedata.normalize("NFKC", text).lower().translate(_KEPT)


class _Kept(dict[int, int | None]):
    """What each character becomes: itself, or nothing; filled as characters come."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "ZPC" else code
        return self[code]


_KEPT = _Kept()


def language_of(text: str) -> str:
    """Classify a text by its letters: Chinese, English (any Latin script), mixed or other."""
    chinese = sum("\u3400" <= c <= "\u9fff" or c >= "\U00020000" for c in text)
    latin = sum(c.isascii() and c.isalpha() for c in text)
    if not chinese and not latin:
        return N_("other")
    fraction = chinese / (chinese + latin / 4)  # one Chinese character counts as four letters
    return N_("Chinese") if fraction > 0.8 else N_("English") if fraction < 0.2 else N_("mixed")


def digest(text: str) -> int:
    """Return a 64-bit digest of a text or an id, so that millions fit into memory."""
    raw = text.encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
