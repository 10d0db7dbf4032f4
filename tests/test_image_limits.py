"""Files that cost far more than their size: refused from their header, or within bounds."""

import base64
import os
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from conftest import GOLDEN, encoded, make_image
from PIL import Image

from cn_clip.data.curate.check import check
from cn_clip.data.curate.decontaminate import decontaminate
from cn_clip.data.encode import Encoding
from cn_clip.data.encode import encode_image as encoded_anew
from cn_clip.data.pack import pack
from cn_clip.data.sources.open import open_source
from cn_clip.errors import CNClipError, ImageError
from cn_clip.html.page import thumbnail
from cn_clip.image.decode import read_file, read_image, read_pixels
from cn_clip.image.limits import MAX_DECODED, MemoryBudget, decoding_bytes

BOMB = GOLDEN / "hostile" / "bomb_34_bytes.webp"


def png(width, height, *chunks, depth=8, colour=0):
    def chunk(kind, data):
        tail = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + tail

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*each) for each in ((b"IHDR", header), *chunks, (b"IEND", b""))
    )


def tiff(**tags):
    """A grey TIFF of 8 x 8 pixels; ``tags`` are (kind, count, value) by ``t`` and number."""
    given = {256: (4, 1, 8), 257: (4, 1, 8), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    given |= {273: (4, 1, 400), 277: (3, 1, 1), 279: (4, 1, 64)}
    given |= {int(name[1:]): value for name, value in tags.items()}
    raw = b"II*\0" + struct.pack("<LH", 8, len(given))
    raw += b"".join(struct.pack("<HHLL", tag, *given[tag]) for tag in sorted(given))
    return raw.ljust(400, b"\0") + bytes(64)


def comment_gif(blocks):
    raw = encoded(Image.new("L", (8, 8)), "GIF")
    at = raw.index(b"\x2c")
    return raw[:at] + b"\x21\xfe" + blocks * (b"\xff" + b"x" * 255) + b"\0" + raw[at:]


def scans_jpeg(count):
    raw = encoded(Image.new("RGB", (640, 640)), "JPEG", progressive=True)
    return raw[:-2] + raw[raw.rindex(b"\xff\xda") : -2] * count + raw[-2:]


JPEG = encoded(make_image(), "JPEG")
COSTLY = {
    "34 bytes for 134 million pixels": (BOMB.read_bytes(), "2,146,828,320 bytes to decode as WEBP"),
    "scans": (scans_jpeg(6_000), "scans over 409,600 pixels"),
    "segments": (JPEG[:2] + b"\xff\xfe\0\2" * 5_000 + JPEG[2:], "more than 4,096 segments"),
    "junk": (JPEG[:2] + bytes(2_000_000) + JPEG[2:], "more than a megabyte of junk"),
    "fill bytes": (JPEG[:2] + b"\xff" * 2_000_000 + JPEG[2:], "more than a megabyte of junk"),
    "EXIF": (
        JPEG[:2] + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)) * 300 + JPEG[2:],
        "JPEG header of more than 16,777,216 bytes",
    ),
    "comments": (comment_gif(10_000), "more than two megabytes of comments"),
    "chunks": (png(8, 8, *[(b"tIME", b"")] * 270_000), "more than 262,144 PNG chunks"),
    "strips": (tiff(t273=(4, 20_000_000, 400)), "20,000,000 values of TIFF tag 273"),
    "tile": (tiff(t259=(3, 1, 5), t322=(4, 1, 60_000), t323=(4, 1, 10_000)), "bytes to decode"),
    "width": (png(2**27, 1, (b"IDAT", b"")), "bytes to decode as PNG"),
}


@pytest.mark.parametrize("name", COSTLY)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_need_far_more_memory_than_their_size_are_refused_before_decoding(
    name, monkeypatch
):
    content, message = COSTLY[name]
    Image.init()  # loading Pillow's plugins decodes an image of its own
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for read in (read_image, lambda source: read_pixels(source, 32)):
        with pytest.raises(ImageError, match=message):
            read(content)


