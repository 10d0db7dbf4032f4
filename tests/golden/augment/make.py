"""Write the files of this folder: what timm's own training transform makes of synthetic pictures.

    pip install timm==1.0.31 Pillow==13.0.0
    python make.py

``ops.npz`` holds ``picture`` and, per operation, level and direction, what timm's operation makes
of it. ``policy.json`` is timm's "original" AutoAugment policy. ``whole.npz`` holds pictures and the
pixels that the whole transform makes of them, set up and converted to RGB as in the official
training but never mirrored; its draws are those of ``numpy.random.default_rng(i)`` for the i-th.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm.data.auto_augment as aa
import timm.data.transforms as crops
from PIL import Image
from timm.data import create_transform

HERE = Path(__file__).parent
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIDE, DRAWS = 20, 60


def picture(width, height, seed):
    """Waves of three colours, a hard-edged block and a little noise; no full black or white."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / width * 5 + 2 * c + seed) + np.cos(y / height * 4 + c) for c in range(3)]
    pixels = 115 + 42 * np.stack(waves, axis=-1) + rng.integers(-3, 4, (height, width, 1))
    pixels[height // 4 : height // 2, width // 3 : width // 2] = (210, 40, 90)
    return Image.fromarray(pixels.clip(12, 236).astype(np.uint8))


def drawing_from(rng):
    """Stand in for the module ``random``, every draw made of one ``rng.random()``."""
    return SimpleNamespace(
        random=rng.random,
        uniform=lambda low, high: low + (high - low) * rng.random(),
        randint=lambda low, high: low + int((high - low + 1) * rng.random()),
        choice=lambda options: options[int(len(options) * rng.random())],
    )


def transform():
    made = create_transform(
        input_size=SIDE,
        scale=(0.9, 1.0),
        is_training=True,
        color_jitter=None,
        auto_augment="original",
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
    ).transforms
    assert [type(step).__name__ for step in made] == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "AutoAugment",
        "MaybeToTensor", "Normalize",
    ]  # fmt: skip
    return made[0], made[2]  # RGB conversion stands between the mirror and AutoAugment


crop, policy = transform()
pairs = [
    [[op.name.removesuffix("Original"), op.prob, op.magnitude] for op in pair]
    for pair in policy.policy
]
(HERE / "policy.json").write_text(
    "[\n" + ",\n".join("  " + json.dumps(pair) for pair in pairs) + "\n]\n"
)

small = picture(28, 22, 0)
made = {"picture": np.asarray(small)}
hparams = policy.policy[0][0].hparams
for name in sorted({op.name for pair in policy.policy for op in pair}):
    has_level = aa.LEVEL_TO_ARG[name] is not None
    two_way = name in ("Rotate", "ShearX")
    for level in (0, 2, 5, 7, 8, 10) if has_level else (5,):
        for direction, draw in (("+", 0.25), ("-", 0.75))[: 1 + two_way]:
            aa.random = SimpleNamespace(random=lambda draw=draw: draw)
            op = aa.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)
            made[f"{name.removesuffix('Original')} {level} {direction}"] = np.asarray(op(small))
np.savez_compressed(HERE / "ops.npz", **made)

sources = {
    "wide": picture(90, 30, 1),
    "tall": picture(22, 60, 2),
    "square": picture(41, 41, 3),
    "photo": picture(50, 38, 4),
    "palette": picture(36, 36, 5).quantize(24),
    "alpha": picture(33, 40, 6).convert("RGBA"),
}
sources["alpha"].putalpha(picture(33, 40, 7).convert("L"))
whole = {}
for name, source in sources.items():
    source.save(HERE / f"{name}.png")
    rows = []
    for i in range(DRAWS // len(sources)):
        crops.random = aa.random = drawing_from(np.random.default_rng(i))
        rows.append(np.asarray(policy(crop(source).convert("RGB"))))
    whole[name] = np.stack(rows)
np.savez_compressed(HERE / "whole.npz", **whole)
