"""Near-duplicate pictures: perceptual hashes, and a lookup that compares few of them.

The hash is the sign pattern of a picture's low frequencies (Zauner, "Implementation and
Benchmarking of Perceptual Image Hash Functions", 2010): resizing, recompression and shifts of
colour change few bits. What it finds is confirmed by the frequencies themselves, because drawings
on white share many signs. Mirrored and cropped pictures are found by hashing the smaller side of a
comparison mirrored and cropped too; drawings with other margins by hashing both sides without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, reduce

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops

from cn_clip.image.modes import strips

Hashes = npt.NDArray[np.uint64]

THRESHOLD = 52  # of the 256 bits: finds crops too, where the crops of one side are hashed
SAME = 19  # what resizing and recompression change
_SIDE, _FREQUENCIES = 64, 16
_SIGNS = 4  # words of 64 bits; the first has the lowest frequencies. The others hold 256 numbers
WORDS = _SIGNS + _FREQUENCIES**2 // 8
_LIKENESS = 0.93  # cosine of the frequencies of two pictures, at least
_CHUNKS = 4  # of 16 bits, by which the first word is looked up
_BLOCK = 1 << 12  # queries that are looked up together, which bounds the memory
_CROP = 0.05
_MARGIN = 12  # levels of a colour, of 255, in which a margin may differ from its corners
_TRIMMED = 256  # longest side of a picture without margins
_LONG = 2  # times as long as wide
_NOISE = 0.3  # amplitude, in grey levels, that recompression may change
_PLAIN = 6.0  # standard deviation, of 255 grey levels, below which noise decides the signs


def hash_image(image: Image.Image) -> Hashes:
    """Return the hash of a picture, uint64 (36,); lay transparent pixels on white before.

    Four words hold signs, the others the frequencies themselves. A plain picture, all white say,
    has none that mean anything: a digest of its size and pixels stands for the signs, so that it
    matches itself alone, and its frequencies are zero.
    """
    small = _grey(image).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, dtype=np.float32)
    if pixels.std() < _PLAIN:
        return _plain_hash(image)
    basis = _cosines()
    frequencies = basis @ pixels @ basis.T  # (16, 16), in grey levels
    frequencies[0, 0] = 0  # brightness
    low, rest = frequencies[:8, :8], (frequencies[:8, 8:], frequencies[8:])
    ordered = np.concatenate([low.ravel(), *(each.ravel() for each in rest)])
    # Above a little, not above zero: a symmetric picture has many that only noise tells from zero.
    signs = np.packbits(ordered > _NOISE)
    numbers = np.rint(ordered * (127 / np.abs(ordered).max())).astype(np.int8)
    return np.concatenate([signs, numbers.view(np.uint8)]).view(np.uint64)


def _grey(image: Image.Image) -> Image.Image:
    grey = Image.new("L", image.size)
    for box in strips(image.size):  # CMYK goes by way of RGB, which takes a copy
        grey.paste(image.crop(box).convert("L"), box[:2])
    return grey


def _plain_hash(image: Image.Image) -> Hashes:
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=8 * _SIGNS)
    for box in strips(image.size):
        digest.update(image.crop(box).convert("RGB").tobytes())
    hashed = np.zeros(WORDS, dtype=np.uint64)
    hashed[:_SIGNS] = np.frombuffer(digest.digest(), dtype=np.uint64)
    return hashed


def variants(image: Image.Image) -> Iterator[Image.Image]:
    """Yield an image, its mirror image, and it without 5 % at its sides and corners: one at a time,
    as each is nearly a copy."""
    yield image
    yield image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width, height = image.size
    across, down = round(width * _CROP), round(height * _CROP)
    if not across or not down:
        return
    boxes = [
        (
            x * across // 2,
            y * down // 2,
            width - (2 - x) * across // 2,
            height - (2 - y) * down // 2,
        )
        for x in range(3)
        for y in range(3)
    ]
    sides = [(across, 0, width, height), (0, 0, width - across, height)]
    sides += [(0, down, width, height), (0, 0, width, height - down)]
    yield from (image.crop(box) for box in [*boxes, *sides])


def trimmed(image: Image.Image) -> Image.Image:
    """Return a picture without margins, small, on a white square, so that it keeps its shape; but
    not if that would be mostly white, as those of all long pictures.

    Margins have the colour that most corners share. A picture of one colour stays as it is.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")  # a copy may be 500 MB
    right, bottom = image.width - 1, image.height - 1
    corners = [image.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]
    box = _content_box(image, max(corners, key=corners.count))
    if box is None:
        return image
    inner = image.crop(box)
    inner.thumbnail((_TRIMMED, _TRIMMED))  # before the square: that of a strip would be huge
    side = max(inner.size)
    if side > _LONG * min(inner.size):
        return inner
    square = Image.new("RGB", (side, side), "white")
    square.paste(inner, ((side - inner.width) // 2, (side - inner.height) // 2))
    return square


def _content_box(
    image: Image.Image, margin: float | tuple[int, ...] | None
) -> tuple[int, int, int, int] | None:
    """Return the smallest box with all that differs from the colour of the margin."""
    boxes = []
    for place in strips(image.size):
        strip = image.crop(place)
        plain = Image.new("RGB", strip.size, margin)
        away = reduce(ImageChops.lighter, ImageChops.difference(strip, plain).split())
        box = away.point(lambda level: 255 * (level > _MARGIN)).getbbox()
        if box is not None:
            boxes.append((box[0], box[1] + place[1], box[2], box[3] + place[1]))
    if not boxes:
        return None
    lefts, uppers, rights, lowers = zip(*boxes, strict=True)
    return min(lefts), min(uppers), max(rights), max(lowers)


@cache
def _cosines() -> npt.NDArray[np.float32]:
    """Return the first rows of the discrete cosine transform, (16, 64), for unit amplitudes."""
    rows = np.arange(_FREQUENCIES)[:, None]
    columns = np.arange(_SIDE)[None] + 0.5
    basis = np.cos(np.pi / _SIDE * rows * columns) * (2 / _SIDE)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


@dataclass(frozen=True, slots=True)
class HashIndex:
    """Hashes (N, 36), sorted by each 16 bits of their first word (multi-index hashing; Norouzi,
    Punjani and Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", 2012)."""

    hashes: Hashes
    orders: tuple[npt.NDArray[np.int64], ...]
    starts: tuple[npt.NDArray[np.int64], ...]


def build(hashes: Hashes) -> HashIndex:
    """Index hashes (N, 36)."""
    orders, starts = [], []
    for chunk in range(_CHUNKS):
        values = _chunk(hashes[:, 0], chunk)
        orders.append(np.argsort(values, kind="stable"))
        starts.append(np.searchsorted(values[orders[-1]], np.arange((1 << 16) + 1)))
    return HashIndex(hashes, tuple(orders), tuple(starts))


def search(
    index: HashIndex, queries: Hashes, threshold: int = THRESHOLD
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find all pairs within a distance.

    Args:
        index: of N hashes.
        queries: hashes (M, 36).
        threshold: the most of the 256 signs in which two may differ. Of the first 64, which hold
            the coarse picture, a fifth of that at most; so a pair is found by one of four 16-bit
            pieces that differ in a twentieth of it, which is what makes the lookup quick.

    Returns:
        Numbers of the queries, numbers in the index, and distances, of equal lengths, sorted.
    """
    found = [_search_block(index, queries, at, threshold) for at in range(0, len(queries), _BLOCK)]
    rows = np.concatenate(found) if found else np.empty((0, 3), np.int64)
    return rows[:, 0], rows[:, 1], rows[:, 2]


def near_pairs(
    hashes: Hashes, threshold: int = SAME
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the near-duplicates among hashes (N, 36): the later ones, the earlier ones."""
    later, earlier, _ = search(build(hashes), hashes, threshold)
    once = earlier < later
    return later[once], earlier[once]


def _search_block(
    index: HashIndex, queries: Hashes, at: int, threshold: int
) -> npt.NDArray[np.int64]:
    block = queries[at : at + _BLOCK]
    coarse = threshold // 5
    kept = []
    for chunk in range(_CHUNKS):
        pieces = _chunk(block[:, 0], chunk)
        for mask in _masks(coarse // _CHUNKS):
            keys = pieces ^ mask
            first = index.starts[chunk][keys]
            counts = index.starts[chunk][keys + 1] - first
            asked = np.repeat(np.arange(len(block)), counts)
            if not len(asked):
                continue
            # The places first, first + 1, ... of each query, one after another.
            within = np.arange(len(asked)) - np.repeat(np.cumsum(counts) - counts, counts)
            held = index.orders[chunk][np.repeat(first, counts) + within]
            near = np.bitwise_count(block[asked, 0] ^ index.hashes[held, 0]) <= coarse
            kept.append(np.stack([asked[near], held[near]], axis=1))
    pairs = np.unique(np.concatenate(kept), axis=0) if kept else np.empty((0, 2), np.int64)
    asked, held = pairs[:, 0], pairs[:, 1]
    differing = np.bitwise_count(block[asked, :_SIGNS] ^ index.hashes[held, :_SIGNS])
    distances = differing.sum(axis=1, dtype=np.int64)
    near = distances <= threshold
    near[near] = _likeness(block[asked[near]], index.hashes[held[near]]) >= _LIKENESS
    matches: npt.NDArray[np.int64] = np.column_stack([asked + at, held, distances])[near]
    return matches


def _likeness(some: Hashes, others: Hashes) -> npt.NDArray[np.float32]:
    """Return the cosines of the frequencies in hashes (K, 36) and (K, 36).

    That of two plain pictures, which have none, is 1; that of a plain one and another is 0.
    """
    a, b = (
        np.ascontiguousarray(h[:, _SIGNS:]).view(np.int8).astype(np.float32) for h in (some, others)
    )
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(lengths[0] * lengths[1], 1e-6)
    cosines[(lengths[0] == 0) & (lengths[1] == 0)] = 1
    likeness: npt.NDArray[np.float32] = cosines
    return likeness


def _chunk(words: Hashes, chunk: int) -> npt.NDArray[np.int64]:
    return ((words >> np.uint64(16 * chunk)) & np.uint64(0xFFFF)).astype(np.int64)


@cache
def _masks(flips: int) -> tuple[int, ...]:
    """Return the 16-bit numbers with at most so many bits set."""
    return tuple(each for each in range(1 << 16) if each.bit_count() <= flips)