@pytest.mark.parametrize(
    "content",
    [
        scans_jpeg(20),
        JPEG[:2] + b"\xff\xfe\0\2" * 1_000 + JPEG[2:],
        JPEG[:2] + b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527) + JPEG[2:],
        comment_gif(300),
        tiff(),
        png(8, 8, *[(b"tIME", b"")] * 1_000, (b"IDAT", zlib.compress(bytes(72)))),
    ],
    ids=["scans", "segments", "EXIF", "comment", "TIFF", "chunks"],
)
def test_images_that_need_little_more_memory_than_usual_are_read(content):
    assert read_pixels(content, 16).shape == (16, 16, 3)


def test_a_large_photo_of_every_format_is_within_the_limits():
    """100 megapixels of JPEG, PNG and TIFF, 60 of WebP; only the cost is computed."""
    for format, size in (("JPEG", 10_000), ("PNG", 10_000), ("TIFF", 10_000), ("WEBP", 7_700)):
        image = Image.new("1", (size, size))
        image.format = format
        assert decoding_bytes(image) <= MAX_DECODED
    image.format = "JPEG"
    image.info["progressive"], image.layer = 1, [(1, 2, 2, 0), (2, 1, 1, 1), (3, 1, 1, 1)]
    assert decoding_bytes(image) == 7_700**2 * 8


def test_threads_stay_within_the_memory_budget_and_the_largest_runs_alone():
    room, lock, held, peak = MemoryBudget(100), threading.Lock(), [0], []

    def hold(amount):
        with room.reserved(amount):
            with lock:
                held[0] += amount
                peak.append((held[0], amount))
            time.sleep(0.002)
            with lock:
                held[0] -= amount

    threads = [threading.Thread(target=hold, args=(n,)) for n in [40, 30, 70, 500, 10, 100, 60] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(peak) == 21 and all(total <= 100 or total == own == 500 for total, own in peak)


def test_a_comment_too_long_for_jpeg_is_dropped():
    content = comment_gif(300)  # 76,500 bytes; a JPEG's has 65,533
    assert thumbnail(content).startswith(b"\xff\xd8")
    for format in ("JPEG", "WEBP"):
        assert encoded_anew(content, Encoding(format=format))[0]


@pytest.mark.parametrize(
    ("size", "wanted", "suffix"),
    [
        ((16_384, 2), "WEBP", ".jpg"),
        ((2, 16_383), "WEBP", ".webp"),
        ((65_501, 1), "WEBP", ".png"),
        ((65_501, 1), "JPEG", ".png"),
        ((65_500, 1), "JPEG", ".jpg"),
    ],
)
def test_an_image_too_long_for_its_format_gets_another_format(size, wanted, suffix):
    content, found = encoded_anew(
        encoded(Image.new("RGB", size, "red"), "PNG"), Encoding(format=wanted)
    )
    assert found == suffix and read_image(content).size == size


def bad_images(folder):
    """Good pairs, and an image of each kind that ended a command."""
    for seed in range(3):
        make_image(seed).save(folder / f"good{seed}.png")
    (folder / "bomb.webp").write_bytes(BOMB.read_bytes())
    (folder / "comment.gif").write_bytes(comment_gif(300))
    (folder / "lab.tif").write_bytes((GOLDEN / "hostile" / "lab.tif").read_bytes())
    Image.new("RGB", (16_400, 3), "red").save(folder / "long.png")
    (folder / "nan.tif").write_bytes(
        encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF")
    )
    for image in list(folder.iterdir()):
        image.with_suffix(".txt").write_text(f"图 {image.stem}", encoding="utf-8")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_one_bad_image_ends_no_command(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    bad_images(photos)
    source = open_source(f"folder:{photos}")
    found = check(source)
    named = [problem.text for problem in found.problems if problem.kind == "image"]
    assert found.counts["image"] == 2
    assert all(any(name in text for text in named) for name in ("bomb", "nan"))
    packed = pack(source, tmp_path / "packed", encoding=Encoding(format="WEBP"))
    assert (packed.images, len(packed.skipped)) == (6, 2)
    assert {each.size for each in map(read_image, images_of(tmp_path / "packed"))} >= {(16_400, 3)}
    tests = tmp_path / "tests"
    tests.mkdir()
    make_image(1).save(tests / "x.png")
    (tests / "x.txt").write_text("测试图", encoding="utf-8")
    clean = decontaminate(source, open_source(f"folder:{tests}"))
    assert len(clean.unreadable) == 2 and [each.reason for each in clean.removed] == ["image"]


def images_of(folder):
    source = open_source(f"tar:{folder}/*.tar")
    return [source.image(index) for index in range(len(source))]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero", tmp_path):
        with pytest.raises(ImageError, match=r"is a .*, not a regular file"):
            read_file(path)


def test_a_file_of_absurd_size_is_refused_unread(tmp_path):
    with (tmp_path / "huge.jpg").open("wb") as stream:
        stream.truncate(2**40)  # sparse
    with pytest.raises(ImageError, match=r"huge\.jpg .* 1,099,511,627,776 bytes, above the limit"):
        read_image(tmp_path / "huge.jpg")


@pytest.mark.parametrize("content", [encoded(make_image(), "JPEG"), encoded(make_image(), "PNG")])
def test_base64_where_a_path_or_bytes_belong_is_called_base64(content):
    text = base64.b64encode(content).decode()
    for given in (text, text[:200], base64.encodebytes(content).decode(), text.encode()):
        with pytest.raises(ImageError, match=r"base64; decode it first") as e:
            read_image(given)
        assert len(str(e.value)) <= 300
    with pytest.raises(ImageError, match="decode the base64 of the data: URI first"):
        read_image(f"data:image/jpeg;base64,{text}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a" * 5_000, "base64|cannot be read: File name too long"),
        ("你" * 5_000, "cannot be read: File name too long"),
        ("a\0b.jpg", "cannot be read: its path holds a NUL character"),
        ("\ud800.jpg", "cannot be read"),
        ("no/such/iVBORw0KGgo.png", "no such file"),
    ],
)
def test_an_invalid_path_is_one_short_sentence(path, message):
    with pytest.raises(ImageError, match=message) as error:
        read_image(path)
    assert len(str(error.value)) <= 300


