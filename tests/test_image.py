"""Pixels against the reference's, and images that should not be trusted."""

import io
import struct
import zlib

import numpy as np
import pytest
from conftest import GOLDEN, encoded, make_image
from PIL import Image

from cn_clip.errors import ImageError
from cn_clip.image import decode
from cn_clip.image.decode import find_images, formats_of, normalize, read_image, to_pixels
from cn_clip.image.limits import decoding_bytes


@pytest.mark.parametrize("name", sorted(p.name for p in (GOLDEN / "images").iterdir()))
def test_pixels_equal_the_reference(name):
    expected = np.load(GOLDEN / "pixels.npz")[name]  # (3, 224, 224)
    pixels = to_pixels(Image.open(GOLDEN / "images" / name), 224)
    np.testing.assert_array_equal(pixels.transpose(2, 0, 1), expected)
    if name != "i16.png":  # which the reference clips, and read_image scales
        pixels = to_pixels(read_image(GOLDEN / "images" / name), 224)
        np.testing.assert_array_equal(pixels.transpose(2, 0, 1), expected)


def test_normalize_is_the_plain_formula():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.7])
    expected = ((pixels / 255.0 - mean) / std).transpose(0, 3, 1, 2)
    got = normalize(pixels, mean, std)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_allowed_format_opens_from_path_and_bytes(tmp_path, format):
    raw = encoded(make_image(), format)
    path = tmp_path / "picture"
    path.write_bytes(raw)
    assert read_image(path).size == read_image(raw).size == (80, 60)


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_avif_and_heic_decode_as_their_libraries_decode_them(tmp_path, format, mode):
    pillow_heif = pytest.importorskip("pillow_heif")
    raw = heic(mode) if format == "HEIF" else encoded(make_image(mode=mode), "AVIF")
    image = pillow_heif.open_heif(raw) if format == "HEIF" else Image.open(io.BytesIO(raw))
    expected = np.asarray(image.to_pillow() if format == "HEIF" else image)
    np.testing.assert_array_equal(np.asarray(read_image(raw)), expected)
    path = tmp_path / ("a.HEIC" if format == "HEIF" else "a.avif")
    path.write_bytes(raw)
    assert find_images([tmp_path]) == [path]
    np.testing.assert_array_equal(np.asarray(read_image(path)), expected)


def heic(mode="RGB", **options):
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    pillow_heif.from_pillow(make_image(mode=mode)).save(stream, format="HEIF", **options)
    return stream.getvalue()


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_heic_of_a_rotated_camera_is_upright(orientation):
    pillow_heif = pytest.importorskip("pillow_heif")
    image = make_image()
    image.getexif()[0x0112] = orientation
    stream = io.BytesIO()
    pillow_heif.register_heif_opener()
    image.save(stream, "HEIF", exif=image.getexif().tobytes())
    raw = stream.getvalue()
    expected = pillow_heif.open_heif(raw).to_pillow()
    assert expected.size == ((80, 60) if orientation == 3 else (60, 80))
    np.testing.assert_array_equal(np.asarray(read_image(raw)), np.asarray(expected))


