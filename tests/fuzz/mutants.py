"""Seeded damage to the bytes of files: some random, some aware of the format."""

from __future__ import annotations

import copy
import io
import json
import pickle
import pickletools
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

Mutator = Callable[[Random, bytes], bytes]

_SIZES = (0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -(2**63))
_NUMBERS = (
    "0", "-1", "1e999", "-1e999", "nan", "Infinity", "9" * 30, "9" * 5000, "0x10", "1_0", "007",
    "1.5", str(2**31), str(2**63), str(2**64), "1e-400", "True", "null", "",
)  # fmt: skip
_PIECES = (
    "\0", "\\ud83d", "\\u0000", "\ufeff", "\u2028", "\r", "\r\n", "\n\n", "\x1b[2J", "'", '"',
    '"""',
    "[", "]", "{", "}", ",", ";", "\t", "=", "%", "{}", "../", "/", "~", "~nobody/x", "*", "**/",
    "?",
    "//", "\\", "/dev/null", "http://127.0.0.1:9/x.jpg", "data:image/png;base64,AAAA", "A" * 5000,
    "😀", "\u202e", "e\u0301" * 200,
)  # fmt: skip
_RAW = (
    b"\xff\xfe",
    b"\xff",
    b"\xc3\x28",
    b"\xed\xa0\xbd",
    b"\xd6\xd0\xce\xc4",
    b"\0" * 100,
    b"\x80",
)
_SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), 0.5,
    "", "x", "\ud83d", "\0", "../x", "/", "A" * 20000, [], {}, [[]], [None], ["a", "a"],
    {"a": {"b": {}}}, "-1", "1", "1e999",
)  # fmt: skip


