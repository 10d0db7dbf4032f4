"""16-bit, float and rare modes: the same image in other numbers is the same image, or refused."""

import struct

import numpy as np
import pytest
from conftest import GOLDEN, cosines, encoded, make_image
from PIL import Image, ImageCms

import cn_clip
import cn_clip.clip as clip
from cn_clip.clip import _warn_of_clipping
from cn_clip.data.curate.perceptual_hash import hash_image
from cn_clip.data.encode import Encoding
from cn_clip.data.encode import encode_image as encoded_anew
from cn_clip.errors import ImageError
from cn_clip.html.page import thumbnail
from cn_clip.image.decode import read_image, read_pixels

GREY = np.asarray(make_image(2).convert("L"))  # (60, 80)
SIXTEEN = GREY.astype(np.uint16) * 257
UNIT = GREY.astype(np.float32) / 255


def saved(array, format, **options):
    return encoded(Image.fromarray(array), format, **options)


def tiff(order, bits, pixels, *, black=1):
    """A grey TIFF, byte by byte: Pillow writes few kinds. ``black`` 0 says that 0 is white."""
    height, width = GREY.shape
    values = {256: width, 257: height, 258: bits, 259: 1, 262: black, 273: 200, 277: 1}
    values |= {278: height, 279: len(pixels)}
    raw = (b"MM" if order == ">" else b"II") + struct.pack(order + "HLH", 42, 8, len(values))
    raw += b"".join(struct.pack(order + "HHLL", t, 4, 1, v) for t, v in values.items())
    return raw.ljust(200, b"\0") + pixels


SAME = {
    "16-bit PNG": saved(SIXTEEN, "PNG"),
    "16-bit TIFF": saved(SIXTEEN, "TIFF", compression="tiff_lzw"),
    "big-endian TIFF": tiff(">", 16, SIXTEEN.astype(">u2").tobytes()),
    "TIFF whose 0 is white": tiff("<", 16, (65_535 - SIXTEEN).tobytes(), black=0),
    "32-bit TIFF of 16-bit values": saved(SIXTEEN.astype(np.int32), "TIFF"),
    "float TIFF": saved(UNIT, "TIFF"),
    "uint16 array": SIXTEEN,
    "big-endian array": SIXTEEN.astype(">u2"),
    "float32 array": UNIT,
    "float64 array": GREY / 255,
    "PIL image of mode I;16": Image.fromarray(SIXTEEN),
    "PIL image of mode I": Image.fromarray(SIXTEEN.astype(np.int32)),
    "PIL image of mode F": Image.fromarray(UNIT),
    "PIL image of mode I;16B": Image.frombytes("I;16B", (80, 60), SIXTEEN.astype(">u2").tobytes()),
}


@pytest.mark.parametrize("name", SAME)
def test_a_grey_image_is_the_same_in_eight_and_sixteen_bits_and_float(name):
    np.testing.assert_array_equal(np.asarray(read_image(SAME[name])), GREY)
    np.testing.assert_array_equal(read_pixels(SAME[name], 32), read_pixels(GREY, 32))


def test_the_cosine_is_that_of_the_eight_bit_image():
    embedder = cn_clip.load()
    images = embedder.embed_images([GREY, SAME["16-bit PNG"], SAME["float TIFF"]])
    assert cosines(images[:1], images[1:2]) > 0.9999 and cosines(images[:1], images[2:]) > 0.9999


def test_colours_of_sixteen_bits_are_those_of_eight():
    colours = np.asarray(make_image(1))
    np.testing.assert_array_equal(np.asarray(read_image(colours.astype(np.uint16) * 257)), colours)
    np.testing.assert_array_equal(np.asarray(read_image(colours / 255.0)), colours)


def test_every_reader_of_our_own_scales_them():
    raw, grey = SAME["16-bit PNG"], saved(GREY, "PNG")
    np.testing.assert_array_equal(hash_image(read_image(raw)), hash_image(read_image(grey)))
    assert thumbnail(raw) == thumbnail(grey)
    anew = [encoded_anew(each, Encoding(format="JPEG")) for each in (raw, grey)]
    assert anew[0] == anew[1]


def test_values_between_two_levels_are_rounded():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(read_image(values)), expected)


