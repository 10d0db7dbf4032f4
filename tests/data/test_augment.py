"""Augmentation: against timm's own pixels, the policy's stated odds, and itself elsewhere."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cn_clip.data.loading import augment as module
from cn_clip.data.loading.augment import (
    POLICY,
    apply_op,
    augment,
    auto_augment,
    crop_box,
    generator_for,
    random_resized_crop,
)
from cn_clip.errors import UsageError
from cn_clip.image.decode import to_pixels

GOLDEN = Path(__file__).parents[1] / "golden" / "augment"
OPS = np.load(GOLDEN / "ops.npz")
WHOLE = np.load(GOLDEN / "whole.npz")
MODES = (
    "1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV",
    "I", "F", "I;16", "I;16L", "I;16B", "I;16N",
)  # fmt: skip


def photo(width=60, height=50):
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def digest(pixels):
    return hashlib.sha256(pixels.tobytes()).hexdigest()


@pytest.mark.parametrize("key", [key for key in OPS.files if key != "picture"])
def test_an_operation_makes_timms_pixels(key):
    name, level, direction = key.split()
    image = Image.fromarray(OPS["picture"])
    made = apply_op(image, name, int(level), negative=direction == "-")
    np.testing.assert_array_equal(np.asarray(made), OPS[key])


def test_every_operation_of_the_policy_has_golden_pixels():
    ours = {name for pair in POLICY for name, _, _ in pair}
    assert ours == {key.split()[0] for key in OPS.files if key != "picture"}


@pytest.mark.parametrize("name", WHOLE.files)
def test_the_same_draws_make_the_pixels_of_the_official_transform(name):
    image = Image.open(GOLDEN / f"{name}.png")
    for i, expected in enumerate(WHOLE[name]):
        made = augment(image, expected.shape[0], np.random.default_rng(i))
        np.testing.assert_array_equal(made, expected, err_msg=f"draw {i}")


def test_the_policy_is_timms():
    theirs = json.loads((GOLDEN / "policy.json").read_text())
    assert [[list(op) for op in pair] for pair in POLICY] == theirs


def test_operations_have_the_frequencies_of_the_policy(monkeypatch):
    expected: Counter[tuple] = Counter()
    for pair in POLICY:
        for outcome in range(4):
            share, applied = 1 / len(POLICY), []
            for bit, (name, probability, level) in enumerate(pair):
                taken = outcome >> bit & 1
                share *= probability if taken else 1 - probability
                applied += [(name, level)] * taken
            expected[tuple(applied)] += share

    applied, negatives = [], Counter()

    def note(image, name, level, *, negative):
        applied.append((name, level))
        negatives[name, negative] += 1
        return image

    monkeypatch.setattr(module, "apply_op", note)
    seen: Counter[tuple] = Counter()
    rng, draws = np.random.default_rng(0), 40_000
    for _ in range(draws):
        applied.clear()
        auto_augment(None, rng)
        seen[tuple(applied)] += 1

    possible = {outcome: share * draws for outcome, share in expected.items() if share > 0}
    assert seen.keys() == possible.keys()
    chi_square = sum((seen[o] - count) ** 2 / count for o, count in possible.items())
    freedom = len(possible) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations
    for name in {name for name, _ in negatives}:
        share = negatives[name, True] / (negatives[name, True] + negatives[name, False])
        two_way = name in ("Rotate", "ShearX")
        assert share == pytest.approx(0.5, abs=0.05) if two_way else share == 0


def test_crops_have_the_stated_area_and_aspect_and_reach_every_position():
    rng, side = np.random.default_rng(1), 1000
    boxes = np.array(
        [crop_box(side, side, rng, scale=(0.2, 0.4), ratio=(3 / 4, 4 / 3)) for _ in range(4000)]
    )
    left, top, right, bottom = boxes.T
    assert (boxes >= 0).all() and (boxes <= side).all()
    share = (right - left) * (bottom - top) / side**2
    assert share.min() > 0.199 and share.max() < 0.401
    assert share.mean() == pytest.approx(0.3, abs=0.005)  # uniform
    shape = np.log((right - left) / (bottom - top))
    assert np.abs(shape).max() < np.log(4 / 3) + 0.005
    assert shape.mean() == pytest.approx(0, abs=0.02)  # log-uniform
    for place in (left / (side - (right - left)), top / (side - (bottom - top))):
        assert np.histogram(place, 10, (0, 1))[0] == pytest.approx(400, abs=100)


@pytest.mark.parametrize(
    "width, height, box",
    [(400, 300, (0, 0, 400, 300)), (600, 300, (100, 0, 500, 300)), (90, 300, (0, 90, 90, 210))],
)
def test_an_image_that_no_random_box_fits_keeps_its_centre(width, height, box):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert crop_box(width, height, rng, scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3)) == box


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 50)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (4, 9), (1 / 9, 1 / 4)])
def test_a_crop_has_at_least_one_pixel_of_the_image(size, ratio):
    for seed in range(50):
        rng = np.random.default_rng(seed)
        left, top, right, bottom = crop_box(*size, rng, scale=(0.001, 1.0), ratio=ratio)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_the_same_image_and_epoch_give_the_same_pixels_in_any_order():
    image, ids = photo(), [f"{i}" for i in range(30)]
    forwards = {id: digest(augment(image, 16, generator_for(3, 1, id))) for id in ids}
    backwards = {id: digest(augment(image, 16, generator_for(3, 1, id))) for id in ids[::-1]}
    assert forwards == backwards
    assert len(set(forwards.values())) > 25
    for other in ((4, 1), (3, 2)):
        changed = [digest(augment(image, 16, generator_for(*other, id))) for id in ids]
        assert sum(forwards[id] == new for id, new in zip(ids, changed, strict=True)) < 3


def test_another_process_gives_the_same_pixels():
    code = (
        "import hashlib; from PIL import Image; from cn_clip.data.loading.augment import *;"
        f"image = Image.open({str(GOLDEN / 'photo.png')!r});"
        "made = [augment(image, 20, generator_for(7, 2, f'图{i}')) for i in range(9)];"
        "print(hashlib.sha256(b''.join(p.tobytes() for p in made)).hexdigest())"
    )
    image = Image.open(GOLDEN / "photo.png")
    made = [augment(image, 20, generator_for(7, 2, f"图{i}")) for i in range(9)]
    here = hashlib.sha256(b"".join(p.tobytes() for p in made)).hexdigest()
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert out.stdout.strip() == here, out.stderr


def test_draws_do_not_change_between_versions():
    assert generator_for(0, 0, "a").random(3).tolist() == [
        0.6204489827165378,
        0.2605049059981318,
        0.2455459367533228,
    ]


def test_different_seed_epoch_and_image_give_different_draws():
    triples = [(1, 11, "1"), (11, 1, "1"), (1, 1, "1:1"), (1, 1, "11"), (-1, 1, ""), (1, -1, "")]
    triples += [(1, 1, "\ud800"), (1, 1, "?"), (1, 1, "图")]
    assert len({generator_for(*each).random() for each in triples}) == len(triples)


@pytest.fixture
def whole_area(monkeypatch):
    monkeypatch.setattr(module, "KEPT_AREA", (1.0, 1.0))


@pytest.fixture
def unchanged_colours(monkeypatch):
    monkeypatch.setattr(module, "auto_augment", lambda image, rng: image)


@pytest.mark.usefixtures("whole_area", "unchanged_colours")
@pytest.mark.parametrize("mode", MODES)
def test_any_mode_without_augmentation_is_plain_preprocessing(mode):
    image = photo() if mode == "RGB" else converted(photo(), mode)
    made = augment(image, 24, np.random.default_rng(0))
    np.testing.assert_array_equal(made, to_pixels(image, 24))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width, height", [(1, 1), (2, 3), (1, 5000), (5000, 1)])
def test_no_mode_and_no_size_stops_a_run(mode, width, height, monkeypatch):
    monkeypatch.setattr(module, "KEPT_AREA", (0.001, 1.0))
    for seed in range(30):
        image = Image.new(mode, (width, height))
        made = augment(image, 8, np.random.default_rng(seed), flip=True)
        assert made.shape == (8, 8, 3) and made.dtype == np.uint8


@pytest.mark.parametrize("transparency", [3, b"\x00\x80\xff"])
def test_a_transparent_palette_raises_no_warning(transparency):
    image = photo().quantize(16)
    plain = augment(image, 16, np.random.default_rng(0))
    image.info["transparency"] = transparency
    np.testing.assert_array_equal(augment(image, 16, np.random.default_rng(0)), plain)
    assert image.info["transparency"] == transparency


@pytest.mark.usefixtures("whole_area")
@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_the_callers_image_is_not_modified(mode):
    image = converted(photo(24, 24), mode)
    before = image.tobytes()
    for seed in range(60):
        made = augment(image, 24, np.random.default_rng(seed), flip=True)
        assert not np.shares_memory(made, np.asarray(image))
    assert (image.tobytes(), image.mode, image.size) == (before, mode, (24, 24))


@pytest.mark.usefixtures("whole_area", "unchanged_colours")
def test_half_of_the_images_are_flipped_with_flip_only():
    image = photo(20, 20)
    upright = np.asarray(image)
    mirrored = 0
    for seed in range(300):
        made = augment(image, 20, np.random.default_rng(seed))
        np.testing.assert_array_equal(made, upright)
        made = augment(image, 20, np.random.default_rng(seed), flip=True)
        mirrored += np.array_equal(made, upright[:, ::-1])
        assert np.array_equal(made, upright) or np.array_equal(made, upright[:, ::-1])
    assert 115 < mirrored < 185  # four standard deviations


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda rng: augment(photo(), 0, rng), "side of 0"),
        (lambda rng: random_resized_crop(photo(), 8, rng, scale=(0.9, 1.1)), r"\(0.9, 1.1\)"),
        (lambda rng: random_resized_crop(photo(), 8, rng, scale=(0.0, 1.0)), "0 < min"),
        (
            lambda rng: random_resized_crop(photo(), 8, rng, scale=(1, 1), ratio=(2, 1)),
            r"ratio \(2, 1\)",
        ),
        (lambda rng: apply_op(photo(), "Rotate", 11), "level 11"),
        (lambda rng: apply_op(photo(), "Spin", 1), "'Spin'; available: AutoContrast, Color"),
        (lambda rng: apply_op(photo().convert("L"), "Rotate", 1), "not L; convert"),
    ],
)
def test_errors_name_the_value_and_the_remedy(call, told):
    with pytest.raises(UsageError, match=told):
        call(np.random.default_rng(0))


def converted(image, mode):
    """``image.convert``, with the modes that Pillow does not convert to filled from bytes."""
    if mode.startswith("I;16"):
        grey = np.asarray(image.convert("L")).astype(">u2" if mode == "I;16B" else "<u2") * 3
        return Image.frombytes(mode, image.size, grey.tobytes())
    if mode == "LAB":
        return Image.frombytes(mode, image.size, image.tobytes())
    return image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)