def mutated(rng: Random, data: bytes, suffix: str, others: list[bytes]) -> bytes:
    """Damage the bytes of a file once to three times, by its suffix as a rule, or blindly."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        own = _OF_SUFFIX.get(suffix, ())
        if own and rng.random() < 0.65:
            data = rng.choice(own)(rng, data)
        elif others and rng.random() < 0.05:
            data = _spliced(rng, data, rng.choice(others))
        else:
            data = rng.choice(_BLIND)(rng, data)
    return data


# Bytes


def _place(rng: Random, data: bytes) -> int:
    """A position; headers and tables at either end are hit more often than content."""
    end = max(1, len(data))
    return rng.choice(
        (
            rng.randrange(end),
            rng.randrange(min(end, 64)),
            rng.randrange(min(end, 1024)),
            end - 1 - rng.randrange(min(end, 1024)),
        )
    )


def _span(rng: Random, data: bytes, most: int = 4096) -> tuple[int, int]:
    at = _place(rng, data)
    return at, min(len(data), at + rng.choice((1, 2, 4, 8, 16, 64, 512, most)))


def _flip(rng: Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if found else 0):
        found[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(found)


def _overwrite(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    filler = rng.choice((b"\0", b"\xff", b" ", b"A", rng.randbytes(1)))
    return data[:start] + filler * (end - start) + data[end:]


def _randomize(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data, 64)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def _truncate(rng: Random, data: bytes) -> bytes:
    return data[: rng.choice((0, 1, 4, len(data) // 2, _place(rng, data), max(0, len(data) - 1)))]


def _behead(rng: Random, data: bytes) -> bytes:
    return data[_place(rng, data) :]


def _duplicate(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]


def _delete(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _insert(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    more = rng.choice((rng.randbytes(rng.choice((1, 4, 100))), rng.choice(_RAW), b"\n", b"\0"))
    return data[:at] + more + data[at:]


def _number(rng: Random, data: bytes) -> bytes:
    """Write an integer of an extreme value where a length may stand."""
    at, width, order = _place(rng, data), rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    value = rng.choice(_SIZES) % 256**width
    return data[:at] + value.to_bytes(width, order) + data[at + width :]  # type: ignore[arg-type]


def _swap(rng: Random, data: bytes) -> bytes:
    a, b = sorted((_place(rng, data), _place(rng, data)))
    size = min(16, b - a)
    return (
        data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
    )


def _spliced(rng: Random, data: bytes, other: bytes) -> bytes:
    return data[: _place(rng, data)] + other[_place(rng, other) :]


# Text


def _replace_number(rng: Random, data: bytes) -> bytes:
    return _replaced(rng, data, rb"-?\d+(?:\.\d+)?", rng.choice(_NUMBERS).encode())


def _replace_quoted(rng: Random, data: bytes) -> bytes:
    return _replaced(rng, data, rb'"[^"\n]*"', rng.choice((*_NUMBERS, *_PIECES)).encode())


def _insert_piece(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.choice(_PIECES).encode() + data[at:]


def _insert_raw(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.choice(_RAW) + data[at:]


def _remove_sign(rng: Random, data: bytes) -> bytes:
    return _replaced(rng, data, rb"[\"'\[\]{},:=\n\t]", b"")


def _nest(rng: Random, data: bytes) -> bytes:
    depth = rng.choice((50, 2000, 100_000))
    deep = rng.choice((("[", "]"), ('{"a":', "}"), ("(", ")")))
    at = _place(rng, data)
    closed = deep[1] * depth if rng.random() < 0.5 else ""
    value = f"{deep[0] * depth}1{closed}".encode()
    if rng.random() < 0.6:
        return _replaced(rng, data, rb'-?\d+(?:\.\d+)?|"[^"\n]*"', value)
    return data[:at] + value + data[at:]


def _repeat_line(rng: Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True) or [b"\n"]
    at = rng.randrange(len(lines))
    return b"".join([*lines[:at], lines[at] * rng.choice((2, 3, 500)), *lines[at:]])


def _drop_line(rng: Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def _shuffle_words(rng: Random, data: bytes) -> bytes:
    words = re.split(rb"(\s+|,)", data)
    a, b = rng.randrange(len(words)), rng.randrange(len(words))
    words[a], words[b] = words[b], words[a]
    return b"".join(words)


def _recode(rng: Random, data: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    name = rng.choice(("utf-16", "utf-16-le", "utf-32", "gb18030", "utf-8-sig", "utf-7", "cp037"))
    return text.encode(name, "replace")


def _line_ends(rng: Random, data: bytes) -> bytes:
    return data.replace(b"\n", rng.choice((b"\r", b"\r\n", b"\n\r", b"\0", b"", b"\x0b", b"\x85")))


def _replaced(rng: Random, data: bytes, pattern: bytes, value: bytes) -> bytes:
    found = list(re.finditer(pattern, data[:200_000]))
    if not found:
        return data
    at = rng.choice(found)
    return data[: at.start()] + value + data[at.end() :]


# JSON


def _json(rng: Random, data: bytes) -> bytes:
    """Put another value, of another type as a rule, anywhere into a JSON document."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _replace_number(rng, data)
    return _dumped(rng, changed(rng, value))


