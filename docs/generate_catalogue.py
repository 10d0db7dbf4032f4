"""Bring the Chinese catalogue up to date with the messages of the code, and compile it.

Run it after any change to a message: ``make catalogue``, or ``python docs/generate_catalogue.py``.
It keeps the translations, adds new messages, drops old ones, and prints what has no translation.
Fill in the empty ``msgstr`` of ``cn_clip.po``, and run it again. The translation of a message that
has only changed a little is kept and marked fuzzy: mend it, and delete the line with the mark.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["CN_CLIP_LANG"] = "en"  # of the texts to extract, before the package is imported

from babel.messages.catalog import Catalog, Message
from babel.messages.extract import extract_from_dir
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po
from help_messages import help_messages

import cn_clip
from cn_clip.translation import DOMAIN, LOCALES

SOURCE = Path(cn_clip.__file__).parent
PO = Path(LOCALES) / "zh" / "LC_MESSAGES" / f"{DOMAIN}.po"
MO = PO.with_suffix(".mo")
KEYWORDS = {"_": None, "_n": (1, 2), "N_": None}
METHODS = [("**.py", "python"), ("**.html", "jinja2.ext:babel_extract")]
HEADER = """\
# The words of cn-clip in Chinese. Terms: docs/zh/glossary.md.
# Written by hand, kept complete by: python docs/generate_catalogue.py
#"""


def template() -> Catalog:
    """Return all messages of the code and of the help, without translations."""
    catalog = Catalog(charset="utf-8")
    for file, message in _extracted():
        catalog.add(message, locations=[(file, 0)] if file else [])
    return catalog


def _extracted() -> Iterator[tuple[str, str | tuple[str, ...]]]:
    for file, _line, message, _comments, _context in extract_from_dir(
        SOURCE, METHODS, keywords=KEYWORDS
    ):
        yield file.replace(os.sep, "/"), message
    for message in help_messages():
        yield "", message


def read_catalogue() -> Catalog:
    with PO.open("rb") as stream:
        return read_po(stream, locale="zh_CN", domain=DOMAIN, ignore_obsolete=True)


def updated(catalog: Catalog) -> Catalog:
    """Return a catalogue with the present messages and the translations that it has of them."""
    creation_date = catalog.creation_date
    catalog.update(template(), update_header_comment=False)
    catalog.obsolete.clear()
    catalog.creation_date = creation_date  # else each run would change the file
    catalog.header_comment = HEADER
    catalog.project, catalog.version, catalog.msgid_bugs_address = DOMAIN, "2", ""
    for message in catalog:
        message.flags.discard("python-format")  # "95 % interval" is no placeholder
    return catalog


def untranslated(catalog: Catalog) -> list[str]:
    """Return the messages whose translation is missing or marked fuzzy."""
    return [singular(message) for message in catalog if message.id and not is_done(message)]


def is_done(message: Message) -> bool:
    texts = message.string if isinstance(message.string, tuple) else (message.string,)
    return all(texts) and not message.fuzzy


def singular(message: Message) -> str:
    return message.id if isinstance(message.id, str) else message.id[0]


def po_bytes(catalog: Catalog) -> bytes:
    stream = io.BytesIO()
    write_po(stream, catalog, width=0, include_lineno=False)
    return stream.getvalue()


def mo_bytes(catalog: Catalog) -> bytes:
    stream = io.BytesIO()
    write_mo(stream, catalog)
    return stream.getvalue()


def main() -> int:
    catalog = updated(read_catalogue())
    PO.write_bytes(po_bytes(catalog))
    MO.write_bytes(mo_bytes(catalog))
    missing = untranslated(catalog)
    for message in missing:
        print(f"no translation: {message!r}")
    print(f"{PO}: {len(catalog):,} messages, {len(missing):,} without a translation")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
