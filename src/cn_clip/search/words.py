"""The full-text indexes of a library: the words of captions and of the text in images."""

from __future__ import annotations

from cn_clip.search.folder import LibraryFolder
from cn_clip.search.fulltext import fold_version, tokens

# Table of words -> the texts in it.
TEXTS = {
    "caption_words": "SELECT id, caption FROM files WHERE caption IS NOT NULL AND caption != ''",
    "image_words": "SELECT id, text FROM images WHERE text IS NOT NULL AND text != ''",
}
_VERSION = "words"


def refresh_words(library: LibraryFolder) -> None:
    """Fill the indexes anew if texts are folded in another way now, as after installing OpenCC."""
    stored = library.query("SELECT value FROM versions WHERE name = ?", (_VERSION,))
    if not stored or stored[0][0] != fold_version():
        rebuild_words(library)


def rebuild_words(library: LibraryFolder) -> None:
    """Fill the indexes anew from the texts."""
    with library.database.transaction() as connection:
        for words, statement in TEXTS.items():
            (definition,) = connection.execute(
                "SELECT sql FROM sqlite_schema WHERE name = ?", (words,)
            ).fetchone()
            connection.execute(f"DROP TABLE {words}")
            connection.execute(definition)
            connection.executemany(
                f"INSERT INTO {words} (rowid, words) VALUES (?, ?)",
                ((row, tokens(text)) for row, text in connection.execute(statement).fetchall()),
            )
        connection.execute(
            "INSERT OR REPLACE INTO versions (name, value) VALUES (?, ?)",
            (_VERSION, fold_version()),
        )