def _json_line(rng: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = _json(rng, lines[at])
    return b"\n".join(lines)


def _dumped(rng: Random, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    return text.encode("utf-8", "surrogatepass")


def changed(rng: Random, value: Any) -> Any:
    """Return plain values with one node replaced, removed, renamed, repeated or nested."""
    value = copy.deepcopy(value)
    nodes: list[tuple[Any, Any]] = []
    rest = [value]
    while rest:
        node = rest.pop()
        if not isinstance(node, dict | list):
            continue
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            nodes.append((node, key))
            if isinstance(node[key], dict | list):
                rest.append(node[key])
    if not nodes or rng.random() < 0.03:
        return rng.choice(_SCALARS)
    parent, key = rng.choice(nodes)
    how = rng.randrange(8)
    if how == 0 and isinstance(parent, dict):
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[str(rng.choice(_SCALARS))[:60]] = parent.pop(key)
    elif how == 2 and isinstance(parent, list):
        parent.extend([parent[key]] * rng.choice((1, 1000)))
    elif how == 3:
        parent[key] = [parent[key]]
    elif how == 4 and isinstance(parent[key], int | float):
        parent[key] = rng.choice((-parent[key], parent[key] * 1000, parent[key] + 0.5, 10**9, 0))
    else:
        parent[key] = rng.choice(_SCALARS)
    return value


# Containers


def _zip(rng: Random, data: bytes) -> bytes:
    """Rewrite an archive with a member changed, renamed, dropped, repeated or compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(each.filename, archive.read(each)) for each in archive.infolist()]
    except Exception:
        return _flip(rng, data)
    if not members:
        return data
    small = [n for n, (name, _) in enumerate(members) if "/data/" not in name] or [0]
    at = rng.choice(small) if rng.random() < 0.8 else rng.randrange(len(members))
    name, content = members[at]
    how, compression = rng.randrange(12), zipfile.ZIP_STORED
    if how == 0:
        del members[at]
    elif how == 1:
        odd = ("../x", "/x", "", "a\\b", "é\udcff", "x" * 65000, "archive/\0", name + "/", name[1:])
        members[at] = (rng.choice(odd), content)
    elif how == 2:
        members.insert(0, members[at])
    elif how == 3:
        compression = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif how == 4:
        members[at] = (name, b"\0" * (64 << 20))  # 64 MB of a few hundred bytes
        compression = zipfile.ZIP_DEFLATED
    else:
        members[at] = (name, mutated(rng, content, _inner_suffix(name), []))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members:
            try:
                info = zipfile.ZipInfo(name or "x")
                info.compress_type = compression
                archive.writestr(info, content)
            except (ValueError, UnicodeError, struct.error):
                archive.writestr("odd", content)
    found = stream.getvalue()
    return _zip_flags(rng, found) if rng.random() < 0.1 else found


def _inner_suffix(name: str) -> str:
    if name.endswith(("data.pkl", "constants.pkl")):
        return ".pkl"
    return "." + name.rpartition(".")[2] if "." in name else ".bin"


def _zip_flags(rng: Random, data: bytes) -> bytes:
    """Mark a member encrypted, of an unknown compression or version, or of another size."""
    found = [m.start() for m in re.finditer(rb"PK\x01\x02|PK\x03\x04", data)]
    if not found:
        return data
    at = rng.choice(found)
    central = data[at + 2] == 1
    offset, value = rng.choice(
        ((6, 1), (6, 0x800), (8, 99), (8, 12), (4, 0xFFFF), (18, 2**31), (22, 2**31), (26, 60000),
         (28, 60000), (42, 2**31), (10, 99))
    )  # fmt: skip
    at += offset + (2 if central and offset < 28 else 0)
    width = 4 if value >= 2**16 else 2
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


_TAR_FIELDS = {
    "name": (0, 100), "mode": (100, 8), "uid": (108, 8), "gid": (116, 8), "size": (124, 12),
    "mtime": (136, 12), "type": (156, 1), "linkname": (157, 100), "magic": (257, 6),
    "devmajor": (329, 8), "prefix": (345, 155),
}  # fmt: skip


def _tar(rng: Random, data: bytes) -> bytes:
    """Change a field of a header, and make its checksum right again."""
    blocks = [n for n in range(0, len(data) - 511, 512) if data[n + 257 : n + 262] == b"ustar"]
    if not blocks:
        return data
    at = rng.choice(blocks)
    header = bytearray(data[at : at + 512])
    name = rng.choice(("size", "size", "name", "type", "prefix", *_TAR_FIELDS))
    start, width = _TAR_FIELDS[name]
    values = [
        b"\x80" + rng.randbytes(width - 1) if width > 1 else b"g", b"\xff" * width, b"\0" * width,
        b"7" * width, b"-1".ljust(width, b"\0"), b" " * width, rng.randbytes(width),
        b"../../x".ljust(width, b"\0"), b"\xd6\xd0.jpg".ljust(width, b"\0"),
        b"00000000010\0"[:width], b"LKxgSXVMD1234567"[rng.randrange(16) :][:width] or b"L",
    ]  # fmt: skip
    header[start : start + width] = rng.choice(values)[:width].ljust(width, b"\0")
    header[148:156] = b"        "
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return data[:at] + bytes(header) + data[at + 512 :]


def _tar_members(rng: Random, data: bytes) -> bytes:
    """Write the members again: one changed, renamed, or with an odd extended header."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = [(m, archive.extractfile(m).read()) for m in archive if m.isfile()]  # type: ignore[union-attr]
    except Exception:
        return _flip(rng, data)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        chosen = rng.randrange(len(members)) if members else 0
        for number, (info, content) in enumerate(members):
            if number == chosen:
                suffix = "." + info.name.rpartition(".")[2]
                how = rng.randrange(6)
                if how == 0:
                    odd = ("x.y.z.jpg", "a/b/c", ".", "\udcff.jpg", "n" * 300, "x.json", "\n.txt")
                    info.name = rng.choice(odd)
                elif how == 1:
                    pax = ("path", "size", "GNU.sparse.map", "mtime", "hdrcharset", "linkpath")
                    key = rng.choice(pax)
                    value = rng.choice(("-1", "x", "9" * 40, "1,2,3", "../x", "BINARY", ""))
                    info.pax_headers = {key: value}
                elif how == 2:
                    info.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE))
                    info.linkname = rng.choice((info.name, members[0][0].name, "/etc/passwd"))
                else:
                    content = mutated(rng, content, suffix, [])
            info.size = len(content) if info.isfile() else 0
            try:
                archive.addfile(info, io.BytesIO(content))
            except (ValueError, UnicodeError):
                continue
    return stream.getvalue()


