"""Read an LMDB file without memory-mapping: a damaged file cannot crash the process.

``data.mdb`` is a B+tree of pages (data version 1, LMDB 0.9, 64-bit little-endian). The one of the
two meta pages with the later transaction is valid; branch, leaf and overflow pages follow. The
structures are those of ``mdb.c`` in https://git.openldap.org/openldap/openldap, branch mdb.RE/0.9.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cn_clip.errors import DataError
from cn_clip.files import wrong_format
from cn_clip.image.limits import MAX_BASE64
from cn_clip.translation import _

_HEADER = struct.Struct("<QHHHH")  # page number, padding, kind, end of offsets, start of nodes
_OVERFLOW_HEADER = struct.Struct("<QHHI")  # page number, padding, kind, count of pages
_META = struct.Struct("<IIQQ")  # magic, version, address, size of the map; two trees follow
_TREE = struct.Struct("<IHHQQQQQ")  # padding, flags, depth, 3 counts of pages, entries, root
_TRANSACTION = struct.Struct("<QQ")  # last page, number; they follow the trees
_META_SIZE = _HEADER.size + _META.size + 2 * _TREE.size + _TRANSACTION.size
_NODE = struct.Struct("<HHHH")  # low and high half of size or child, flags, length of the key
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE, _PAGE_KINDS = 0x01, 0x02, 0x04, 0x08, 0x6F
_ON_OVERFLOW_PAGES = 0x01  # flag of a node: its value is the number of an overflow page
_PAGE_SIZES = tuple(512 << shift for shift in range(7))
_MAX_DEPTH = 32  # LMDB's limit


class LmdbFile:
    """The values of an LMDB by key.

    No file stays open, so an instance can be pickled, forked and used by threads. Every page is
    checked before use: even in a damaged file, a lookup reads one page per tree level.
    """

    def __init__(self, path: Path) -> None:
        """Check the file's meta pages and its size.

        Raises:
            DataError: the file is not an LMDB, is of another architecture, or is truncated.
        """
        self.path = path
        with _opened(path) as pages:
            pages.check_size()
            self.size, self.entries = pages.size, pages.main.entries

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key, or ``None``.

        Raises:
            DataError: a page on the way to the value is damaged.
        """
        with _opened(self.path) as pages:
            return pages.value(key)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the keys and their values, in the order of the keys.

        Raises:
            DataError: a page is damaged.
        """
        with _opened(self.path) as pages:
            for number, page in pages.leaves(pages.main):
                for node in page.nodes:
                    yield page.key(node), pages.node_value(number, page.content, node)


class _Tree(NamedTuple):
    flags: int
    depth: int
    entries: int
    root: int


class _Meta(NamedTuple):
    """A meta page: pages in the file, transaction number, tree of unused pages, tree of values."""

    page_count: int
    transaction: int
    free: _Tree
    main: _Tree


class _Page(NamedTuple):
    """A branch or leaf page: its bytes, and the offsets of its nodes, in key order."""

    content: bytes
    nodes: tuple[int, ...]

    def key(self, node: int) -> bytes:
        length = self.content[node + 6] | self.content[node + 7] << 8
        return self.content[node + _NODE.size : node + _NODE.size + length]

    def child(self, node: int) -> int:
        low, middle, high, _ = _NODE.unpack_from(self.content, node)
        return int(low | middle << 16 | high << 32)


class _Pages:
    """The pages of an open file, by number."""

    def __init__(self, stream: FileIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._page_count = 2  # the meta pages, until they are read
        self.size = os.fstat(stream.fileno()).st_size
        first = self._read(0, min(_META_SIZE, self.size))
        self._check_kind(first)
        (self._page_size,) = struct.unpack_from("<I", first, _HEADER.size + _META.size)
        if self._page_size not in _PAGE_SIZES:
            raise self._damaged(_("its pages have {page_size} bytes", page_size=self._page_size))
        second = self._read(self._page_size, _META_SIZE)
        metas = self._meta(0, first), self._meta(1, second)
        self._page_count, _unused, self._free, self.main = max(
            metas, key=lambda meta: meta.transaction
        )
        if self.main.flags:
            raise self._damaged(
                _("its key order is custom (flags {flags:#x})", flags=self.main.flags)
            )

    def check_size(self) -> None:
        """Raise a ``DataError`` unless the file has all pages in use.

        LMDB does not write unused pages at the end of the file.
        """
        pages_in_file = self.size // self._page_size
        missing = self._page_count - pages_in_file
        if missing <= 0:
            return
        listed_bytes = 0
        for value in self._values(self._free):  # a count, then numbers of unused pages
            listed_bytes += len(value)
            if listed_bytes > self.size:
                raise self._damaged(_("it lists more unused pages than it can hold"))
            numbers = np.frombuffer(value[: len(value) // 8 * 8], "<u8")[1:]
            missing -= int((numbers >= pages_in_file).sum())
        if missing > 0:
            raise self._cut_off()

    def value(self, key: bytes) -> bytes | None:
        number = self.main.root
        for _unused in range(self.main.depth - 1):
            branch = self._page(number, _BRANCH)
            # The first key of a branch is empty; its child holds all keys below the second.
            at = bisect_right(branch.nodes, key, 1, key=branch.key) - 1
            number = branch.child(branch.nodes[at])
        if not self.main.depth:
            return None
        leaf = self._page(number, _LEAF)
        at = bisect_left(leaf.nodes, key, key=leaf.key)
        if at == len(leaf.nodes) or leaf.key(leaf.nodes[at]) != key:
            return None
        return self.node_value(number, leaf.content, leaf.nodes[at])

    def _values(self, tree: _Tree) -> Iterator[bytes]:
        """Yield the values of a tree."""
        for number, page in self.leaves(tree):
            yield from (self.node_value(number, page.content, node) for node in page.nodes)

    def leaves(self, tree: _Tree) -> Iterator[tuple[int, _Page]]:
        """Yield the leaf pages of a tree and their numbers, in the order of the keys."""
        waiting = [(tree.root, tree.depth)] if tree.depth else []
        known = {tree.root}
        while waiting:
            number, depth = waiting.pop()
            page = self._page(number, _BRANCH if depth > 1 else _LEAF)
            if depth == 1:
                yield number, page
                continue
            children = [page.child(node) for node in page.nodes]
            if known.intersection(children) or len(set(children)) < len(children):
                raise self._damaged(
                    _("page {number} refers to a page that is already in the tree", number=number)
                )
            known.update(children)
            waiting += [(child, depth - 1) for child in reversed(children)]

    def node_value(self, number: int, content: bytes, node: int) -> bytes:
        low, high, flags, key_length = _NODE.unpack_from(content, node)
        start, size = node + _NODE.size + key_length, low | high << 16
        stored = 8 if flags == _ON_OVERFLOW_PAGES else size
        if flags not in (0, _ON_OVERFLOW_PAGES) or start + stored > len(content):
            raise self._damaged(_("page {number} has a value outside of it", number=number))
        if flags:
            return self._overflow(int.from_bytes(content[start : start + 8], "little"), size)
        return content[start : start + size]

    def _overflow(self, number: int, size: int) -> bytes:
        self._check_number(number)
        start = number * self._page_size
        page_number, _unused, kind, count = _OVERFLOW_HEADER.unpack(self._read(start, _HEADER.size))
        if (page_number, kind & _PAGE_KINDS) != (
            number,
            _OVERFLOW,
        ) or count > self._page_count - number:
            raise self._damaged(_("page {number} is not the start of a large value", number=number))
        if size > count * self._page_size - _HEADER.size:
            raise self._damaged(
                _("the value at page {number} has {size:,} bytes", number=number, size=size)
            )
        if size > MAX_BASE64:
            raise DataError(
                _(
                    "{path}: the value at page {number} has {size:,} bytes, above the limit of "
                    "{limit:,}; make the image smaller",
                    path=self._path,
                    number=number,
                    size=size,
                    limit=MAX_BASE64,
                )
            )
        return self._read(start + _HEADER.size, size)

    def _page(self, number: int, kind: int) -> _Page:
        self._check_number(number)
        content = self._read(number * self._page_size, self._page_size)
        page_number, _unused, flags, end, begin = _HEADER.unpack_from(content)
        within = _HEADER.size < end <= begin <= self._page_size
        if (page_number, flags & _PAGE_KINDS) != (number, kind) or not within:
            raise self._damaged(
                _("page {number} is not the page that the tree refers to", number=number)
            )
        nodes = struct.unpack_from(f"<{(end - _HEADER.size) // 2}H", content, _HEADER.size)
        if min(nodes) < begin or max(nodes) > self._page_size - _NODE.size:
            raise self._damaged(_("page {number} has nodes outside of it", number=number))
        return _Page(content, nodes)

    def _meta(self, number: int, page: bytes) -> _Meta:
        _unused, _unused, kind, _unused, _unused = _HEADER.unpack_from(page)
        magic, version, _unused, _unused = _META.unpack_from(page, _HEADER.size)
        if magic != _MAGIC or not kind & _META_PAGE:
            raise self._damaged(_("page {number} is not a meta page", number=number))
        if version != _VERSION:
            raise DataError(
                _(
                    "{path} has LMDB data version {version}, not {supported_version}; copy it "
                    "with a program that reads its version",
                    path=self._path,
                    version=version,
                    supported_version=_VERSION,
                )
            )
        start = _HEADER.size + _META.size
        last, transaction = _TRANSACTION.unpack_from(page, start + 2 * _TREE.size)
        free, main = (self._tree(page, at) for at in (start, start + _TREE.size))
        return _Meta(last + 1, transaction, free, main)

    def _tree(self, page: bytes, at: int) -> _Tree:
        _unused, flags, depth, _unused, _unused, _unused, entries, root = _TREE.unpack_from(
            page, at
        )
        if depth > _MAX_DEPTH:
            raise self._damaged(_("its tree has {depth} levels", depth=depth))
        return _Tree(flags, depth, entries, root)

    def _check_kind(self, start: bytes) -> None:
        """Raise a ``DataError`` unless the file starts like a 64-bit little-endian LMDB."""
        if reason := wrong_format(start):
            raise DataError(_("{path} is {reason}", path=self._path, reason=reason))
        magic = _MAGIC.to_bytes(4, "little")
        if start[12:16] == magic or start[12:20].find(magic[::-1]) >= 0:
            raise DataError(
                _(
                    "{path} is the LMDB of a 32-bit or big-endian machine; pack its pairs there "
                    "as tar or tsv",
                    path=self._path,
                )
            )
        if len(start) < _META_SIZE or start[16:20] != magic:
            raise DataError(
                _(
                    "{path} is not an LMDB ({size:,} bytes, its start is {start}); copy or write "
                    "it again",
                    path=self._path,
                    size=self.size,
                    start=start[:24].hex() or _("empty"),
                )
            )

    def _check_number(self, number: int) -> None:
        if not 2 <= number < self._page_count:
            raise self._damaged(
                _(
                    "it refers to page {number} of {page_count}",
                    number=number,
                    page_count=self._page_count,
                )
            )

    def _read(self, start: int, size: int) -> bytes:
        if start + size > self.size:
            raise self._cut_off()
        self._stream.seek(start)
        content = self._stream.read(size)
        if len(content) < size:
            raise self._cut_off()
        return content

    def _cut_off(self) -> DataError:
        return DataError(
            _(
                "{path} is truncated (the meta page says {page_count} pages, the file has "
                "{file_pages}); copy it again",
                path=self._path,
                page_count=self._page_count,
                file_pages=self.size // self._page_size,
            )
        )

    def _damaged(self, how: str) -> DataError:
        return DataError(
            _("{path} is damaged: {how}; copy or write it again", path=self._path, how=how)
        )


@contextmanager
def _opened(path: Path) -> Iterator[_Pages]:
    try:
        with path.open("rb", buffering=0) as stream:
            yield _Pages(stream, path)
    except OSError as error:
        raise DataError(
            _("{path} cannot be read: {reason}", path=path, reason=error.strerror)
        ) from None