def test_twelve_bits_reach_from_black_to_white():
    twelve = np.rint(GREY / 255 * 4095).astype(int)
    even, odd = twelve[:, ::2], twelve[:, 1::2]  # two pixels in three bytes
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=-1)
    raw = tiff("<", 12, packed.astype(np.uint8).tobytes())
    np.testing.assert_array_equal(np.asarray(read_image(raw)), GREY)


def test_the_transparent_value_of_a_sixteen_bit_png_stays_transparent():
    raw = saved(SIXTEEN, "PNG", transparency=int(SIXTEEN[5, 5]))
    alpha = np.asarray(read_image(raw))[..., 1]
    np.testing.assert_array_equal(alpha == 0, np.equal(GREY, GREY[5, 5]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 70_000]], np.int32), "mode I .* from 0 to 70000.* convert it to 8 bits"),
        (np.array([[-5, 700]], np.int32), "mode I .* from -5 to 700"),
        (np.array([[0, 200]], np.int32), "mode I .* from 0 to 200, which does not define"),
        (np.array([[0, 255]], np.float32), "mode F .* from 0 to 255; scale them to 0 to 1"),
        (np.array([[-0.5, 1]], np.float32), "mode F .* from -0.5 to 1"),
        (np.array([[0, np.nan]], np.float32), "mode F .* NaN or infinite"),
        (np.array([[0, np.inf]], np.float32), "mode F .* NaN or infinite"),
    ],
)
def test_a_value_range_that_does_not_define_white_is_refused(values, message):
    for source in (saved(values, "TIFF"), Image.fromarray(values)):
        with pytest.raises(ImageError, match=message):
            read_image(source)


@pytest.mark.parametrize(
    "array",
    [
        np.full((4, 4, 3), 300.0),
        np.full((4, 4), np.nan),
        np.zeros((4, 4), np.int64),
        np.zeros((4, 4), np.uint32),
        np.zeros((4, 4), complex),
        np.zeros((4, 4), object),
        np.zeros((4,), np.uint16),
        np.zeros((3, 4, 5), bool),
        np.zeros((0, 4), np.uint8),
    ],
)
def test_an_array_that_is_no_image_is_refused_with_its_dtype_and_shape(array):
    with pytest.raises(ImageError, match=rf"dtype {array.dtype} and shape \(") as error:
        read_image(array)
    assert "expected uint8" in str(error.value) or "values" in str(error.value)


def test_true_is_white():
    assert np.asarray(read_image(np.array([[True, False]]))).tolist() == [[255, 0]]


def test_lab_becomes_the_colours_it_was_made_of():
    colours = make_image(3)
    lab = ImageCms.profileToProfile(
        colours,
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    found = np.asarray(read_image(encoded(lab, "TIFF"))).astype(int)
    assert np.abs(found - np.asarray(colours)).mean() < 2
    assert hash_image(read_image(GOLDEN / "hostile" / "lab.tif")).shape == (36,)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "La", "PA", "RGBA", "RGBa", "RGBX", "CMYK"])
@pytest.mark.parametrize("background", [None, "white"])
def test_every_mode_is_hashed_resized_and_encoded(mode, background):
    """Hashed, made small, encoded anew; none of them raises."""
    steps = {"La": ["RGBA", "LA", "La"], "RGBa": ["RGBA", "RGBa"], "PA": ["P", "PA"]}
    image = make_image(1)
    for step in steps.get(mode, [mode]):
        image = image.convert(step)
    read = read_image(image, background=background)
    assert hash_image(read).shape == (36,) and read.convert("RGB").size == (80, 60)
    assert read_pixels(image, 16, background=background).shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV"])
def test_colour_spaces_keep_their_colours(mode):
    colours = make_image(1)
    found = read_pixels(colours.convert(mode), 60).astype(int)
    assert np.abs(found - read_pixels(colours, 60)).mean() < 4


def test_the_official_transform_clips_and_warns_once():
    _warn_of_clipping.cache_clear()
    deep = Image.open(GOLDEN / "images" / "i16.png")
    with pytest.warns(UserWarning, match="mode I;16, values above 255 become white") as seen:
        for _ in range(3):
            clip.image_transform()(deep)
    assert len(seen) == 1