def _safetensors(rng: Random, data: bytes) -> bytes:
    """Change the JSON header, and its length with it."""
    if len(data) < 8:
        return data
    (size,) = struct.unpack("<Q", data[:8])
    if size > len(data):
        return data
    header = data[8 : 8 + size]
    try:
        values = json.loads(header)
    except ValueError:
        return data
    how = rng.randrange(5)
    if how == 0:
        header = mutated(rng, header, ".json", [])
    elif how == 1 and isinstance(values, dict) and values:
        odd = ("F8_E4M3", "BOOL", "U8", "I64", "F64", "X", "BF16", "C64", "F4", 3, None)
        name = rng.choice(list(values))
        if isinstance(values[name], dict):
            values[name]["dtype"] = rng.choice(odd)
        header = _dumped(rng, values)
    else:
        for _ in range(rng.choice((1, 1, 5))):
            values = changed(rng, values)
        header = _dumped(rng, values)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _npy(rng: Random, data: bytes) -> bytes:
    """Change the header of an array: its type, shape and order."""
    if data[:6] != b"\x93NUMPY" or len(data) < 10:
        return data
    (size,) = struct.unpack("<H", data[8:10])
    header = data[10 : 10 + size].decode("latin1")
    changes = (
        (r"'descr': [^,]+", "'descr': '|O'"), (r"'descr': [^,]+", "'descr': '<U1000000000'"),
        (r"'descr': [^,]+", "'descr': [('a', '<f4')]"), (r"'descr': [^,]+", "'descr': '<c8'"),
        (r"'descr': [^,]+", "'descr': 'M8[ns]'"), (r"'descr': [^,]+", "'descr': '<f2'"),
        (r"\(\d.*?\)", "(-1, 4)"), (r"\(\d.*?\)", "(1000000000000,)"), (r"\(\d.*?\)", "()"),
        (r"\(\d.*?\)", "(2**62, 2**62)"), (r"\(\d.*?\)", "(0, 32)"), (r"\(\d.*?\)", "(1,) * 99"),
        (r"False", "True"), (r"\{", "{" * 3000), (r"\{", "("), (r"'shape'", "'form'"),
        (r"\(\d.*?\)", "(" + "1," * 70 + ")"), (r"\(\d.*?\)", "(True, 5)"),
    )  # fmt: skip
    pattern, value = rng.choice(changes)
    header = re.sub(pattern, lambda _: value, header, count=1)
    raw = header.encode("latin1", "replace")[:65535]
    return data[:8] + struct.pack("<H", len(raw)) + raw + data[10 + size :]


