"""Near-duplicate images: perceptual hashes, and an index that compares few of them.

The hash is the signs of an image's low DCT frequencies (Zauner, "Implementation and Benchmarking
of Perceptual Image Hash Functions", 2010): resizing, recompression and colour shifts change few
bits. Matches are verified by the frequencies themselves, because drawings on white share many
signs. Mirrored and cropped copies match because the smaller set is hashed mirrored and cropped
too; drawings with other margins because both sets are also hashed without margins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, reduce

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops

from cn_clip.image.decode import ImageInput, read_image
from cn_clip.image.modes import strips

Hashes = npt.NDArray[np.uint64]

# Maximum differing bits of 256.
THRESHOLD = 52  # includes crops, if one side is hashed cropped
DUPLICATE_THRESHOLD = 19  # resized and recompressed copies
_SIDE, _FREQUENCIES = 64, 16
# 64-bit words of a hash: four of signs, the lowest frequencies first, then 256 int8 frequencies.
_SIGN_WORDS = 4
HASH_WORDS = _SIGN_WORDS + _FREQUENCIES**2 // 8
_MIN_SIMILARITY = 0.93  # cosine of the frequencies of two images
_CHUNKS = 4  # 16-bit lookup keys in the first word
_BLOCK = 1 << 12  # queries looked up at once, which bounds the memory
_CROP = 0.05
_MARGIN = 12  # levels of 255 by which a margin may differ from the corner colour
_MAX_SIDE = 256  # longest side of an image without margins
_MAX_ASPECT = 2
_DECODED = 256  # minimum decoded side of a JPEG in pixels; a hash uses 64
_MIN_FREQUENCY = 0.3  # grey levels; recompression changes smaller amplitudes
_FLAT_STD = 6.0  # grey levels; below this standard deviation noise decides the signs


def read_for_hash(source: ImageInput) -> Image.Image:
    """Decode an image for ``hash_image``; a large JPEG at a reduced size.

    Raises:
        CNClipError: as ``read_image``.
    """
    return read_image(source, fast_decode=_DECODED, background="white")


def hash_image(image: Image.Image) -> Hashes:
    """Return the hash of an opaque image, uint64 (36,): 4 words of signs, 32 of frequencies.

    A flat image, such as an all-white one, has no meaningful signs. They are replaced by a digest
    of its size and pixels, and its frequencies are zero, so that it matches identical ones only.
    """
    small = _grey(image).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, dtype=np.float32)
    if pixels.std() < _FLAT_STD:
        return _flat_hash(image)
    basis = _cosines()
    frequencies = basis @ pixels @ basis.T  # (16, 16), in grey levels
    frequencies[0, 0] = 0  # brightness
    low, rest = frequencies[:8, :8], (frequencies[:8, 8:], frequencies[8:])
    ordered = np.concatenate([low.ravel(), *(part.ravel() for part in rest)])
    # Not above zero: many frequencies of a symmetric image are zero plus noise.
    signs = np.packbits(ordered > _MIN_FREQUENCY)
    scaled = np.rint(ordered * (127 / np.abs(ordered).max())).astype(np.int8)
    return np.concatenate([signs, scaled.view(np.uint8)]).view(np.uint64)


def _grey(image: Image.Image) -> Image.Image:
    grey = Image.new("L", image.size)
    for box in strips(image.size):  # Pillow converts CMYK via an RGB copy: only a strip of it
        grey.paste(image.crop(box).convert("L"), box[:2])
    return grey


def _flat_hash(image: Image.Image) -> Hashes:
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=8 * _SIGN_WORDS)
    for box in strips(image.size):
        digest.update(image.crop(box).convert("RGB").tobytes())
    hashed = np.zeros(HASH_WORDS, dtype=np.uint64)
    hashed[:_SIGN_WORDS] = np.frombuffer(digest.digest(), dtype=np.uint64)
    return hashed


def mirrored_and_cropped(image: Image.Image) -> Iterator[Image.Image]:
    """Yield an image, its mirror image, and crops by 5 % at each side and corner; lazily, as every
    one is nearly a full copy."""
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


def without_margins(image: Image.Image) -> Image.Image:
    """Return an image without margins, at most 256 pixels long, padded to a white square.

    Images with an aspect ratio above 2 are not padded: most of the square would be white. Margins
    have the colour of most corners. An image of a single colour is returned unchanged.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")  # a copy may be 500 MB
    right, bottom = image.width - 1, image.height - 1
    corners = [image.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]
    box = _content_box(image, max(corners, key=corners.count))
    if box is None:
        return image
    inner = image.crop(box)
    inner.thumbnail((_MAX_SIDE, _MAX_SIDE))  # before padding: a thin strip would make a huge square
    side = max(inner.size)
    if side > _MAX_ASPECT * min(inner.size):
        return inner
    square = Image.new("RGB", (side, side), "white")
    square.paste(inner, ((side - inner.width) // 2, (side - inner.height) // 2))
    return square


def _content_box(
    image: Image.Image, margin: float | tuple[int, ...] | None
) -> tuple[int, int, int, int] | None:
    """Return the smallest box around all pixels that differ from the margin colour."""
    boxes = []
    for strip_box in strips(image.size):
        strip = image.crop(strip_box)
        background = Image.new("RGB", strip.size, margin)
        difference = reduce(ImageChops.lighter, ImageChops.difference(strip, background).split())
        box = difference.point(lambda level: 255 * (level > _MARGIN)).getbbox()
        if box is not None:
            boxes.append((box[0], box[1] + strip_box[1], box[2], box[3] + strip_box[1]))
    if not boxes:
        return None
    lefts, uppers, rights, lowers = zip(*boxes, strict=True)
    return min(lefts), min(uppers), max(rights), max(lowers)


@cache
def _cosines() -> npt.NDArray[np.float32]:
    """Return the first rows of the discrete cosine transform, (16, 64), scaled to amplitudes."""
    rows = np.arange(_FREQUENCIES)[:, None]
    columns = np.arange(_SIDE)[None] + 0.5
    basis = np.cos(np.pi / _SIDE * rows * columns) * (2 / _SIDE)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


@dataclass(frozen=True, slots=True)
class HashIndex:
    """Hashes (N, 36), sorted by each 16-bit chunk of their first word (multi-index hashing;
    Norouzi, Punjani and Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", 2012)."""

    hashes: Hashes
    orders: tuple[npt.NDArray[np.int64], ...]
    starts: tuple[npt.NDArray[np.int64], ...]


def build_index(hashes: Hashes) -> HashIndex:
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
        threshold: maximum differing signs of 256. The first 64, the coarse image, may differ in a
            fifth of that; so one of their four 16-bit chunks differs in at most a twentieth,
            which makes the lookup fast.

    Returns:
        Query indexes, indexes of the matches, and distances, each (K,), sorted.
    """
    blocks = [_search_block(index, queries, at, threshold) for at in range(0, len(queries), _BLOCK)]
    rows = np.concatenate(blocks) if blocks else np.empty((0, 3), np.int64)
    return rows[:, 0], rows[:, 1], rows[:, 2]


def near_pairs(
    hashes: Hashes, threshold: int = DUPLICATE_THRESHOLD
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the near-duplicate pairs among hashes (N, 36): later indexes, earlier indexes."""
    later, earlier, _ = search(build_index(hashes), hashes, threshold)
    once = earlier < later
    return later[once], earlier[once]


def look_alike(
    first: Hashes, second: Hashes, threshold: int = DUPLICATE_THRESHOLD
) -> npt.NDArray[np.bool_]:
    """Return which hashes (K, 36) are near to ``second``, (K, 36) or (36,), as ``search`` finds
    them."""
    first, second = np.broadcast_arrays(first, second)
    near: npt.NDArray[np.bool_] = _distances(first, second) <= threshold
    near &= np.bitwise_count(first[:, 0] ^ second[:, 0]) <= threshold // 5
    near[near] = _similarity(first[near], second[near]) >= _MIN_SIMILARITY
    return near


def _search_block(
    index: HashIndex, queries: Hashes, at: int, threshold: int
) -> npt.NDArray[np.int64]:
    block = queries[at : at + _BLOCK]
    coarse = threshold // 5
    candidates = []
    for chunk in range(_CHUNKS):
        chunk_keys = _chunk(block[:, 0], chunk)
        for mask in _masks(coarse // _CHUNKS):
            keys = chunk_keys ^ mask
            first = index.starts[chunk][keys]
            counts = index.starts[chunk][keys + 1] - first
            query = np.repeat(np.arange(len(block)), counts)
            if not len(query):
                continue
            # Positions first, first + 1, ... for each query, concatenated.
            offsets = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
            match = index.orders[chunk][np.repeat(first, counts) + offsets]
            near = np.bitwise_count(block[query, 0] ^ index.hashes[match, 0]) <= coarse
            candidates.append(np.stack([query[near], match[near]], axis=1))
    pairs = (
        np.unique(np.concatenate(candidates), axis=0) if candidates else np.empty((0, 2), np.int64)
    )
    query, match = pairs[:, 0], pairs[:, 1]
    distances = _distances(block[query], index.hashes[match])
    near = distances <= threshold
    near[near] = _similarity(block[query[near]], index.hashes[match[near]]) >= _MIN_SIMILARITY
    matches: npt.NDArray[np.int64] = np.column_stack([query + at, match, distances])[near]
    return matches


def _distances(first: Hashes, second: Hashes) -> npt.NDArray[np.int64]:
    """Return the number of signs (K,) that differ in hashes (K, 36) and (K, 36)."""
    differing = np.bitwise_count(first[:, :_SIGN_WORDS] ^ second[:, :_SIGN_WORDS])
    distances: npt.NDArray[np.int64] = differing.sum(axis=1, dtype=np.int64)
    return distances


def _similarity(first: Hashes, second: Hashes) -> npt.NDArray[np.float32]:
    """Return the cosines (K,) of the frequencies in hashes (K, 36) and (K, 36).

    Two flat images have cosine 1; a flat and another image have cosine 0.
    """
    a, b = (
        np.ascontiguousarray(h[:, _SIGN_WORDS:]).view(np.int8).astype(np.float32)
        for h in (first, second)
    )
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(norms[0] * norms[1], 1e-6)
    cosines[(norms[0] == 0) & (norms[1] == 0)] = 1
    result: npt.NDArray[np.float32] = cosines
    return result


def _chunk(words: Hashes, chunk: int) -> npt.NDArray[np.int64]:
    return ((words >> np.uint64(16 * chunk)) & np.uint64(0xFFFF)).astype(np.int64)


@cache
def _masks(flips: int) -> tuple[int, ...]:
    """Return all 16-bit masks with at most ``flips`` bits set."""
    return tuple(mask for mask in range(1 << 16) if mask.bit_count() <= flips)