def mutants(content, count, rng):
    """Bytes changed, cut out, repeated, or cut off."""
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(int(rng.integers(1, 6))):
            at = int(rng.integers(len(changed)))
            match int(rng.integers(5)):
                case 0:
                    changed[at] = int(rng.integers(256))
                case 1:
                    changed[at : at + 2] = b"\xff\xff"
                case 2:
                    del changed[at : at + int(rng.integers(1, 20))]
                case 3:
                    changed[at:at] = changed[at : at + int(rng.integers(1, 20))]
                case _:
                    del changed[max(8, at) :]
        yield bytes(changed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_damaged_image_is_read_or_named_and_raises_nothing_else(seed):
    """The larger corpus over all formats of the package is in tests/fuzz."""
    rng = np.random.default_rng(seed)
    image = make_image(seed, (24, 20))
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    originals = [encoded(image, format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    originals += [encoded(deep, "PNG", transparency=257), encoded(deep, "TIFF")]
    originals.append(encoded(image.quantize(8), "PNG", transparency=bytes(8)))
    originals.append(encoded(image, "TIFF", compression="tiff_deflate"))
    for content in originals:
        for mutant in mutants(content, 6, rng):
            for step in (
                lambda raw: read_pixels(raw, 16, background="white"),
                lambda raw: encoded_anew(raw, Encoding(max_side=8, format="WEBP")),
                thumbnail,
            ):
                try:
                    step(mutant)
                except CNClipError as error:
                    assert len(str(error)) <= 300