def _png(rng: Random, data: bytes) -> bytes:
    """Change, repeat, drop or add a chunk, and make its checksum right again."""
    if data[:4] != b"\x89PNG":
        return data
    chunks, at = [], 8
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return data
    n = rng.randrange(len(chunks))
    kind, content = chunks[n]
    how = rng.randrange(6)
    if how == 0:
        del chunks[n]
    elif how == 1:
        chunks += chunks[n : n + 1] * rng.choice((1, 50))
    elif how == 2:
        odd = ((b"tRNS", rng.randbytes(rng.choice((1, 6, 256)))), (b"PLTE", rng.randbytes(5)),
               (b"iCCP", b"x\0\0" + rng.randbytes(20)), (b"zTXt",
               b"k\0\0" + zlib.compress(b"a" * 10**7)),
               (b"eXIf", b"II*\0" + rng.randbytes(60)), (b"acTL", rng.randbytes(8)),
               (b"fcTL", rng.randbytes(26)), (b"pHYs", b""), (b"gAMA", b""), (b"iTXt",
               rng.randbytes(9)),
               (b"sRGB", b""), (b"cHRM", b"1"), (b"CgBI", b""), (b"IHDR",
               rng.randbytes(13)))  # fmt: skip
        chunks.insert(rng.choice((1, n)), rng.choice(odd))
    elif kind == b"IHDR" and how < 5:
        width, height = rng.choice(((2**31 - 1, 1), (0, 0), (60000, 60000), (11000, 11000), (9, 9)))
        depth, colour = rng.choice((1, 2, 4, 8, 16, 3, 255)), rng.choice((0, 2, 3, 4, 6, 1, 7))
        chunks[n] = (
            kind,
            struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, rng.choice((0, 1, 9))),
        )
    else:
        chunks[n] = (kind, _flip(rng, content))
    found = data[:8]
    for kind, content in chunks:
        found += struct.pack(">I", len(content)) + kind + content
        found += struct.pack(">I", zlib.crc32(kind + content))
    return found