def test_damaged_and_large_heic_and_avif_are_refused():
    raw = heic()
    for content in (raw, encoded(make_image(), "AVIF")):
        for end in (12, 40, len(content) // 2, len(content) - 20):
            with pytest.raises(ImageError):
                read_image(content[:end])
        with pytest.raises(ImageError, match="80 x 60 pixels, above the limit of 100"):
            read_image(content, max_pixels=100)
    assert decoding_bytes(Image.new("RGB", (100, 100))) == 8 * 100 * 100
    with Image.open(io.BytesIO(raw), formats=formats_of(raw)) as opened:
        assert decoding_bytes(opened) == 20 * 80 * 60


def test_without_pillow_heif_a_heic_names_the_package(monkeypatch):
    raw = heic()
    monkeypatch.setattr(decode, "_HEIF", False)
    monkeypatch.setattr(decode, "FORMATS", ("JPEG", "PNG"))
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        read_image(raw)


def test_arrays_and_pil_images_are_accepted():
    picture = make_image()
    array = np.asarray(picture)
    for source in (picture, array, array[..., 0], np.dstack([array, array[..., :1]])):
        assert read_image(source).size == (80, 60)


def test_other_formats_are_refused():
    with pytest.raises(ImageError, match="not an image in a known format"):
        read_image(encoded(make_image(), "PPM"))
    with pytest.raises(ImageError, match="not an image in a known format"):
        read_image(b"%PDF-1.7 not a picture")


def test_cmyk_becomes_rgb_and_an_animation_its_first_frame():
    cmyk = encoded(make_image(mode="CMYK"), "JPEG")
    difference = to_pixels(read_image(cmyk), 16).astype(int) - to_pixels(make_image(), 16)
    assert np.abs(difference).mean() < 8
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (to_pixels(read_image(animated), 8) == [255, 0, 0]).all()


def test_to_pixels_clips_sixteen_bits_at_255_as_the_reference_does():
    for value, expected in ((100, 100), (40_000, 255)):
        deep = Image.fromarray(np.full((10, 10), value, dtype=np.uint16))
        assert (to_pixels(Image.open(io.BytesIO(encoded(deep, "PNG"))), 8) == expected).all()


def test_exif_orientation_is_applied():
    picture = make_image(size=(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = read_image(encoded(picture, "JPEG", exif=exif))
    assert turned.size == (20, 40)


def test_a_callers_image_is_not_rotated_in_place():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(make_image(size=(40, 20)), "JPEG", exif=exif)))
    assert read_image(image).size == (20, 40)
    assert image.size == (40, 20)


def test_a_jpeg_cut_in_half_is_damaged():
    raw = encoded(make_image(size=(200, 200)), "JPEG")
    with pytest.raises(ImageError, match="is damaged"):
        read_image(raw[: len(raw) // 2])


def test_a_huge_header_is_refused_before_decoding(monkeypatch):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"claims 2,500,000,000 pixels, above all limits"):
        read_image(bomb)


def test_the_pixel_limit_is_the_callers():
    raw = encoded(make_image(size=(100, 100)), "PNG")
    with pytest.raises(ImageError, match="100 x 100 pixels, above the limit of 9,999"):
        read_image(raw, max_pixels=9_999)
    assert read_image(raw, max_pixels=10_000).size == (100, 100)


def test_fast_decode_reads_large_jpegs_at_reduced_size_and_nearly_the_same_pixels():
    raw = encoded(make_image(size=(1600, 1200)), "JPEG", quality=95)
    fast = read_image(raw, fast_decode=224)
    assert fast.size == (800, 600)
    exact = to_pixels(read_image(raw), 224).astype(float)
    assert np.abs(to_pixels(fast, 224) - exact).mean() < 2


def test_fast_decode_leaves_a_callers_image_as_it_is():
    image = Image.open(io.BytesIO(encoded(make_image(size=(1600, 1200)), "JPEG")))
    assert read_image(image, fast_decode=224).size == image.size == (1600, 1200)


def test_transparent_pixels_get_the_given_background():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (to_pixels(read_image(clear, background="white"), 8) == 255).all()
    assert (to_pixels(read_image(clear), 8) == 0).all()  # what the reference does


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/cat.jpg", "is a URL"),
        ("no/such/file.jpg", "no such file"),
        (".", "a folder, not a regular file"),
        (b"", "known format"),
        (np.full((4, 4, 3), 2.0), "dtype float64"),
        (np.zeros((4, 4, 7), np.uint8), "not an image"),
        (42, "not an image"),
        ("bad\0name.jpg", "cannot be read"),
    ],
)
def test_an_invalid_image_is_one_sentence(source, message):
    with pytest.raises(ImageError, match=message) as error:
        read_image(source)
    assert "\n" not in str(error.value)


def test_folders_and_globs_expand_in_order_without_repeats(image_folder):
    (image_folder / "notes.txt").write_text("no picture")
    found = find_images([image_folder / "1.jpg", image_folder, f"{image_folder}/*"])
    assert [path.name for path in found] == ["1.jpg", "0.jpg", "2.jpg"]


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(ImageError, match="holds no image"):
        find_images([tmp_path])
    with pytest.raises(ImageError, match="no such file"):
        find_images([tmp_path / "*.jpg"])
