import io

import numpy as np
import pytest
from conftest import make_image
from PIL import Image

from cn_clip.data.curate.perceptual_hash import (
    THRESHOLD,
    build_index,
    hash_image,
    look_alike,
    mirrored_and_cropped,
    near_pairs,
    search,
    without_margins,
)


def distance(a, b):
    return int(np.bitwise_count(a[:4] ^ b[:4]).sum())


def random_hashes(count, seed):
    """Signs at random; the frequencies beside them are all alike."""
    hashes = np.random.default_rng(seed).integers(0, 2**64, (count, 36), dtype=np.uint64)
    hashes[:, 4:] = 0x0102030405060708
    return hashes


def flipped(hashes, bits, seed):
    """Hashes with so many bits turned, evenly over their words."""
    out = hashes.copy()
    rng = np.random.default_rng(seed)
    for row in out:
        for bit in rng.permutation(256)[:bits].tolist():
            row[bit // 64] ^= np.uint64(1 << (bit % 64))
    return out


@pytest.mark.parametrize("threshold", [0, 7, 19, 40, 56])
def test_near_pairs_equal_those_of_brute_force(threshold):
    held = random_hashes(300, 1)
    held[100:110] = held[0]  # ties
    queries = np.concatenate([flipped(held, bits, bits) for bits in (0, 3, 15, 30, 50, 60)])
    expected = [
        (q, h, distance(query, hashed))
        for q, query in enumerate(queries)
        for h, hashed in enumerate(held)
        if distance(query, hashed) <= threshold
        and int(np.bitwise_count(query[0] ^ hashed[0])) <= threshold // 5
    ]
    found = search(build_index(held), queries, threshold)
    assert list(zip(*(each.tolist() for each in found), strict=True)) == expected
    assert len(expected) >= 300
    alike = [look_alike(held, query, threshold) for query in queries]
    assert [(q, h) for q, row in enumerate(alike) for h in np.flatnonzero(row)] == [
        (q, h) for q, h, _distance in expected
    ]


def test_no_hashes_have_no_near_pairs():
    empty = np.empty((0, 36), np.uint64)
    assert [len(each) for each in search(build_index(random_hashes(3, 0)), empty)] == [0, 0, 0]
    assert [len(each) for each in search(build_index(empty), random_hashes(3, 0))] == [0, 0, 0]


def test_near_pairs_name_each_pair_once():
    hashes = random_hashes(50, 3)
    hashes[7], hashes[30] = hashes[2], flipped(hashes[2:3], 2, 0)[0]
    later, earlier = near_pairs(hashes)
    assert sorted(zip(earlier.tolist(), later.tolist(), strict=True)) == [(2, 7), (2, 30), (7, 30)]


def recompressed(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40)
    return Image.open(stream)


def shifted(image):
    return Image.fromarray(np.clip(np.asarray(image) * [1.1, 1, 0.9] + 8, 0, 255).astype(np.uint8))


CHANGES = {
    "resized": lambda image: image.resize((image.width * 2 // 3, image.height // 2)),
    "recompressed": recompressed,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped at the sides": lambda image: image.crop((7, 5, image.width - 6, image.height - 6)),
    "cropped at a corner": lambda image: image.crop((12, 10, image.width, image.height)),
    "shifted in colour": shifted,
    "grey": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seed", range(5))
def test_a_changed_copy_stays_near_and_another_image_is_far(change, seed):
    image = make_image(seed, (240, 200))
    index = build_index(np.stack([hash_image(each) for each in mirrored_and_cropped(image)]))
    copy = hash_image(CHANGES[change](image))
    other = hash_image(make_image(seed + 100, (240, 200)))
    assert len(search(index, copy[None], THRESHOLD)[0])
    assert not len(search(index, other[None], THRESHOLD)[0])


def test_equal_signs_of_other_frequencies_are_no_match():
    held = random_hashes(2, 1)
    held[1, :4] = held[0, :4]
    held[1, 4:20] = 0x7F
    assert search(build_index(held), held[:1])[1].tolist() == [0]


def test_a_flat_image_matches_equal_pixels_only():
    """Whatever file they are in: as JPEG and as PNG, white is the same white."""
    white = Image.new("RGB", (90, 90), "white")
    faint = white.copy()
    faint.putpixel((4, 4), (255, 255, 250))
    others = [faint, Image.new("RGB", (90, 90), "red"), Image.new("RGB", (91, 90), "white")]
    hashes = np.stack([hash_image(each) for each in [white, *others, make_image(1)]])
    asked, held, distances = search(build_index(hashes), hash_image(recompressed(white))[None])
    assert (asked.tolist(), held.tolist(), distances.tolist()) == ([0], [0], [0])
    assert [len(each) for each in near_pairs(hashes, THRESHOLD)] == [0, 0]


@pytest.mark.parametrize("box", [(9, 0, 30, 20), (5, 3, 20, 17), (0, 0, 19, 12), (29, 19, 30, 20)])
@pytest.mark.parametrize("paper", ["white", "black", (200, 30, 30), (0, 128, 28)])
def test_margins_of_one_colour_go(box, paper):
    image = Image.new("RGB", (30, 20), paper)
    image.paste("teal", box)
    found = without_margins(image)
    width, height = box[2] - box[0], box[3] - box[1]
    assert found.size == (max(width, height),) * 2
    assert sorted(found.getcolors()) == sorted(
        [(width * height, (0, 128, 128))]
        + [(found.width**2 - width * height, (255, 255, 255))] * (width != height)
    )


@pytest.mark.parametrize("size", [(30, 20), (20, 30)])
def test_an_image_without_margins_is_only_padded_to_a_square(size):
    image = make_image(1, size)
    found = without_margins(image)
    assert found.size == (30, 30)
    left, top = (30 - size[0]) // 2, (30 - size[1]) // 2
    assert found.crop((left, top, left + size[0], top + size[1])).tobytes() == image.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (30, 20), (900, 700)])
def test_an_image_of_one_colour_is_unchanged(size):
    image = Image.new("RGB", size, "teal")
    assert (without_margins(image).size, without_margins(image).tobytes()) == (
        size,
        image.tobytes(),
    )


@pytest.mark.parametrize("size", [(60_000, 1), (3, 40_000)])
def test_a_strip_becomes_no_huge_square(size):
    assert sorted(without_margins(make_image(2, size)).size) == [1, 256]


def test_recompressed_margins_go_too():
    image = Image.new("RGB", (160, 160), "white")
    image.paste(make_image(3, (80, 80)), (40, 40))
    assert 80 <= without_margins(recompressed(image)).width <= 96


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (19, 19)])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "I;16", "1"])
def test_any_size_and_mode_has_a_hash(size, mode):
    for image in mirrored_and_cropped(Image.new(mode, size)):
        assert hash_image(image).shape == (36,)
