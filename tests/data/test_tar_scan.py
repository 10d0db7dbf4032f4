"""Headers of tar shards, read by ourselves: the same members as tarfile's, for every kind."""

import io
import random
import tarfile

import pytest
from data.formats import jpeg

from cn_clip.data.sources import tar_scan
from cn_clip.data.sources.shard_file import LocalFile
from cn_clip.data.sources.tar import Tar
from cn_clip.errors import DataError

LONG = "folder/" * 30 + "cat.jpg"


def archive(*members, format=tarfile.USTAR_FORMAT, **options):
    """Return a tar of (name or header, content)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format, **options) as tar:
        for info, content in members:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def header(name, **values):
    info = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(info, key, value)
    return info


def edited(raw, at, new, *, checksum=True):
    """Return an archive whose first header is changed, with a right checksum."""
    raw = bytearray(raw)
    raw[at : at + len(new)] = new
    if checksum:
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def old(raw):
    """Return an archive of the format before ustar."""
    return edited(raw, 257, bytes(8))


TWO = (("a.jpg", jpeg(1)), ("a.txt", b"text"))
PLAIN = archive(*TWO)
PAX = tarfile.PAX_FORMAT
LINK = {"linkname": "a.jpg"}
ARCHIVES = {
    "ustar": PLAIN,
    "gnu": archive(*TWO, format=tarfile.GNU_FORMAT),
    "pax": archive(*TWO, format=PAX),
    "oldest": old(PLAIN),
    "empty members": archive(("a.jpg", b""), ("a.txt", b"")),
    "no member": archive(),
    "prefix": archive(("p" * 90 + "/" + "n" * 90 + ".jpg", b"1"), *TWO),
    "folder": archive((header("d", type=tarfile.DIRTYPE), b""), *TWO),
    "oldest folder": archive((header("d/", type=tarfile.AREGTYPE), b""), *TWO),
    "a folder last": archive(*TWO, ("b.txt", b"")),
    "old type": archive((header("b.jpg", type=tarfile.AREGTYPE), b"1"), *TWO),
    "contiguous": archive((header("b.jpg", type=tarfile.CONTTYPE), b"12"), *TWO),
    "unknown type": archive((header("b.jpg", type=b"Z"), b"12"), *TWO),
    "symbolic link": archive((header("b.jpg", type=tarfile.SYMTYPE, **LINK), b""), *TWO),
    "hard link": archive(*TWO, (header("b.jpg", type=tarfile.LNKTYPE, **LINK), b"")),
    "fifo": archive((header("b.jpg", type=tarfile.FIFOTYPE), b""), *TWO),
    "device": archive((header("b.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=3), b""), *TWO),
    "long name, gnu": archive((LONG, b"1"), *TWO, format=tarfile.GNU_FORMAT),
    "long name, pax": archive((LONG, b"1"), *TWO, format=PAX),
    "long link": archive(
        (header("b", type=tarfile.SYMTYPE, linkname=LONG), b""), *TWO, format=tarfile.GNU_FORMAT
    ),
    "time of pax": archive((header("b.jpg", mtime=1.5), b"1"), *TWO, format=PAX),
    "owner of pax": archive((header("b.jpg", uname="猫", gname="狗"), b"1"), *TWO, format=PAX),
    "name of pax": archive(("猫.jpg", b"1"), ("猫.txt", b"2"), format=PAX),
    "path of pax": archive((header("b.jpg", pax_headers={"path": "c.jpg"}), b"1"), format=PAX),
    "size of pax": archive((header("b.jpg", pax_headers={"size": "1"}), b"1"), *TWO, format=PAX),
    "comment of pax": archive(
        (header("b.jpg", pax_headers={"comment": "mtime=1\n9 path=x"}), b"1"), *TWO, format=PAX
    ),
    "global pax": archive(*TWO, format=PAX, pax_headers={"mtime": "1"}),
    "global path": archive(*TWO, format=PAX, pax_headers={"path": "x.jpg"}),
    "sparse of pax": archive(
        (header("b.jpg", pax_headers={"GNU.sparse.size": "9", "GNU.sparse.map": "0,1"}), b"1"),
        format=PAX,
    ),
    "utf-8 names": archive(("猫.jpg", b"1"), ("猫.txt", b"2"), encoding="utf-8"),
    "gbk names": archive(("猫.jpg", b"1"), ("猫.txt", b"2"), encoding="gbk"),
    "base-256 owner": edited(PLAIN, 108, b"\x80" + bytes(6) + b"\x07"),
    "base-256 size": edited(PLAIN, 124, b"\x80" + bytes(9) + len(jpeg(1)).to_bytes(2)),
    "size below zero": edited(PLAIN, 124, b"\xff" * 10 + b"\xfc\x00"),
    "blanks before numbers": edited(PLAIN, 124, b"%11o " % len(jpeg(1))),
    "an empty size": edited(PLAIN, 124, bytes(12)),
    "an underscore in the size": edited(PLAIN, 124, b"0_%09o\0" % len(jpeg(1))),
    "a sign": edited(PLAIN, 124, b"+%010o\0" % len(jpeg(1))),
    "no octal size": edited(PLAIN, 124, b"0000000999\0"),
    "no octal time": edited(PLAIN, 136, b"9" * 11),
    "blank in a number": edited(PLAIN, 136, b"0000 0000\0\0"),
    "text after a number": edited(PLAIN, 136, b"00001\0xx"),
    "wrong checksum": edited(PLAIN, 148, b"000000", checksum=False),
    "short checksum": edited(PLAIN, 148, b"%o\0\0" % sum(PLAIN[:148] + b" " * 8 + PLAIN[156:512])),
    "prefix of gnu": edited(archive(*TWO, format=tarfile.GNU_FORMAT), 345, b"1234567"),
    "text after the name": edited(PLAIN, 6, b"more"),
    "large size": edited(PLAIN, 124, b"77777777777\0"),
    "two archives": archive(*TWO) + archive(("b.jpg", b"1"), ("b.txt", b"2")),
    "extended header, then the end": archive((header("b", mtime=1.5), b""), format=PAX)[:1024]
    + bytes(1024),
    "no end": PLAIN[: 1024 * 2 + 512 + 512],
    "one block of an end": PLAIN[:3072],
    "truncated": PLAIN[:700],
    "truncated header": PLAIN[:300],
    "empty": b"",
    "zeros": bytes(2048),
    "half a block": PLAIN + b"1" * 100,
}


def members(path):
    file = LocalFile(path)
    return tar_scan.members(file, file.state())


def read(path):
    try:
        return [(m.name, m.at, m.size, m.reason) for m in members(path)]
    except DataError as error:
        return str(error)


def by_tarfile(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tar_scan, "_plain_members", lambda stream, size: None)
        return read(path)


@pytest.mark.parametrize("kind", ARCHIVES)
def test_members_are_those_of_tarfile(kind, tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(ARCHIVES[kind])
    assert read(path) == by_tarfile(path, monkeypatch)


def test_usual_headers_do_not_need_tarfile(tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(tarfile, "TarFile", fail)
    for kind in ("ustar", "gnu", "pax", "oldest", "prefix", "folder", "time of pax", "utf-8 names"):
        (tmp_path / "a.tar").write_bytes(ARCHIVES[kind])
        assert list(members(tmp_path / "a.tar")), kind


def test_damaged_headers_give_what_tarfile_gives(tmp_path, monkeypatch):
    rng = random.Random(0)
    path = tmp_path / "a.tar"
    kinds = [raw for raw in ARCHIVES.values() if len(raw) > 2000]
    for _ in range(200):
        raw = bytearray(rng.choice(kinds))
        for _ in range(rng.choice((1, 1, 2, 8))):
            raw[rng.randrange(0, min(len(raw), 4096))] = rng.choice(b"\0 0178x/5ag\xff\x80")
        if rng.random() < 0.7:
            raw = bytearray(edited(bytes(raw), 0, b""))
        path.write_bytes(raw[: rng.choice((len(raw), len(raw), rng.randrange(len(raw))))])
        assert read(path) == by_tarfile(path, monkeypatch)


@pytest.mark.parametrize("kind", ["prefix", "long name, gnu", "name of pax", "gbk names", "pax"])
def test_keys_are_the_names_whatever_the_header(kind, tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    with tarfile.open(fileobj=io.BytesIO(ARCHIVES[kind])) as tar:
        images = [info.name for info in tar if info.name.endswith(".jpg")]
    # A text for every image that has none.
    stream = io.BytesIO(ARCHIVES[kind])
    with tarfile.open(fileobj=stream, mode="a", format=PAX) as tar:
        for name in images:
            if name.replace(".jpg", ".txt") not in tar.getnames():
                info = tarfile.TarInfo(name.replace(".jpg", ".txt"))
                info.size = 1
                tar.addfile(info, io.BytesIO(b"x"))
    path.write_bytes(stream.getvalue())
    shard = Tar(path)
    found = [shard.row(index).image_id for index in range(len(shard))]
    names = [name.removesuffix(".jpg") for name in images]
    if kind != "gbk names":
        assert found == names
    assert len(found) == len(names)
    assert all(f"member {key}" in shard.where(at) for at, key in enumerate(found))