def _parquet(rng: Random, data: bytes) -> bytes:
    """Write the table again, with a column of another type, or odd names or values."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(io.BytesIO(data))
    except Exception:
        return _flip(rng, data)
    if not table.num_columns:
        return data
    at = rng.randrange(table.num_columns)
    rows, name = table.num_rows, table.column_names[at]
    values: list[Any] = [
        [None] * rows, list(range(rows)), [b"\xff\x00"] * rows, [0.5] * rows, [["a"]] * rows,
        [{"bytes": b"x", "path": None}] * rows, ["\0"] * rows, ["x" * 100_000] * rows,
        [True] * rows, [[]] * rows, [{"a": {"b": [1]}}] * rows, [""] * rows, ["../x"] * rows,
    ]  # fmt: skip
    how = rng.randrange(5)
    if how == 0:
        table = table.rename_columns(
            [rng.choice(("", "\n", "image", "text", each)) for each in table.column_names]
        )
    elif how == 1:
        table = table.slice(0, rng.choice((0, 1)))
    elif how == 2 and pyarrow.types.is_string(table.schema[at].type):
        column = table[name].combine_chunks()
        broken = pyarrow.StringArray.from_buffers(
            len(column), *[column.buffers()[1], pyarrow.py_buffer(b"\xff" * 4096)]
        )
        table = table.set_column(at, name, broken)
    else:
        table = table.set_column(at, name, pyarrow.array(rng.choice(values)))
    stream = io.BytesIO()
    try:
        parquet.write_table(
            table, stream, compression=rng.choice(("none", "snappy", "gzip", "zstd"))
        )
    except Exception:
        return data
    return stream.getvalue()


# Pickles: what would run, if it were run, leaves a file; ``canary`` is the path of that file.
canary = "/tmp/canary"
_GLOBALS = (
    "posix system", "os system", "builtins eval", "builtins exec", "subprocess Popen",
    "builtins getattr", "builtins __import__", "torch load", "torch.hub load", "numpy load",
    "torch.storage _load_from_bytes", "collections OrderedDict", "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage", "torch._utils _rebuild_parameter", "_codecs encode",
    "copyreg _reconstructor",
    "torch.serialization load", "torch Tensor", "builtins print", "x y", "os.path join",
)  # fmt: skip


class _Touch:
    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {canary}",)


def evil(rng: Random) -> bytes:
    """A pickle that would create the canary, were it loaded without care."""
    protocol = rng.choice((0, 2, 4))
    whole = rng.choice((_Touch(), {"state_dict": _Touch()}, ("1", "2", _Touch()), [_Touch()]))
    code = f"__import__('os').system('touch {canary}')".encode()
    by_eval = b"cbuiltins\neval\n(V" + code + b"\ntR."
    by_torch = b"ctorch.serialization\nload\n(V/dev/null\ntR."
    by_build = b"cos\nsystem\n(Vtouch " + canary.encode() + b"\ntR."
    return rng.choice((pickle.dumps(whole, protocol), by_eval, by_build, by_torch))


def _deep(rng: Random) -> bytes:
    """A small pickle that is deep, refers to itself, or is exponentially large when walked."""
    depth = rng.choice((40, 5000, 200_000))
    shared = (
        b"(" + b"t" + b"".join(b"q%c0h%ch%c\x86" % (n % 250, n % 250, n % 250) for n in range(60))
    )
    odd = [
        b"\x80\x02" + b"(" * depth + b"t" * depth + b".",
        b"\x80\x02" + b"]" + b"]" * depth + b"a" * depth + b".",
        b"\x80\x02)" + b"\x85" * depth + b".",
        b"\x80\x02}q\x00h\x00h\x00s.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02)" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(1, 60)) + b".",
        b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(1, 60)) + b"K\x01s.",
        b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\x00\x00x.",
        b"\x80\x02r\xff\xff\xff\x7f.", b"\x80\x02K\x01r\xff\xff\xff\x7f.", b"\x80\xff.", b".",
        shared + b".",
    ]  # fmt: skip
    return rng.choice(odd)


def _pickle(rng: Random, data: bytes) -> bytes:
    """Swap, drop, repeat or change an opcode, put in another global, or another pickle whole."""
    how = rng.randrange(10)
    if how == 0:
        return evil(rng)
    if how == 1:
        return _deep(rng)
    try:
        starts = [position or 0 for _, _, position in pickletools.genops(data)]
    except Exception:
        return _flip(rng, data)
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    at = rng.randrange(len(parts))
    if how in (2, 3):
        named = [n for n, part in enumerate(parts) if part[:1] in (b"c", b"\x93")]
        module, name = rng.choice(_GLOBALS).split()
        put = f"c{module}\n{name}\n".encode()
        if named and rng.random() < 0.7:
            parts[rng.choice(named)] = put
        else:
            parts.insert(at, put + rng.choice((b"", f"(Vtouch {canary}\ntR".encode())))
    elif how == 4:
        del parts[at]
    elif how == 5:
        parts.insert(at, parts[at] * rng.choice((1, 1000)))
    elif how == 6:
        other = rng.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    elif how == 7:
        value = rng.choice((b"N", b"K\xff", b"J\xff\xff\xff\xff", b"]", b"}", b")",
        b"G" + b"\xff" * 8,
                            b"X\x02\x00\x00\x00zz", b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
                            b"Va\n"))  # fmt: skip
        numbers = [n for n, part in enumerate(parts) if part[:1] in b"KMJX\x8a"]
        parts[rng.choice(numbers or [at])] = value
    elif how == 8:
        parts.insert(
            at, rng.choice((b"Q", b"R", b"b", b"0", b"2", b"(", b"t", b"u", b"\x81", b"i"))
        )
    else:
        parts[at] = _flip(rng, parts[at])
    return b"".join(parts)


_BLIND: tuple[Mutator, ...] = (
    _flip, _flip, _overwrite, _randomize, _truncate, _behead, _duplicate, _delete, _insert,
    _number, _number, _swap,
)  # fmt: skip
_TEXT: tuple[Mutator, ...] = (
    _replace_number, _replace_quoted, _insert_piece, _insert_piece, _insert_raw, _remove_sign,
    _nest, _repeat_line, _drop_line, _shuffle_words, _recode, _line_ends,
)  # fmt: skip
_OF_SUFFIX: dict[str, tuple[Mutator, ...]] = {
    ".csv": _TEXT,
    ".tsv": _TEXT,
    ".txt": _TEXT,
    ".toml": _TEXT,
    ".json": (*_TEXT, *[_json] * 14),
    ".jsonl": (*_TEXT, *[_json_line] * 14),
    ".pt": (_zip, _pickle),
    ".pkl": (_pickle,),
    ".npz": (_zip,),
    ".npy": (_npy,),
    ".tar": (_tar, _tar, _tar_members),
    ".safetensors": (_safetensors,),
    ".png": (_png,),
    ".parquet": (_parquet,),
}
